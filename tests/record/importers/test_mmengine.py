"""Work dirs that MMEngine's own Runner wrote are read as what happened in them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mmengine.runner", reason="or one of its libraries", exc_type=ImportError)

from real_logs import EPOCHS, PER_EPOCH, WINDOW, Truth, smoothed, train_mmengine

from bifusion_diag.record import Run, load_run
from bifusion_diag.record.importers import read_source
from bifusion_diag.record.schema import RecordError

NAN_AT = 17
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    """One iteration's inst_loss is NaN; means of ten, written at every iteration."""
    folder = tmp_path_factory.mktemp("logs") / "esam_like"
    return folder, train_mmengine(folder, nan_at=NAN_AT)


def values(run: Run, name: str) -> np.ndarray:
    series = run.series(name)
    assert series is not None, f"{name} is not there; there are {run.names()}"
    return series.value


def test_scalars_are_the_means_that_mmengine_logs(work_dir: tuple[Path, Truth]) -> None:
    folder, truth = work_dir
    run = load_run(folder)
    np.testing.assert_array_equal(run.steps, np.arange(1, EPOCHS * PER_EPOCH + 1))
    assert run.status == "completed"
    assert run.header.name == "esam_like"
    for ours, theirs in {
        "loss/total": "loss", "loss/seg_loss/raw": "seg_loss", "loss/inst_loss/weighted": "inst_loss"
    }.items():  # fmt: skip
        np.testing.assert_allclose(values(run, ours), smoothed(truth[theirs]), rtol=1e-5)
    assert np.isfinite(values(run, "train/grad_norm")).all(), "the bad term has no gradient"
    np.testing.assert_allclose(values(run, "train/lr"), 0.01)
    miou = run.series("eval/miou")
    assert miou is not None
    np.testing.assert_array_equal(miou.steps[miou.missing == 0], PER_EPOCH * np.arange(1, EPOCHS + 1))
    np.testing.assert_array_equal(miou.value[miou.missing == 0], [0.5] * EPOCHS)
    assert run.series("eval/recall") is not None


def test_one_bad_step_that_shows_ten_times_is_told_as_one(work_dir: tuple[Path, Truth]) -> None:
    folder, truth = work_dir
    assert np.flatnonzero(np.isnan(truth["loss"])).tolist() == [NAN_AT - 1], "the fixture has one bad step"
    run = load_run(folder)
    assert np.isnan(values(run, "loss/total")).sum() == WINDOW
    imported = run.provenance["imported"]
    assert imported["smoothing"] == WINDOW
    assert imported["interval"] == 1
    assert imported["nonfinite"] == {"logged": WINDOW, "at_least": 1, "at_most": 1, "steps": [NAN_AT]}
    assert any(event.kind == "import" and "1 step was not finite (17)" in event.message for event in run.events)


def test_settings_environment_and_provenance(work_dir: tuple[Path, Truth]) -> None:
    import torch

    run = load_run(work_dir[0])
    assert run.settings["log_processor"]["window_size"] == WINDOW
    assert run.settings["seed"] == 3
    assert run.environment["packages"]["torch"] == torch.__version__
    assert run.header.steps_planned == EPOCHS * PER_EPOCH
    imported = run.provenance["imported"]
    assert imported["renamed"]["inst_loss"] == "loss/inst_loss/raw"
    assert imported["grad_norm"].startswith("before clipping")
    assert "val/time" in imported["ignored"]
    assert any("clip_coefficient" in gap for gap in imported["not_measured"])


def test_the_text_log_says_the_same_in_four_decimals(work_dir: tuple[Path, Truth]) -> None:
    folder, _ = work_dir
    (text,) = folder.glob("*/*.log")
    whole, rounded = load_run(folder), load_run(text)
    for name in ("loss/total", "loss/seg_loss/raw", "train/grad_norm", "train/lr"):
        np.testing.assert_allclose(values(rounded, name), values(whole, name), atol=6e-5)
    np.testing.assert_array_equal(values(rounded, "eval/ap50"), values(whole, "eval/ap50"))
    assert rounded.provenance["imported"]["nonfinite"] == whole.provenance["imported"]["nonfinite"]


@pytest.mark.parametrize("what", ["{ts}", "{ts}/vis_data", "{ts}/vis_data/scalars.json", "{ts}/vis_data/{ts}.json"])
def test_any_part_of_a_work_dir_can_be_given(work_dir: tuple[Path, Truth], what: str) -> None:
    folder, _ = work_dir
    (stamp,) = (path.name for path in folder.iterdir() if path.is_dir())
    part, whole = load_run(folder / what.format(ts=stamp)), load_run(folder)
    np.testing.assert_array_equal(values(part, "loss/total"), values(whole, "loss/total"))
    np.testing.assert_array_equal(values(part, "eval/miou"), values(whole, "eval/miou"))
    assert part.provenance["imported"]["smoothing"] == WINDOW


def test_a_resumed_run_is_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # MMEngine's own checkpoint, of a minute ago
    folder = tmp_path / "resumed"
    first = train_mmengine(folder)
    (folder / "last_checkpoint").write_text(str(folder / "epoch_2.pth"))
    time.sleep(1.1)  # the folder's name is the second
    again = train_mmengine(folder, resume=True, interval=5)
    assert len(again["loss"]) == 2 * PER_EPOCH
    run = load_run(folder)
    begun = 2 * PER_EPOCH + 5
    assert [(event.step, event.data["anew"]) for event in run.events if event.kind == "resume"] == [(begun, False)]
    logged = [25, 26, 27, 28, 29, 34, 36, 41, 46, 48]  # the last ones by interval 5, and validations at 36 and 48
    assert run.steps.tolist() == [*range(1, 25), *logged]
    total = run.series("loss/total")
    assert total is not None
    there = dict(zip(total.steps[total.missing == 0].tolist(), total.value[total.missing == 0], strict=True))
    np.testing.assert_allclose([there[step] for step in range(1, 29)], smoothed(first["loss"])[:28], rtol=1e-5)
    joined = smoothed(first["loss"][:24] + again["loss"])
    np.testing.assert_allclose([there[step] for step in (34, 41, 46)], joined[[33, 40, 45]], rtol=1e-5)


def test_a_run_that_began_anew_leaves_out_what_was_before(work_dir: tuple[Path, Truth], tmp_path: Path) -> None:
    row = {"lr": 0.1, "loss": 1.0, "epoch": 1, "iter": 1, "step": 1}
    for stamp, rows in (("20260101_000000", 30), ("20260102_000000", 5)):
        folder = tmp_path / "work" / stamp / "vis_data"
        folder.mkdir(parents=True)
        lines = [json.dumps({**row, "iter": step, "step": step, "loss": rows}) for step in range(1, rows + 1)]
        (folder / "scalars.json").write_text("\n".join(lines) + "\n")
    run = load_run(tmp_path / "work")
    assert run.steps.tolist() == [1, 2, 3, 4, 5]
    assert set(values(run, "loss/total")) == {5.0}
    assert any("began anew" in event.message for event in run.events)
    assert len(load_run(tmp_path / "work" / "20260101_000000").steps) == 30
    other = tmp_path / "other" / "20260101_000000" / "vis_data"
    other.mkdir(parents=True)
    (other / "scalars.json").write_text(json.dumps(row))
    with pytest.raises(RecordError, match=r"2 runs are in it. Give one of them:\n.*other\n.*work"):
        load_run(tmp_path)


def test_broken_lines_are_left_out_and_counted(work_dir: tuple[Path, Truth], tmp_path: Path) -> None:
    folder, _ = work_dir
    (scalars,) = folder.glob("*/vis_data/scalars.json")
    lines = scalars.read_bytes().splitlines()
    lines[5] = b"\0" * 300 + lines[5]  # a hole that a full disk left: the row behind it is whole
    lines[8] = lines[8] + lines[9]  # two writers
    del lines[9]
    lines[20] = lines[20][: len(lines[20]) // 2] + lines[21]  # one wrote into the other's line
    del lines[21]
    lines += [b"\xff\xfe garbage", b"[1, 2]", b"[" * 100_000, lines[-1][:40]]  # the last was being written when killed
    damaged = tmp_path / "20260101_000000" / "vis_data" / "scalars.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"\n".join(lines))
    run, whole = load_run(tmp_path), load_run(scalars)
    lost = set(whole.steps.tolist()) - set(run.steps.tolist())
    assert len(lost) == 1
    total, before = run.series("loss/total"), whole.series("loss/total")
    assert total is not None
    assert before is not None
    kept = np.isin(before.steps, total.steps)
    np.testing.assert_array_equal(total.value, before.value[kept])
    assert run.provenance["imported"]["skipped"] == 6


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ("log_processor = dict(type='LogProcessor', window_size=50)", 50),
        ("log_processor = dict(window_size=5, custom_cfg=[dict(data_src='loss', window_size=100)])", 5),
        ("log_processor = dict(by_epoch=False)", 10),
        ("import os; os.system('touch ran')\nlog_processor = dict(window_size=__import__('os').getpid())", 10),
        ("log_processor = (", 10),
    ],
)
def test_the_window_is_read_from_the_configuration_and_nothing_is_run(tmp_path: Path, config: str, window: int) -> None:
    folder = tmp_path / "20260101_000000" / "vis_data"
    folder.mkdir(parents=True)
    rows = [{"lr": 0.1, "loss": 1.0, "loss_a": 1.0, "iter": 50 * k, "step": 50 * k} for k in range(1, 9)]
    (folder / "scalars.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "config.py").write_text(config)
    imported = read_source(tmp_path).state.header.provenance["imported"]
    assert imported["smoothing"] == window
    assert imported["interval"] == 50
    assert not Path("ran").exists()
    assert imported.get("smoothing_of", {}) == ({"loss/total": 100} if "custom" in config else {})
    if window < 50:
        assert any(f"the other {50 - window} is not in the log" in note for note in imported["notes"])
