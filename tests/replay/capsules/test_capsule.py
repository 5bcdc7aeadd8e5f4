"""What a capsule holds, that it is whole or not there, and what is said of one that is damaged or does not fit."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bifusion_diag.errors import UserError
from bifusion_diag.replay.capsules import capsule as module
from bifusion_diag.replay.capsules.capsule import (
    CapsuleWriter,
    _own_checksum,
    parse_size,
    read_capsule,
    restore_capsule,
    run_again,
)
from bifusion_diag.replay.capsules.execute import replay_capsule
from bifusion_diag.replay.incident import Cause, Incident, SampleShare, Trigger
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Training, fingerprint

INCIDENT = Incident(
    12,
    "nonfinite-loss",
    (Trigger("nonfinite-loss", "mask is NaN", "head", value=float("nan"), limit=float("inf")),),
    cause=Cause("head", "forward", "aten.log"),
    terms=("mask",),
    samples=(SampleShare(1, "b.png", "its loss is NaN", ("no objects",)),),
    evidence={"smallest norm": np.float32(0.5), "rows": (3, 4)},
)


def make(seed: int = 0, width: int = 8) -> Training:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return Training(model, lambda b: (model(b["x"]) - b["y"]).square().mean(), (optimizer,))


def in_a_step(training: Training, steps: int = 3) -> StepNotes:
    """The notes of the last of some steps; its update is not done yet."""
    for step in range(steps):
        batch = {"x": torch.randn(6, 4), "y": torch.randn(6, 1)}
        notes = StepNotes(training.model, 12, batch)
        training.backward(training.loss(batch))
        if step < steps - 1:
            for optimizer in training.optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return notes


def writer(folder: Path | None = Path("run.incidents"), **options: Any) -> CapsuleWriter:
    made = CapsuleWriter(options.pop("count", 10), options.pop("limit", "1 GB"), settings={"lr": 0.1}, **options)
    made.open(options.pop("model", nn.Identity()), folder)
    return made


def write(training: Training, notes: StepNotes, **options: Any) -> str:
    folder, note = writer(**options).write(INCIDENT, training, notes, None)
    assert folder is not None, note
    return folder


def state_of(training: Training) -> dict[str, Any]:
    """Everything that a step may change, copied."""
    return {
        "model": copy.deepcopy(training.model.state_dict()),
        "grads": {name: g.clone() for name, g in training.gradients().items()},
        "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in training.optimizers],
        "random": (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[2]),
        "modes": [m.training for m in training.model.modules()],
        "learns": [p.requires_grad for p in training.model.parameters()],
    }


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def test_writing_changes_nothing_of_the_training() -> None:
    training = make()
    notes = in_a_step(training)
    before = state_of(training)
    write(training, notes)
    assert equal(before, state_of(training))


def test_everything_comes_back() -> None:
    training = make()
    training.model[2].p = 0.7  # a schedule's
    training.model[3].weight.requires_grad_(False)
    training.model[2].eval()
    training.optimizers[0].param_groups[0]["betas"] = (0.8, 0.99)
    notes = in_a_step(training)
    start = {name: value.clone() for name, value in notes.start.buffers.items()}
    capsule = read_capsule(write(training, notes, state=lambda: {"scheduler": {"last_epoch": 7, "x": torch.ones(2)}}))
    restored, again = restore_capsule(capsule, make(seed=1))
    want, got = state_of(training), state_of(restored)
    for name, buffer in start.items():
        want["model"][name] = buffer  # BatchNorm's statistics are those of the step's start
    assert equal(
        [want[k] for k in ("model", "optimizers", "modes", "learns")],
        [got[k] for k in ("model", "optimizers", "modes", "learns")],
    )
    assert got["grads"] == {}
    assert restored.model[2].p == 0.7
    assert equal(again.batch(), notes.batch())
    assert again.number == 12
    assert torch.equal(again.start.torch, notes.start.torch)
    assert again.start.python == notes.start.python
    assert equal(capsule.state(), {"scheduler": {"last_epoch": 7, "x": torch.ones(2)}})
    assert fingerprint(None, training.gradients()).gradients == capsule.fingerprint.gradients  # type: ignore[union-attr]


def test_an_optimiser_that_was_not_built_is_made_and_goes_on_as_the_first() -> None:
    training = make()
    notes = in_a_step(training)
    restored, _ = restore_capsule(read_capsule(write(training, notes)), dataclasses.replace(make(1), optimizers=()))
    run = run_again(training, notes)
    for one in (training, restored):
        for name, parameter in one.parameters().items():
            parameter.grad = torch.full_like(parameter, 0.1) if name else None
        one.optimizers[0].step()
    assert run.error is None
    assert equal(dict(training.model.named_parameters()), dict(restored.model.named_parameters()))


def test_the_scale_of_mixed_precision_is_restored() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    training = dataclasses.replace(make(), scaler=scaler)
    batch = {"x": torch.randn(6, 4), "y": torch.randn(6, 1)}
    for _ in range(3):
        notes = StepNotes(training.model, 12, batch)
        scaler.scale(training.step(batch)).backward()
        scaler.step(training.optimizers[0])
        scaler.update()
        training.model.zero_grad()
    capsule = read_capsule(write(training, notes))
    assert scaler.get_scale() == 512.0
    for built in (make(1), dataclasses.replace(make(1), scaler=torch.amp.GradScaler("cpu"))):
        restored, again = restore_capsule(capsule, built)
        assert restored.scaler is not None
        assert restored.scaler.state_dict() == scaler.state_dict()
        assert run_again(restored, again).bits == capsule.fingerprint


def test_after_an_update_the_capsule_holds_the_weights_after_it_and_says_so() -> None:
    training = make()
    notes = in_a_step(training)
    stale = fingerprint(None, training.gradients())
    training.optimizers[0].step()
    folder, note = writer().write(INCIDENT, training, notes, stale, updated=True)
    capsule = read_capsule(folder)  # type: ignore[arg-type]
    assert capsule.after_update
    assert "with the weights after the update" in note
    restored, again = restore_capsule(capsule, make(1))
    assert run_again(restored, again).bits == capsule.fingerprint
    assert capsule.fingerprint.gradients != stale.gradients  # type: ignore[union-attr]


def test_the_files_are_plain_and_named_by_parameters() -> None:
    training = make()
    folder = Path(write(training, in_a_step(training)))
    assert sorted(path.name for path in folder.iterdir()) == [
        "batch.json", "batch.safetensors", "capsule.json", "state.safetensors",
    ]  # fmt: skip
    tensors = load_file(folder / "state.safetensors")
    assert torch.equal(tensors["model/0.weight"], training.model[0].weight)
    assert {"buffer/1.running_mean", "optimizer/0/3.bias/exp_avg_sq", "random/torch"} <= set(tensors)
    document = json.loads((folder / "capsule.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert document["incident"]["triggers"][0]["value"] == "NaN"
    assert document["optimizers"][0]["groups"][0]["settings"]["weight_decay"] == 0.01
    assert {"python", "packages", "git", "threads", "device", "deterministic"} <= set(document["environment"])
    stored = read_capsule(folder).incident
    assert stored.triggers[0].limit == float("inf")
    assert (stored.cause, stored.samples, stored.evidence["rows"]) == (INCIDENT.cause, INCIDENT.samples, [3, 4])
    assert stored.capsule == str(folder)


def test_frozen_weights_that_the_settings_give_again_are_left_out_and_compared() -> None:
    training = make()
    made = CapsuleWriter(9, "1 GB", settings={}, rebuilt=frozenset({"0.weight"}))
    made.open(training.model, Path("run.incidents"))
    notes = in_a_step(Training(training.model, training.step, ()))
    folder, note = made.write(INCIDENT, training, notes, None)
    assert folder is not None, note
    assert "model/0.weight" not in load_file(Path(folder) / "state.safetensors")
    capsule = read_capsule(folder)
    assert run_again(*restore_capsule(capsule, make(seed=0))).bits == capsule.fingerprint
    with pytest.raises(UserError, match=r"1 frozen weights are not in it, and those that were built here are others"):
        restore_capsule(capsule, make(seed=1))
    with torch.no_grad():  # such as a fault in frozen weights
        training.model[0].weight[0, 0] = 5.0
    folder, _ = made.write(INCIDENT, training, in_a_step(Training(training.model, training.step, ())), None)
    assert load_file(Path(str(folder)) / "state.safetensors")["model/0.weight"][0, 0] == 5.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"folder": None}, "capsules are written beside the record"),
        ({"count": 0}, "0 capsules were written in this run, and no more are wanted"),
        ({"limit": "1 KB"}, "more than the limit of 1.0 kB"),
    ],
)
def test_why_there_is_no_capsule(options: dict[str, Any], words: str) -> None:
    training = make()
    folder, note = writer(**options).write(INCIDENT, training, in_a_step(training), None)
    assert folder is None
    assert words in note
    assert not Path("run.incidents").exists()


def test_there_are_so_many_of_a_kind_and_place_and_so_many_in_all() -> None:
    training, made = make(), writer(count=4)
    notes = in_a_step(training)
    steps = [dataclasses.replace(INCIDENT, step=step) for step in (0, 2, 4, 6)]
    others = [dataclasses.replace(INCIDENT, step=step, kind="gradient-spike") for step in (10, 12)]
    found = [made.write(incident, training, notes, None) for incident in [*steps, *others]]
    assert [folder is not None for folder, _ in found] == [True, True, True, False, True, False]
    assert found[3][1] == "3 capsules of this kind and place were written before"
    assert found[5][1] == "4 capsules were written in this run, and no more are wanted"
    assert made.written == 4


def test_of_bad_steps_in_a_row_the_first_two_are_kept() -> None:
    training, made = make(), writer()
    notes = in_a_step(training)
    kinds = ["nonfinite-loss", "nonfinite-gradient", "gradient-spike", "nonfinite-loss"]
    incidents = [dataclasses.replace(INCIDENT, step=step, kind=kind) for step, kind in enumerate(kinds)]
    found = [made.write(incident, training, notes, None) for incident in incidents]
    assert [folder is not None for folder, _ in found] == [True, True, False, False]
    assert found[3][1] == "the two steps before were bad too"


def test_a_step_without_its_batch_has_no_capsule() -> None:
    training = make()
    folder, note = writer().write(INCIDENT, training, StepNotes(training.model, 12, None), None)
    assert folder is None
    assert "was not given the batch" in note


def test_a_full_disk_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    training = make()
    notes = in_a_step(training)

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    folder, note = writer().write(INCIDENT, training, notes, None)
    assert (folder, note) == (None, "no capsule could be written: OSError: [Errno 28] No space left on device")
    assert list(Path("run.incidents").iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    assert "and the disk has 0.0 kB left" in writer().write(INCIDENT, training, notes, None)[1]


def test_the_size_that_is_said_is_the_size_on_disk() -> None:
    training = make(width=50_000)
    notes = in_a_step(training)
    made = writer()
    said = made.size(training, notes.batch())
    folder, note = made.write(INCIDENT, training, notes, None)
    on_disk = sum(path.stat().st_size for path in Path(str(folder)).iterdir())
    assert note == f"{said / 1e6:.1f} MB"
    assert said == pytest.approx(on_disk, rel=0.01)


def test_a_capsule_of_the_same_step_takes_the_place_of_the_first() -> None:
    training, made = make(), writer()
    notes = in_a_step(training)
    first, _ = made.write(INCIDENT, training, notes, None)
    second, _ = made.write(dataclasses.replace(INCIDENT, kind="loss-spike"), training, notes, None)
    assert first == second
    assert read_capsule(str(first)).incident.kind == "loss-spike"


@pytest.mark.parametrize("name", ["state.safetensors", "batch.safetensors", "batch.json", "capsule.json"])
def test_damage_is_seen_and_the_file_is_named(name: str) -> None:
    training = make()
    folder = Path(write(training, in_a_step(training)))
    path = folder / name
    whole = path.read_bytes()
    flipped = bytearray(whole)
    place = whole.index(b"nonfinite-loss") if name == "capsule.json" else len(whole) // 2
    flipped[place] ^= 1
    for content, words in [(whole[:-100], name), (bytes(flipped), f"{name} is not as it was written"), (b"", name)]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_capsule(folder)
    path.unlink()
    with pytest.raises(UserError, match=name):
        read_capsule(folder)


def test_what_is_no_capsule_is_refused() -> None:
    Path("other").mkdir()
    for content, words in [
        ('{"a": 1}', "is not a capsule of bifusion-diag"),
        ("[]", "is not a capsule of bifusion-diag"),
        ("[" * 100_000, "cannot be read"),
        (
            '{"kind": "bifusion-diag capsule", "format_version": 99}',
            "format version 99; this bifusion-diag reads up to",
        ),
    ]:
        Path("other/capsule.json").write_text(content)
        with pytest.raises(UserError, match=words):
            read_capsule("other")
    with pytest.raises(UserError, match="is no capsule: it has no"):
        read_capsule("nowhere")


@pytest.mark.parametrize(
    ("forged", "words"),
    [
        ({"files": {}}, "lacks some of its files"),
        ({"files": None, "ranks": "2"}, "lacks files, ranks"),
        ({"incident": {}}, "cannot read"),
        ({"fingerprint": {}}, "cannot read"),
        ({"model": {}}, "cannot read"),
        ({"random": {"python": [1]}}, "cannot read"),
        ({"environment": {"threads": -1}}, "cannot be set here"),
    ],
)
def test_a_forged_capsule_with_a_right_checksum_is_refused_in_words(forged: dict[str, Any], words: str) -> None:
    training = make()
    path = Path(write(training, in_a_step(training)), "capsule.json")
    content = json.loads(path.read_text()) | forged
    path.write_text(json.dumps(content | {"checksum": _own_checksum(content)}))
    before = torch.get_num_threads()
    with pytest.raises(UserError, match=words):
        replay_capsule(read_capsule(path), make())
    assert torch.get_num_threads() == before


def test_a_model_that_does_not_fit_is_told() -> None:
    training = make()
    capsule = read_capsule(write(training, in_a_step(training)))
    with pytest.raises(UserError, match=r"parameter 0.weight has shape \(8, 4\), the model's \(9, 4\)"):
        restore_capsule(capsule, make(width=9))
    short = nn.Sequential(*list(make().model)[:2], nn.Identity(), nn.Linear(8, 1, bias=False), nn.Linear(1, 1))
    with pytest.raises(UserError, match=r"it lacks 3\.bias and it also has 4\.bias, 4\.weight"):
        restore_capsule(capsule, Training(short, lambda b: b))
    other = make()
    with pytest.raises(UserError, match=r"holds the state of .*AdamW; .*SGD was built"):
        restore_capsule(capsule, dataclasses.replace(other, optimizers=(torch.optim.SGD(other.model.parameters()),)))
    with pytest.raises(UserError, match="holds 1 optimisers, and 2 were built"):
        restore_capsule(capsule, dataclasses.replace(other, optimizers=other.optimizers * 2))


def test_what_the_step_uses_beside_the_model_is_told() -> None:
    model, teacher = nn.Linear(4, 1), nn.Linear(4, 1)
    training = Training(model, lambda b: (model(b["x"]) - teacher(b["x"])).square().mean())
    notes = StepNotes(model, 12, {"x": torch.randn(6, 4), "hook": print})
    _, note = writer().write(INCIDENT, training, notes, None)
    assert "batch/hook is a builtins:builtin_function_or_method, and not in it" in note
    assert "teacher (Linear) is no part of the model" in note


@pytest.mark.parametrize(
    ("text", "size"), [("2 GB", 2 * 10**9), ("1.5MiB", 3 << 19), (17, 17), ("17", 17), ("3kb", 3000)]
)
def test_a_size_is_read(text: Any, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1 GB", "2 XB", "1e3", True, "two"])
def test_what_is_no_size_is_told(text: Any) -> None:
    with pytest.raises(UserError, match="is no size; write it as"):
        parse_size(text)
