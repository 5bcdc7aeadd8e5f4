"""TensorBoard files read back with TensorBoard's own reader, and the environment against the interpreter."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bifusion_diag.record import RunHeader, RunWriter, TensorBoardSink, collect_environment

EDGES = np.linspace(0, 1, 5)


def record(folder: Path, sink: TensorBoardSink) -> None:
    with RunWriter(folder / "run.json", RunHeader("n"), tensorboard=sink) as writer:
        writer.append([0, 1, 2], {"loss/total": [1, np.nan, 3], "grads/a/state": [1, 2, 3]}, {"loss/total": [0, 0, 1]})
        writer.append_histogram("gate/alpha", [1, 2], [[9, 9, 9, 9], [0, 2, 3, 0]], EDGES)


def test_a_resumed_run_voids_the_steps_that_it_repeats(tmp_path: Path) -> None:
    def write(steps: list[int], value: float, *, resume_at: int | None) -> None:
        sink = TensorBoardSink(tmp_path / "tb")
        with RunWriter(tmp_path / "run.json", RunHeader("n"), resume_at=resume_at, tensorboard=sink) as writer:
            for step in steps:
                writer.append([step], {"loss/total": [value], "grads/a/state": [value]})

    write([0, 1, 2, 3], 1.0, resume_at=None)
    write([2, 3, 4], 2.0, resume_at=2)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    for name in ("loss/total", "grads/a/state"):
        assert [(event.step, event.value) for event in events.Scalars(name)] == [(0, 1), (1, 1), (2, 2), (3, 2), (4, 2)]


def test_events_hold_the_same_numbers(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path / "tb")
    for _ in range(2):  # the second run replaces the first
        record(tmp_path, sink)
    sink.close()
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    total = events.Scalars("loss/total")
    assert [event.step for event in total] == [0, 1]  # the missing one is absent
    np.testing.assert_array_equal([event.value for event in total], [1, np.nan])
    assert [(event.step, event.value) for event in events.Scalars("grads/a/state")] == [(2, 3.0)]  # once a block
    (histogram,) = events.Histograms("gate/alpha")
    assert histogram.step == 2
    value = histogram.histogram_value
    assert (value.num, value.min, value.max) == (5, 0.25, 0.75)
    np.testing.assert_allclose(value.bucket_limit, EDGES[1:])
    np.testing.assert_allclose(value.bucket, [0, 2, 3, 0])
    assert value.sum == pytest.approx(2 * 0.375 + 3 * 0.625)


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    result = subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True)
    return result.stdout.strip()


def test_environment(tmp_path: Path) -> None:
    found = collect_environment(tmp_path)
    assert found["python"] == platform.python_version()
    assert found["packages"]["numpy"] == np.__version__
    assert found["git"] is None
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-q", "-m", "a")
    assert collect_environment(tmp_path)["git"] == {"commit": git(tmp_path, "rev-parse", "HEAD"), "modified": False}
    (tmp_path / "a").write_text("2")
    assert collect_environment(tmp_path)["git"]["modified"] is True


def test_tensorboard_files_of_a_resumed_run_are_kept(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path / "tb")
    record(tmp_path, sink)
    with RunWriter(tmp_path / "run.json", RunHeader("n"), resume_at=1, tensorboard=sink) as writer:
        writer.append([3], {"loss/total": [4.0]})
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    # files of one second are read in the order of a counter in their names, as text: 10 before 9
    assert sorted(event.step for event in events.Scalars("loss/total")) == [0, 1, 3]
