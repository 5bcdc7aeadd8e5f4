"""Capsules of our own runs and of users' code, tried again: against loops written out by hand."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from bifusion_diag.config import load_settings
from bifusion_diag.data import Batch, BatchLoader
from bifusion_diag.errors import UserError
from bifusion_diag.experiments.courses import joined, patched, without
from bifusion_diag.experiments.what_if import (
    WhatIf,
    print_result,
    requested,
    resolve_key,
    save,
    to_dict,
    try_remedies,
    what_if_command,
)
from bifusion_diag.model.build import build_model
from bifusion_diag.record.incidents import read_incident_files
from bifusion_diag.replay.capsules.capsule import CapsuleWriter, read_capsule
from bifusion_diag.replay.capsules.execute import training_of
from bifusion_diag.replay.incident import Incident, SampleShare, Trigger
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Training
from bifusion_diag.replay.trials import remedies
from bifusion_diag.replay.trials.remedies import Action
from bifusion_diag.replay.trials.what_if import AS_IT_WAS, Trial
from bifusion_diag.training.determinism import make_deterministic
from bifusion_diag.training.evaluation import training_source
from bifusion_diag.training.faults import Faults
from bifusion_diag.training.optim import build_optimizer, learning_rate

AT, MORE = 2, 2
TINY = (
    "training.batch_size=2",
    "training.threads=1",
    "training.steps=20",
    "data.scenes=5",
    "data.max_points=300",
    "data.image_height=48",
    "data.image_width=64",
    "data.superpoint_size=0.5",
    "model.backbone.layers=[1, 1, 1, 1, 1, 1, 1, 1]",
    "model.decoder.layers=1",
)


@dataclass
class Ran:
    """A run up to some steps after the one of its capsule, from which on it may have had other settings."""

    capsule: Path
    losses: list[float]
    norms: list[float]
    batches: list[Batch]


def run_by_hand(
    folder: Path,
    *overrides: str,
    preset: str = "baseline-5cm",
    then: dict[str, Any] | None = None,
    sample: int | None = None,
    named: Sequence[str] = (),
    stored: dict[str, Any] | None = None,
) -> Ran:
    """Train step by step, write the capsule of step AT, and go on."""
    settings = load_settings(preset, scale="small", overrides=[*TINY, *overrides])
    training = settings.training
    make_deterministic(training.seed, training.threads)
    loader = BatchLoader(training_source(settings), settings.data, batch_size=training.batch_size, seed=training.seed)
    model = build_model(settings).train()
    optimizer = build_optimizer(model, settings.optim)
    faults = Faults(training.inject, model, optimizer, batch_size=training.batch_size)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    frozen = {name for name, parameter in model.named_parameters() if id(parameter) not in held}
    told = patched(settings, stored or {}).model_dump(mode="json")
    writer = CapsuleWriter(1, "2 GB", settings=told, state=None, rebuilt=frozenset(frozen))
    writer.open(model, folder)
    ran = Ran(folder, [], [], [])
    for step in range(AT + MORE + 1):
        if step == AT and then is not None:
            settings = patched(settings, then)
        model.set_progress(step, training.steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings.optim, step, training.steps)
        batch = faults.batch(step, loader.batch(step))
        with faults.context(step):
            if step == AT:
                shares = () if sample is None else (SampleShare(sample, batch.names[sample], "it is the one"),)
                trigger = Trigger("nonfinite-loss", "a loss term is NaN")
                incident = Incident(step, trigger.kind, (trigger,), samples=shares, remedies=tuple(named))
                notes = StepNotes(model, step, batch)
                path, note = writer.write(incident, Training(model, lambda b: model(b).loss, (optimizer,)), notes, None)
                assert path is not None, note
                ran.capsule = Path(path)
            loss = model(batch).loss
            loss.total.backward()
        faults.after_backward(step)
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        limit = settings.optim.clip_grad or float("inf")
        norm = float(nn.utils.clip_grad_norm_(parameters, limit))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ran.losses.append(float(loss.total.detach()))
        ran.norms.append(norm)
        ran.batches.append(batch)
    return ran


def by_name(result: WhatIf) -> dict[str, Trial]:
    return {trial.change.name: trial for trial in result.trials}


def test_a_trial_goes_on_as_the_run_with_other_settings_would_have(tmp_path: Path) -> None:
    stages = ("training.stages=none", "optim.schedule=poly")
    plain = run_by_hand(tmp_path / "plain", *stages)
    changed = {"optim.lr": 1e-3, "optim.clip_grad": 0.5}
    other = run_by_hand(tmp_path / "other", *stages, then=changed)
    assert other.losses[: AT + 1] == plain.losses[: AT + 1]
    assert other.losses[AT + 1 :] != plain.losses[AT + 1 :]
    asked = "optim.lr=1e-3 + clip_grad=0.5"
    result = try_remedies(read_capsule(plain.capsule), [asked, "score_head=false", "clip_grad=10"], steps=MORE)
    trials = by_name(result)
    for name, ran in ((AS_IT_WAS, plain), (asked, other)):
        steps = trials[name].steps
        assert [step.loss for step in steps] == ran.losses[AT:], name  # bit for bit
        assert [step.grad_norm for step in steps] == pytest.approx(ran.norms[AT:], rel=1e-6)  # theirs is in float32
    assert trials["clip_grad=10"].same  # what it was already
    assert trials["clip_grad=10"].loss == trials[AS_IT_WAS].loss
    assert not trials[asked].same
    assert (result.note, trials[AS_IT_WAS].cost) == ("", 1.0)


@pytest.fixture(scope="module")
def nan_scene(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """One scene of the step has a NaN."""
    folder = tmp_path_factory.mktemp("nan") / "run.incidents"
    return run_by_hand(folder, f"training.inject=[nan-color@{AT}:1]", sample=1, named=("drop-sample",))


def test_the_best_remedy_becomes_a_config_file(nan_scene: Ran) -> None:
    capsule = read_capsule(nan_scene.capsule)
    guilty = nan_scene.batches[AT].names[1]
    result = try_remedies(capsule, ["clip-grad", "skip-step", "drop-sample"], steps=MORE)
    trials = by_name(result)
    assert trials[AS_IT_WAS].nonfinite == MORE + 2  # every step, and the weights
    assert trials["clip-grad"].bad_state
    assert [step.finite for step in trials["skip-step"].steps] == [False, True, True]
    assert (trials["drop-sample"].nonfinite, trials["drop-sample"].bad_state) == (0, ())
    assert [trial.change.name for trial in result.helps] == ["drop-sample", "skip-step"]
    console = Console(file=io.StringIO(), width=200)
    print_result(console, result)
    assert f"--set 'data.exclude=[{guilty}]'" in console.file.getvalue()  # type: ignore[attr-defined]
    assert load_settings(overrides=[f"data.exclude=[{guilty}]"]).data.exclude == (guilty,)
    files = save(result)
    assert [file.name for file in files] == ["what_if.json", "remedy.yaml"]
    settings = load_settings("baseline-5cm", scale="small", config=files[1], overrides=list(TINY))
    assert settings.data.exclude == (guilty,)
    loader = BatchLoader(training_source(settings), settings.data, batch_size=2, seed=0)
    assert guilty not in {name for step in range(4) for name in loader.batch(step).names}
    stored = json.loads(files[0].read_text(), parse_constant=pytest.fail)
    assert stored["remedy"] == {"data.exclude": [guilty]}
    assert (stored["best"], stored["step"], stored["steps"]) == ("drop-sample", AT, MORE)
    shown = read_incident_files(nan_scene.capsule.parents[1] / "run.json")[AT].trials
    assert [(trial["name"], trial["helps"]) for trial in shown] == [
        ("drop-sample", True),
        ("skip-step", True),
        *((name, False) for name in (trial.change.name for trial in result.trials[2:])),
    ]
    assert shown[0]["result"] == "finite, no spike"
    assert shown[1]["result"] == "1 of 3 steps not finite, no spike"
    assert shown[-1]["grad_norm"] == "NaN"
    assert read_capsule(nan_scene.capsule).incident == capsule.incident  # the capsule is what it was


def test_where_nothing_helps_no_older_remedy_stays(nan_scene: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    remedy = nan_scene.capsule / "remedy.yaml"
    remedy.write_text("optim: {lr: 1}\n")
    console = Console(file=io.StringIO(), width=140)
    build: Any = None
    what_if_command(read_capsule(nan_scene.capsule), ["lower-lr"], steps=1, entry=None, build=build, console=console)
    assert not remedy.exists()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Nothing that was tried is better than the step as it was." in text
    assert "is not finite at the end" in text


def test_changes_that_the_weights_do_not_fit_are_not_tried(nan_scene: Ran) -> None:
    wanted = ["decoder.width=32", "training.seed=3", "training.batch_size=3", "temperature", "freeze-batchnorm"]
    result = try_remedies(read_capsule(nan_scene.capsule), [*wanted, "larger-batch"], steps=1)
    refused = {trial.change.name: trial.refused for trial in result.trials if trial.refused}
    assert refused["decoder.width=32"].startswith("the weights do not fit: decoder.")
    assert refused["training.seed=3"] == "training.seed has no part in a step that begins with the capsule's state"
    assert refused["training.batch_size=3"] == "the capsule's batch can be made a multiple of itself, and 1.5 is none"
    assert refused["temperature"] == "nothing is aligned with CLIP"
    assert {one["name"] for one in to_dict(result)["not_tried"]} == set(refused)
    tried = by_name(result)
    assert tried["larger-batch"].steps[0].loss is not None
    assert tried["larger-batch"].error == ""
    assert tried["freeze-batchnorm"].change.code  # no setting does it
    assert result.remedy is None


def test_data_that_is_not_there_any_more_is_said(tmp_path: Path) -> None:
    ran = run_by_hand(tmp_path / "run", stored={"data.scenes": 4})
    result = try_remedies(read_capsule(ran.capsule), ["lower-lr"], steps=1)
    assert "the capsule's batch is used in every step" in result.note
    assert by_name(result)[AS_IT_WAS].steps[0].loss == ran.losses[AT]


def test_changed_data_is_served_from_the_bad_step_on(nan_scene: Ran) -> None:
    result = try_remedies(read_capsule(nan_scene.capsule), ["data.max_points=200"], steps=1)
    trial = by_name(result)["data.max_points=200"]
    assert trial.refused == trial.error == ""
    assert trial.steps[0].finite  # the run's data, in which nothing was injected
    assert all(one.steps[0].loss != trial.steps[0].loss for one in result.trials if one is not trial)


def test_joined_batches_are_those_of_a_larger_batch() -> None:
    settings = load_settings("baseline-5cm", scale="small", overrides=list(TINY))
    source = training_source(settings)
    whole = BatchLoader(source, settings.data, batch_size=4, seed=0).batch(1)
    parts = [BatchLoader(source, settings.data, batch_size=2, seed=0, rank=r, ranks=2).batch(1) for r in range(2)]
    found = joined(parts)
    for name, value in vars(whole).items():
        mine = getattr(found, name)
        assert torch.equal(mine, value) if isinstance(value, torch.Tensor) else mine == value, name
    rest = without(found, [whole.names[1]])
    assert rest is not None
    assert rest.names == tuple(name for name in whole.names if name != whole.names[1])
    assert without(found, whole.names) is None
    assert without(found, ["another"]) is found


# --- what is asked for


def stored(preset: str = "bifusion-fragile") -> remedies.Settings:
    return remedies.Settings(load_settings(preset).model_dump(mode="json"))


INCIDENT = Incident(3, "nonfinite-loss", (Trigger("nonfinite-loss", "x"),), remedies=("empty-match-zero", "by-hand"))


@pytest.mark.parametrize(
    ("short", "key"),
    [
        ("losses.clip_align.weight", "losses.clip_align.weight"),
        ("clip_align.weight", "losses.clip_align.weight"),
        ("clip_grad", "optim.clip_grad"),
        ("sanitize", "model.projection.sanitize"),
        ("data.scenes", "data.scenes"),
    ],
)
def test_a_key_may_be_shortened(short: str, key: str) -> None:
    assert resolve_key(short) == key


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("clip_aling.weight=0", r"no setting is called 'clip_aling.weight'. Did you mean 'clip_align.weight'"),
        ("weight=0", r"'weight' is short for several settings: losses.semantic.weight, losses.instance.weight, "),
        ("isolate-clpi", r"takes key=value, a remedy's id, or auto; got 'isolate-clpi'. Did you mean 'isolate-clip'"),
        ("lr=[1", r"cannot read the value"),
    ],
)
def test_what_cannot_be_asked_for(wanted: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        requested([wanted], stored(), INCIDENT)


def test_a_value_that_a_setting_cannot_have_is_bad_input(nan_scene: Ran) -> None:
    with pytest.raises(UserError, match=r"optim\.lr"):
        try_remedies(read_capsule(nan_scene.capsule), ["optim.lr=-1"])
    with pytest.raises(UserError, match="--what-if-steps 0"):
        try_remedies(read_capsule(nan_scene.capsule), ["auto"], steps=0)


def test_auto_is_what_the_incident_names_then_the_documents_remedies_that_apply() -> None:
    changes = requested(["auto", "clip-grad", "clip_align.weight=0 + optim.clip_grad=1.0"], stored(), INCIDENT)
    names = [change.name for change in changes]
    assert names[0] == "empty-match-zero"
    assert set(names[:-1]) == {one.id for one in remedies.REMEDIES.values() if one.documented}  # clip-grad once
    last = changes[-1]
    assert (last.patch, last.size) == ({"losses.clip_align.weight": 0, "optim.clip_grad": 1.0}, 2)
    refused = {change.name for change in changes if change.refused}
    assert refused == {"drop-sample"}
    baseline = {change.name for change in requested(["auto"], stored("baseline"), INCIDENT) if not change.refused}
    assert baseline == {"clip-grad", "lower-lr", "skip-step"}
    user = {change.name: change for change in requested(["auto"], remedies.Settings(), INCIDENT, ("mine",))}
    assert {name for name, change in user.items() if not change.refused} == {
        "clip-grad",
        "lower-lr",
        "skip-step",
        "mine",
    }
    assert user["clip-grad"].action == Action(clip=1.0)


# --- users' code

USER_CODE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.floor = 0.0
        self.layer = nn.Linear(3, 1)

    def forward(self, batch):
        inputs, targets = batch
        return (self.layer(inputs.clamp(min=self.floor).log()).squeeze(1) - targets).square().mean()


def build(settings):
    net = Net()
    return net, lambda batch: net(batch), torch.optim.SGD(net.parameters(), lr=settings["lr"])


def _floor(training):
    training.model.floor = 0.1


def remedies():
    return {"a floor of 0.1": _floor}
"""
WITH_BATCHES = """

def batches(step):
    drawn = torch.Generator().manual_seed(step)
    return torch.rand(4, 3, generator=drawn) + 0.5, torch.rand(4, generator=drawn)
"""


@pytest.mark.parametrize("given", [False, True])
def test_users_code_is_tried_with_changes_of_the_update_and_its_own(given: bool, tmp_path: Path) -> None:
    name = f"net_of_a_user_{given:d}"
    Path(f"{name}.py").write_text(USER_CODE + WITH_BATCHES * given)
    entry = f"{name}.py:build"
    torch.manual_seed(3)
    scope: dict[str, Any] = {}
    exec(compile(USER_CODE, name, "exec"), scope)
    net, step, optimizer = scope["build"]({"lr": 0.1})
    inputs, targets = torch.rand(4, 3) + 0.5, torch.rand(4)
    inputs[2, 1] = 0.0  # its logarithm is −∞
    writer = CapsuleWriter(1, "2 GB", settings={"lr": 0.1}, state=None, rebuilt=frozenset())
    writer.open(net, tmp_path / "run.incidents")
    shares = (SampleShare(2, None, "its loss is not finite"),)
    incident = Incident(7, "nonfinite-loss", (Trigger("nonfinite-loss", "infinite"),), samples=shares)
    start = [parameter.detach().clone() for parameter in net.parameters()]
    path, note = writer.write(incident, Training(net, step, (optimizer,)), StepNotes(net, 7, (inputs, targets)), None)
    assert path is not None, note
    capsule = read_capsule(path)
    console = Console(file=io.StringIO(), width=200)
    what_if_command(capsule, ["auto"], steps=3, entry=entry, build=lambda: training_of(entry, capsule), console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    stored = json.loads((Path(path) / "what_if.json").read_text())
    trials = {trial["name"]: trial for trial in stored["trials"]}
    assert ("the capsule's batch is used in every step" in text) is not given
    assert not (Path(path) / "remedy.yaml").exists()  # no settings of ours
    assert trials["as it was"]["nonfinite"] == 5
    assert trials["clip-grad"]["helps"] is False
    assert trials["a floor of 0.1"]["nonfinite"] == trials["drop-sample"]["nonfinite"] == 0
    assert {name for name, trial in trials.items() if trial["helps"]} >= {"a floor of 0.1", "drop-sample"}
    # the same by hand: the sample dropped, gradient descent, then the next batches or the same one again
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), start, strict=True):
            parameter.copy_(value)
    kept = [0, 1, 3]
    losses = []
    if given:
        exec(compile(WITH_BATCHES, name, "exec"), scope)
    for ahead in range(4):
        batch = scope["batches"](7 + ahead) if given and ahead else (inputs[kept], targets[kept])
        optimizer.zero_grad()
        loss = step(batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert [one["loss"] for one in trials["drop-sample"]["steps"]] == pytest.approx(losses, rel=1e-6)
    judged = [scope["batches"](7 + 4 + place) for place in range(3)] if given else [(inputs[kept], targets[kept])]
    expected = sum(float(step(batch).detach()) for batch in judged) / len(judged)
    assert trials["drop-sample"]["loss"] == pytest.approx(expected, rel=1e-6)


def test_a_setting_of_users_code_is_not_known_here() -> None:
    with pytest.raises(UserError, match="the settings of your own code are not known here"):
        requested(["lr=1"], remedies.Settings(), INCIDENT)
