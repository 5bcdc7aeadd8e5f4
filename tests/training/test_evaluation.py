"""Evaluation in the course of training: on scenes of its own, at the right steps, and without a trace."""

from __future__ import annotations

import io
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from bifusion_diag.config import Settings
from bifusion_diag.data.synthetic import SyntheticRooms
from bifusion_diag.errors import UserError
from bifusion_diag.record import Run, load_run
from bifusion_diag.training import Trainer, resume_training
from bifusion_diag.training.evaluation import Evaluator, training_source, validation_source

Make = Callable[..., Settings]
Train = Callable[..., Run]
EVALUATED = ("evaluation.every=2", "evaluation.scenes=2")


def state(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Weights, buffers, the optimiser's moments and the random generators after the last step."""
    newest = sorted((folder / f"{name}.checkpoints").glob("step-*"))[-1]
    return load_file(newest / "state.safetensors")


def assert_same_state(folder: Path, one: str, other: str) -> None:
    left, right = state(folder, one), state(folder, other)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def recorded(run: Run, name: str) -> dict[int, float]:
    """The values of a series by step, without those that are missing."""
    series = run.series(name)
    assert series is not None
    there = series.missing == 0
    return dict(zip(series.steps[there].tolist(), series.value[there].tolist(), strict=True))


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    """Ten frames of a wall with a box before it."""
    folder = tmp_path / "capture"
    folder.mkdir()
    np.savetxt(folder / "camera-intrinsics.txt", [[30.0, 0, 16], [0, 30, 12], [0, 0, 1]])
    for number in range(10):
        depth = np.full((24, 32), 2000 + number, np.uint16)
        depth[10:18, 8:20] = 1500
        Image.fromarray(depth).save(folder / f"frame-{number:06d}.depth.png")
        Image.fromarray(np.full((24, 32, 3), 20 * number, np.uint8)).save(folder / f"frame-{number:06d}.color.jpg")
        np.savetxt(folder / f"frame-{number:06d}.pose.txt", np.eye(4))
    return folder


def test_no_validation_room_is_a_training_room_and_none_is_flawed(tiny: Make) -> None:
    settings = tiny("baseline-5cm", "data.flaws.far_outliers=1", "data.scenes=6", "evaluation.scenes=5")
    training, validation = training_source(settings), validation_source(settings)
    assert isinstance(training, SyntheticRooms)
    assert isinstance(validation, SyntheticRooms)
    assert (len(training), len(validation)) == (6, 5)

    def things(rooms: SyntheticRooms) -> set[str]:
        return {repr(rooms.room(index).things) for index in range(len(rooms))}

    assert things(training) == things(training)
    assert not things(training) & things(validation)
    assert training[0].notes
    assert not any(validation[index].notes for index in range(5))
    largest = tiny("baseline-5cm", f"training.seed={2**63 - 1}")
    other = validation_source(largest)
    assert np.array_equal(other[0].points, validation[0].points)  # every run is measured on the same rooms


def test_evaluation_leaves_no_trace_in_training(train: Train, tmp_path: Path) -> None:
    plain = train("bifusion", name="plain", probes=("all",))
    evaluated = train("bifusion", *EVALUATED, name="evaluated", probes=("all",))
    assert_same_state(tmp_path, "plain", "evaluated")
    assert set(evaluated.names()) - set(plain.names()) == set(evaluated.names("eval/"))
    for name in plain.names():
        if "seconds" not in name and not name.startswith("throughput/"):
            left, right = plain.all_series[name], evaluated.all_series[name]
            np.testing.assert_array_equal(left.value, right.value, err_msg=name)
    assert plain.events == evaluated.events


def test_metrics_stand_at_the_steps_whose_weights_they_are_of(
    train: Train, tiny: Make, tmp_path: Path, quiet: Console
) -> None:
    run = train("baseline-5cm", *EVALUATED, "evaluation.min_region=5", steps=3)
    shares = {"eval/miou", "eval/ap", "eval/ap50", "eval/ap25"}
    assert set(run.names("eval/")) == shares | {"eval/uniformity", "eval/seconds"}  # the baseline has no 2D features
    for name in run.names("eval/"):
        assert list(recorded(run, name)) == [0, 2], name  # 0 = untrained; 2, the last: after it, not before it
    assert all(0 <= value <= 1 for name in shares for value in recorded(run, name).values())
    assert run.header.unit("eval/seconds") == "s"
    # the untrained model, and the one that the run ended with, evaluated once more
    settings = tiny("baseline-5cm", *EVALUATED, "evaluation.min_region=5", steps=3)
    again = Trainer(settings, tmp_path / "again.json", [], [], quiet)
    assert again.evaluator is not None
    untrained = again.evaluator.evaluate(again.model, again.device)
    weights = {k.removeprefix("model/"): v for k, v in state(tmp_path, "run").items() if k.startswith("model/")}
    again.model.load_state_dict(weights)
    trained = again.evaluator.evaluate(again.model, again.device)
    again.writer.finish("interrupted")
    for name in (*shares, "eval/uniformity"):
        assert recorded(run, name)[0] == pytest.approx(untrained[name], rel=1e-6), name
        assert recorded(run, name)[2] == pytest.approx(trained[name], rel=1e-6), name
    assert trained["eval/uniformity"] != untrained["eval/uniformity"]


def test_the_fused_model_has_alignment_and_says_what_it_was_measured_on(train: Train) -> None:
    run = train("bifusion", *EVALUATED, steps=2)
    assert all(-1 <= value <= 1 for value in recorded(run, "eval/alignment").values())
    validation = run.provenance["validation"]
    assert validation["labels"] == "ground truth (synthetic)"
    assert (validation["kind"], validation["scenes"]) == ("synthetic rooms", 2)
    assert (validation["max_points"], validation["min_region"]) == (600, 3)  # 100 for 20,000 points
    assert "validation" not in train("baseline-5cm", name="without", steps=1).provenance


def test_a_resumed_run_has_the_metrics_of_one_that_was_never_interrupted_and_the_weights_of_one_never_evaluated(
    train: Train, tiny: Make, quiet: Console, tmp_path: Path
) -> None:
    train("baseline-5cm", name="plain")
    whole = train("baseline-5cm", *EVALUATED, name="whole")
    trainer = Trainer(tiny("baseline-5cm", *EVALUATED), tmp_path / "parts.json", [], [], quiet)
    assert trainer.evaluator is not None
    evaluate, calls = trainer.evaluator.evaluate, []

    def interrupted(*arguments: object) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:  # before step 2
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*arguments)  # type: ignore[arg-type]

    trainer.evaluator.evaluate = interrupted  # type: ignore[method-assign,assignment]
    first = trainer.run()
    assert (first.status, list(first.steps), list(recorded(first, "eval/miou"))) == ("interrupted", [0, 1], [0])
    second = resume_training(tmp_path / "parts.json", console=quiet)
    for name in ("eval/miou", "eval/ap", "eval/ap25", "eval/uniformity"):
        assert recorded(second, name) == recorded(whole, name)
        assert list(recorded(second, name)) == [0, 2, 3]
    assert_same_state(tmp_path, "plain", "whole")
    assert_same_state(tmp_path, "plain", "parts")


def test_a_signal_in_the_first_evaluation_ends_the_run_before_its_first_step(
    tiny: Make, quiet: Console, tmp_path: Path
) -> None:
    trainer = Trainer(tiny("baseline-5cm", *EVALUATED), tmp_path / "run.json", [], [], quiet)
    assert trainer.evaluator is not None
    batch = trainer.evaluator._batch

    def interrupted(index: int) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return batch(index)

    trainer.evaluator._batch = interrupted  # type: ignore[method-assign,assignment]
    assert trainer.run().status == "interrupted"
    assert len(load_run(tmp_path / "run.json").steps) == 0
    resumed = resume_training(tmp_path / "run.json", console=quiet)
    assert (resumed.status, list(recorded(resumed, "eval/miou"))) == ("completed", [0, 2, 3])


def test_a_folder_needs_scenes_to_evaluate_on(tiny: Make, capture: Path) -> None:
    on_folder = f"data.source={capture}"
    for source in ((), (f"evaluation.source={capture}/../capture",)):  # the training folder itself is no answer
        with pytest.raises(UserError, match=r"--val-data FOLDER.*evaluation\.holdout"):
            validation_source(tiny("baseline-5cm", on_folder, *EVALUATED, *source))
    with pytest.raises(UserError, match="keeps 10 of the 10 scenes"):
        training_source(tiny("baseline-5cm", on_folder, "evaluation.holdout=0.99"))
    with pytest.raises(UserError, match="no such folder"):
        validation_source(tiny("baseline-5cm", on_folder, "evaluation.source=nowhere"))


def test_held_out_frames_are_the_last_and_not_trained_on(tiny: Make, capture: Path) -> None:
    settings = tiny("baseline-5cm", f"data.source={capture}", "evaluation.holdout=0.3", "evaluation.scenes=2")
    training, validation = training_source(settings), validation_source(settings)
    names = [training[index].name for index in range(len(training))]
    kept = [validation[index].name for index in range(len(validation))]
    assert (len(names), kept) == (7, ["frame-000007", "frame-000009"])
    assert not set(names) & set(kept)
    assert training.describe()["scenes"] == 7
    everything = tiny("baseline-5cm", f"data.source={capture}", "evaluation.holdout=0.3")
    assert len(validation_source(everything)) == 3
    with pytest.raises(IndexError):
        validation[2]


def test_no_frame_is_in_a_held_out_scene_and_in_one_that_is_trained_on(tiny: Make, capture: Path) -> None:
    # of ten frames in fours, the last scene reaches back to two of the one before it
    views = ("data.views=4", f"data.source={capture}")
    settings = tiny("baseline-5cm", *views, "evaluation.holdout=0.1")
    training, validation = training_source(settings), validation_source(settings)
    assert [training[index].name for index in range(len(training))] == ["frame-000000..frame-000003"]
    assert [validation[index].name for index in range(len(validation))] == ["frame-000006..frame-000009"]
    with pytest.raises(UserError, match=r"no other scene is free of their frames.*data\.views"):
        training_source(tiny("baseline-5cm", "data.views=6", f"data.source={capture}", "evaluation.holdout=0.5"))


def test_the_scenes_that_were_chosen_are_recorded(tiny: Make, capture: Path) -> None:
    def chosen(*overrides: str) -> tuple[str, str]:
        settings = tiny("baseline-5cm", f"data.source={capture}", "evaluation.scenes=2", *overrides)
        return training_source(settings).describe()["chosen"], validation_source(settings).describe()["chosen"]

    assert chosen("evaluation.holdout=0.3") == ("0-6", "7, 9")
    assert chosen("evaluation.holdout=0.2") == ("0-7", "8-9")  # as many, and others


def test_what_decides_the_points_is_recorded(tiny: Make) -> None:
    def provenance(*overrides: str) -> dict[str, object]:
        settings = tiny("baseline-5cm", *EVALUATED, "evaluation.max_points=300", *overrides)
        return Evaluator(settings, validation_source(settings)).provenance()

    same = provenance()
    assert provenance("training.seed=5", "data.scenes=9", "data.flaws.far_outliers=1") == same
    for other in ("data.image_width=48", "data.max_points=500", "evaluation.max_points=200", "evaluation.scenes=1"):
        assert provenance(other) != same, other


def test_a_folder_to_evaluate_on_never_takes_the_masks_of_the_one_that_is_trained_on(
    tiny: Make, capture: Path, tmp_path: Path
) -> None:
    other, masks = tmp_path / "other", {name: tmp_path / name for name in ("masks", "other-masks")}
    shutil.copytree(capture, other)
    for folder, value in zip(masks.values(), (1, 2), strict=True):
        folder.mkdir()
        for number in range(10):
            picture = np.full((24, 32), value, np.uint8)
            picture[:, : 16 if value == 2 else 0] = 7
            Image.fromarray(picture).save(folder / f"frame-{number:06d}.png")
    options = ("data.superpoints=masks", f"data.masks={masks['masks']}", f"data.source={capture}")
    for source in (other, "synthetic"):
        with pytest.raises(UserError, match=r"holds the masks of .*evaluation\.masks=FOLDER"):
            validation_source(tiny("baseline-5cm", *options, f"evaluation.source={source}"))
    own = validation_source(
        tiny("baseline-5cm", *options, f"evaluation.source={other}", f"evaluation.masks={masks['other-masks']}")
    )
    assert str(masks["other-masks"]) in own.describe()["superpoints"]
    rooms = validation_source(
        tiny("baseline-5cm", *options, "evaluation.source=synthetic", "evaluation.masks=graph", "evaluation.scenes=1")
    )
    assert "graph-based" in rooms.describe()["superpoints"]
    held_out = validation_source(tiny("baseline-5cm", *options, "evaluation.holdout=0.2"))
    assert str(masks["masks"]) in held_out.describe()["superpoints"]


def test_another_folder_is_evaluated_on_and_its_labels_are_named(train: Train, capture: Path) -> None:
    run = train("baseline-5cm", f"evaluation.source={capture}", *EVALUATED, steps=2)
    assert run.provenance["labels"] == "ground truth (synthetic)"
    assert run.provenance["validation"]["folder"] == str(capture)
    assert "pseudo" in run.provenance["validation"]["labels"]
    assert list(recorded(run, "eval/miou")) == [0, 1]


def test_the_console_says_that_labels_are_pseudo_labels(tiny: Make, capture: Path, tmp_path: Path) -> None:
    said = []
    for name, source in (("rooms", ()), ("frames", (f"evaluation.source={capture}",))):
        console = Console(file=io.StringIO(), width=200)
        Trainer(tiny("baseline-5cm", *EVALUATED, *source, steps=1), tmp_path / f"{name}.json", [], [], console).run()
        said.append(console.file.getvalue())  # type: ignore[attr-defined]
    assert all("evaluated after 1 steps: mIoU" in each for each in said)
    assert ["against geometric pseudo-labels (no ground truth)" in each for each in said] == [False, True]


def test_scenes_without_points_are_passed_over_and_a_source_without_scenes_is_an_error(
    tiny: Make, capture: Path, quiet: Console, tmp_path: Path
) -> None:
    for number in range(1, 10):
        Image.fromarray(np.zeros((24, 32), np.uint16)).save(capture / f"frame-{number:06d}.depth.png")
    settings = tiny("baseline-5cm", f"evaluation.source={capture}", *EVALUATED)
    trainer = Trainer(settings, tmp_path / "run.json", [], [], quiet)
    assert trainer.evaluator is not None
    assert set(trainer.evaluator.evaluate(trainer.model, trainer.device)) == {"eval/seconds"}
    trainer.writer.finish("interrupted")
    whole = validation_source(tiny("baseline-5cm", *EVALUATED))
    with pytest.raises(UserError, match="no scenes to evaluate on"):
        Evaluator(settings, type("Nothing", (), {"__len__": lambda _: 0, "describe": whole.describe})())
