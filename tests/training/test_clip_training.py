"""Runs with CLIP's tokens kept, and with a part of CLIP that learns: the same to the bit, resumed or not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from bifusion_diag.config import Settings
from bifusion_diag.errors import UserError
from bifusion_diag.record import Run
from bifusion_diag.training import Trainer, resume_training

Train = Callable[..., Run]
OFF, FOLDER = "model.clip.cache_memory=0", "model.clip.cache_folder=kept"
PROBES = ("losses", "clip", "gate")
LORA, BLOCKS = "model.clip.tune=lora", "model.clip.tune=blocks"


def tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    newest = sorted((folder / f"{name}.checkpoints").glob("step-*"))[-1]
    return load_file(newest / "state.safetensors")


def assert_same_weights(folder: Path, one: Run, other: Run) -> None:
    """And equal moments, buffers and random states."""
    left, right = (tensors(folder, run.header.name) for run in (one, other))
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def assert_same_run(folder: Path, one: Run, other: Run) -> None:
    """Equal weights and recorded numbers."""
    assert_same_weights(folder, one, other)
    assert one.names() == other.names()
    for name in one.names():
        if "seconds" not in name:
            ours, theirs = one.series(name), other.series(name)
            np.testing.assert_array_equal(ours.steps, theirs.steps, err_msg=name)
            np.testing.assert_array_equal(ours.value, theirs.value, err_msg=name)


def executed(run: Run) -> list[str]:
    """Modules outside CLIP's tower."""
    return [module.name for module in run.modules if not module.name.startswith("encoder.clip.visual")]


def in_two_parts(settings: Settings, out: Path, stop_after: int, quiet: Console) -> Run:
    """A run that is interrupted after a step, and resumed."""
    trainer = Trainer(settings, out, PROBES, [], quiet)
    step = trainer._step

    def then_stop(number: int, display: object) -> None:
        step(number, display)
        if number == stop_after:
            os.kill(os.getpid(), signal.SIGINT)

    trainer._step = then_stop
    assert trainer.run().status == "interrupted"
    return resume_training(out, console=quiet)


def measured(run: Run, name: str) -> dict[int, float]:
    """A series by step, without the steps where it is missing."""
    series = run.series(name)
    entries = zip(series.steps.tolist(), series.value.tolist(), series.missing.tolist(), strict=True)
    return {step: value for step, value, missing in entries if not missing}


def stages(run: Run) -> dict[str, int]:
    return {event.data["name"]: event.step for event in run.events if event.kind == "stage"}


def test_kept_tokens_change_no_weight_and_no_recorded_number(
    train: Train, tiny: Callable[..., Settings], quiet: Console, tmp_path: Path
) -> None:
    plain = train("bifusion", OFF, name="plain", probes=PROBES)
    assert len(measured(plain, "clip/tokens/norm_mean")) == 4
    assert_same_run(tmp_path, plain, train("bifusion", name="memory", probes=PROBES))
    # the first part fills the folder, the second finds it filled
    parts = in_two_parts(tiny("bifusion", OFF, FOLDER), tmp_path / "parts.json", 1, quiet)
    assert_same_run(tmp_path, plain, parts)
    warm = train("bifusion", FOLDER, name="warm", probes=PROBES)
    assert_same_run(tmp_path, plain, warm)
    # In the order of execution. The tower's own do not run in a warm run's steps: its first tokens are computed once
    # more, to see whether those in the folder hold, and that is for the picture of α before training.
    assert executed(warm) == executed(plain)
    assert {module.name for module in warm.modules} == {module.name for module in plain.modules}


@pytest.mark.parametrize("tune", [LORA, BLOCKS])
def test_what_is_tuned_of_clip_learns_in_s2_alone_and_resumes_to_the_bit(
    train: Train, tiny: Callable[..., Settings], quiet: Console, tmp_path: Path, tune: str
) -> None:
    settings = (tune, "optim.schedule=constant")
    run = train("bifusion", *settings, OFF, name="plain", steps=5, probes=PROBES)
    assert stages(run) == {"S0": 0, "S1": 1, "S2": 3}
    assert measured(run, "train/lr_clip") == pytest.approx({3: 2e-4, 4: 2e-4})
    end = tensors(tmp_path, "plain")
    learnt = {name.removesuffix("/step"): value for name, value in end.items() if name.endswith("/step")}
    learnt = {name.removeprefix("optimizer/"): count.item() for name, count in learnt.items() if "encoder.clip" in name}
    assert set(learnt.values()) == {2.0}  # AdamW's steps: those of S2
    assert all(".parametrizations." in name for name in learnt) == (tune == LORA)
    assert run.parameters["encoder.clip"]["trainable"] == sum(end[f"model/{name}"].numel() for name in learnt)
    assert not [name for name in end if name.startswith("model/encoder.clip.visual.conv1")]  # rebuilt, not stored
    parts = in_two_parts(tiny("bifusion", *settings, steps=5), tmp_path / "parts.json", 3, quiet)  # tokens are kept
    assert_same_run(tmp_path, run, parts)


def test_clip_is_in_no_group_where_it_never_learns(train: Train, tmp_path: Path) -> None:
    run = train("bifusion", steps=3)
    assert run.series("train/lr_clip") is None
    assert run.parameters["encoder.clip"]["trainable"] == 0
    assert not [name for name in tensors(tmp_path, "run") if "encoder.clip" in name]


def test_three_phases_give_clip_a_very_low_rate_and_then_the_full_one(
    train: Train, tiny: Callable[..., Settings], quiet: Console, tmp_path: Path
) -> None:
    settings = ("training.stages=three_phase", "optim.schedule=constant", "optim.clip_lr_scale=0.05", LORA)
    run = train("bifusion", *settings, name="plain", probes=("grads", *PROBES))
    assert stages(run) == {"P1": 0, "P2": 1, "P3": 2}
    assert measured(run, "train/lr_clip") == pytest.approx({1: 1e-5, 2: 2e-4, 3: 2e-4})
    assert measured(run, "train/lr") == pytest.approx(dict.fromkeys(range(4), 2e-4))
    frozen = {
        name.split("/")[1].split(".")[1]
        for name in run.names("grads/encoder.")
        if name.endswith("/state") and measured(run, name)[0] == 0
    }
    assert frozen == {"clip", "spatial_head", "global_head", "film", "geometry", "gate"}
    parts = in_two_parts(tiny("bifusion", *settings), tmp_path / "parts.json", 1, quiet)
    assert_same_weights(tmp_path, run, parts)


def test_a_cache_folder_that_cannot_be_used_ends_the_run_before_it_begins(
    tiny: Callable[..., Settings], quiet: Console, tmp_path: Path
) -> None:
    (tmp_path / "kept").write_text("a file")
    settings = tiny("bifusion", f"model.clip.cache_folder={tmp_path / 'kept'}")
    with pytest.raises(UserError, match=r"cache_folder: nothing can be kept in"):
        Trainer(settings, tmp_path / "run.json", [], [], quiet)
    assert not (tmp_path / "run.record").exists()
