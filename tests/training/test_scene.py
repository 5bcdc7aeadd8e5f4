"""Snapshots of α in the course of training: of the right scene and moments, true, and without a trace."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from bifusion_diag.config import Settings
from bifusion_diag.diagnosis.quantity import NotMeasured
from bifusion_diag.probes import Monitor
from bifusion_diag.record import Run
from bifusion_diag.record.scenes import NO_VIEW
from bifusion_diag.reports.scene import scene_panel
from bifusion_diag.training import Trainer, resume_training
from bifusion_diag.training.evaluation import scene_alone, validation_source
from bifusion_diag.training.scene import END, RELEASED, START, SceneSnapshots

Make = Callable[..., Settings]
Train = Callable[..., Run]


def state(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(sorted((folder / f"{name}.checkpoints").glob("step-*"))[-1] / "state.safetensors")


def test_they_are_true_and_leave_no_trace_and_a_resumed_run_has_the_same(
    train: Train, tiny: Make, tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train("bifusion", name="with", probes=("gate",), steps=3)
    moments = [(one.done, one.moment) for one in run.snapshots]
    assert moments == [(0, START), (1, RELEASED), (3, END)]
    first, released, last = run.snapshots

    with monkeypatch.context() as patched:  # the same run without them
        patched.setattr(SceneSnapshots, "_take", lambda *_: None)
        plain = train("bifusion", name="plain", probes=("gate",), steps=3)
    assert plain.snapshots == ()
    left, right = state(tmp_path, "plain"), state(tmp_path, "with")  # weights, buffers, moments, random generators
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    for name in plain.names():
        if "seconds" not in name:
            one, other = plain.all_series[name], run.all_series[name]
            np.testing.assert_array_equal(one.value, other.value, err_msg=name)
    assert plain.events == run.events  # the flight recorder has seen nothing of them

    # a run that was interrupted, which took one then too, and resumed has the very same
    halves = Trainer(tiny("bifusion", steps=3), tmp_path / "halves.json", ["gate"], [], quiet)
    step = halves._step

    def interrupted(number: int, *rest: object) -> None:
        step(number, *rest)  # type: ignore[arg-type]
        if number == 1:
            halves.stop.received = signal.SIGINT

    halves._step = interrupted  # type: ignore[method-assign]
    part = halves.run()
    assert [(one.done, one.moment) for one in part.snapshots] == [(0, START), (1, RELEASED), (part.steps[-1] + 1, END)]
    resumed = resume_training(tmp_path / "halves.json", console=quiet)
    for mine, theirs in zip(run.snapshots, resumed.snapshots, strict=True):
        assert (mine.done, mine.moment, mine.numbers) == (theirs.done, theirs.moment, theirs.numbers)
        np.testing.assert_array_equal(mine.alpha, theirs.alpha)

    # α is what the gate's probe measures of the same forward
    settings = tiny("bifusion", steps=3)
    trainer = Trainer(settings, tmp_path / "again.json", [], [], quiet)
    trainer.writer.finish("interrupted")
    weights = {k.removeprefix("model/"): v for k, v in right.items() if k.startswith("model/")}
    trainer.model.load_state_dict(weights, strict=False)
    batch = scene_alone(validation_source(settings), 0, settings, settings.data.max_points)
    assert batch is not None
    trainer.model.eval()
    with Monitor(trainer.model, probes=["gate", "projection"]) as monitor:
        with monitor.step(batch), torch.no_grad():
            trainer.model.encoder(batch)
        monitor.end_step()
        measured = monitor.latest()
    numbers = last.numbers
    total = (numbers.mean_valid or 0) * numbers.valid
    total += (numbers.mean_invalid or 0) * (numbers.points - numbers.valid)
    assert total / numbers.points == pytest.approx(measured["gate/mean"], rel=1e-6)
    assert (numbers.points, numbers.valid) == (measured["projection/points"], measured["projection/valid"])
    assert first.numbers.mean_valid == 0.5  # held there until the gate is released
    assert first.numbers.std_valid == 0.0
    assert released.numbers.std_valid != 0.0

    # the kept points lie where K and the inverse of the pose put them
    scene = last.scene
    assert scene.provenance["split"] == "validation"
    assert "synthetic" in scene.provenance["kind"]
    for number, view in enumerate(scene.views):
        rows = scene.view == number
        assert rows.any()
        assert view.pose is not None
        assert view.intrinsics is not None
        world = np.concatenate([scene.xyz[rows], np.ones((rows.sum(), 1))], axis=1)
        camera = (np.linalg.inv(view.pose) @ world.T)[:3]
        u, v, w = view.intrinsics @ camera
        np.testing.assert_allclose(scene.uv[rows], np.stack([u / w, v / w], axis=1), atol=0.25)  # px; xyz is float16
        width, height = view.size
        assert (scene.uv[rows] > -0.6).all()
        assert (scene.uv[rows] < [width, height]).all()
        assert (np.diff(camera[2]) < 0.01).all()  # far ones first
    assert scene.valid[scene.view != NO_VIEW].mean() > 0.5


def test_where_there_is_none_the_reason_is_said(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(run: Run) -> str:
        assert run.snapshots == ()
        panel = scene_panel(run)
        assert isinstance(panel, NotMeasured)
        return panel.reason

    assert "has no gate: fusion 'none'" in reason(train("baseline-5cm", steps=1, probes=("gate",), name="baseline"))
    assert "no learned gate" in reason(train("bifusion-simple", steps=1, probes=("gate",), name="simple"))

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr("bifusion_diag.training.scene.take_snapshot", broken)
    with pytest.warns(RuntimeWarning, match=r"no picture of α before training: RuntimeError: no room\. Training"):
        run = train("bifusion", steps=1, probes=("gate",), name="broken")
    assert run.status == "completed"
    assert "no room" in reason(run)
