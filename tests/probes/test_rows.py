"""Rows against a dict a step: what is written when, and that the loop neither waits nor sees the writer's work."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import bifusion_diag.record.writer
from bifusion_diag.errors import UserError
from bifusion_diag.probes.base import Reading
from bifusion_diag.probes.rows import RowBlock, _together, pack
from bifusion_diag.record import RecordReader, Rows, RunHeader, RunWriter

EDGES = (0.0, 0.5, 1.0)


def test_a_block_is_written_when_it_is_full_or_old(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run.json", RunHeader("run")) as writer:
        patient = RowBlock(writer, size=3, seconds=1e9)
        for step in range(4):
            patient.add(pack(step, [], {"x": torch.tensor(1.0)}))
        writer.flush()  # of what was handed over
        assert RecordReader(writer.folder).steps.tolist() == [0, 1, 2]
        patient.flush()
        assert RecordReader(writer.folder).steps.tolist() == [0, 1, 2, 3]
        hasty = RowBlock(writer, size=1000, seconds=0.0)
        hasty.add(pack(4, [], {"x": 2.0}))
        writer.flush()
        assert RecordReader(writer.folder).steps.tolist() == [0, 1, 2, 3, 4]


def test_whoever_flushes_waits_for_a_slow_disk_and_loses_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bifusion_diag.record.writer, "MAX_WAITING", 1)
    with RunWriter(tmp_path / "run.json", RunHeader("run")) as writer:
        reached, go_on = threading.Event(), threading.Event()

        def stand() -> Rows:
            reached.set()
            assert go_on.wait(30)
            return _together([block._keep(pack(0, [], {"x": 0.0}))], [np.zeros(0, np.float32)])

        block = RowBlock(writer, size=1000, seconds=1e9)
        writer.append_later([0], 0, stand)
        assert reached.wait(10)
        writer.append_later([1], 1, lambda: _together([block._keep(pack(1, [], {"x": 1.0}))], [np.zeros(0, "f4")]))
        block.add(pack(2, [], {"x": 2.0}))
        threading.Timer(0.2, go_on.set).start()
        block.flush()  # the queue has no room for it yet
        assert RecordReader(writer.folder).steps.tolist() == [0, 1, 2]


def test_a_number_that_float32_cannot_hold_is_infinite(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run.json", RunHeader("run")) as writer:
        block = RowBlock(writer, size=1)
        block.add(pack(0, [], {"x": 1e39}))
        assert block.latest() == {"x": math.inf}
        writer.flush()
        assert RecordReader(writer.folder).column("x")[1].tolist() == [math.inf]


@pytest.mark.parametrize("size", [1, 7, 32])
def test_every_number_arrives_under_its_name(tmp_path: Path, size: int) -> None:
    """Readings come and go from step to step, some numbers are missing; the truth is one dict a step."""
    rng = np.random.default_rng(0)
    truth: list[dict[str, float]] = []
    counts: dict[int, list[float]] = {}
    with RunWriter(tmp_path / "run.json", RunHeader("run")) as writer:
        block = RowBlock(writer, size=size, seconds=1e9)
        for step in range(40):
            row: dict[str, float] = {}
            readings = []
            masked = rng.normal(size=3).astype("f4")
            gone = rng.random(3) < 0.3
            readings.append(Reading(("a", "b", "c"), torch.tensor(masked), missing=gone))
            row |= {name: v for name, v, g in zip("abc", masked.tolist(), gone, strict=True) if not g}
            if step % 3 == 0:
                counts[step] = rng.integers(0, 9, 2).astype(float).tolist()
                readings.append(Reading(("h",), torch.tensor(counts[step]), edges=EDGES))
            if step % 5 == 0:
                holes = rng.normal(size=2).astype("f4")
                holes[rng.random(2) < 0.5] = np.nan
                readings.append(Reading(("n0", "n1"), torch.tensor(holes), nan_is_missing=True))
                row |= {f"n{i}": v for i, v in enumerate(holes.tolist()) if not math.isnan(v)}
            if step % 4 == 0:  # here NaN is a value
                readings.append(Reading(("true",), torch.tensor([float("nan")])))
                row["true"] = float("nan")
            logs: dict[str, float | torch.Tensor] = {"lr": 0.1 * step, "norm": torch.tensor(float(step)).double()}
            if step == 11:
                logs["eval"] = 7.0
            row |= {name: float(np.float32(float(value))) for name, value in logs.items()}
            block.add(pack(step, readings, logs))
            assert {k: v for k, v in block.latest().items() if v is not None} == pytest.approx(row, nan_ok=True)
            truth.append(row)
        block.flush()
        reader = RecordReader(writer.folder)
        assert reader.steps.tolist() == list(range(40))
        names = sorted({name for row in truth for name in row})
        assert sorted(reader.names) == names
        values, missing = reader.columns(names)
        for step, row in enumerate(truth):
            found = {n: v for n, v, g in zip(names, values[step].tolist(), missing[step], strict=True) if not g}
            assert found == pytest.approx(row, rel=0, abs=0, nan_ok=True)
        edges, steps, table = reader.histogram("h")
        assert edges.tolist() == list(EDGES)
        assert dict(zip(steps.tolist(), table.tolist(), strict=True)) == counts


def test_a_name_that_occurs_twice_is_refused_at_its_step(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run.json", RunHeader("run")) as writer:
        block = RowBlock(writer, size=32)
        with pytest.raises(UserError, match=r"recorded twice in one step: a\. Use another name"):
            block.add(pack(0, [Reading(("a", "b"), torch.zeros(2))], {"a": 1.0}))


def test_the_loop_goes_on_while_the_writer_stands_still(tmp_path: Path) -> None:
    gate = threading.Event()

    def stand() -> Rows:
        assert gate.wait(30)
        return Rows(np.zeros(0, np.int64), [], np.zeros((0, 0), "f4"), np.zeros((0, 0), bool))

    with RunWriter(tmp_path / "run.json", RunHeader("run")) as writer:
        block = RowBlock(writer, size=4, seconds=1e9)
        writer.append_later([], 0, stand)
        for step in range(100):
            block.add(pack(step, [Reading(("a",), torch.tensor([float(step)]))], {}))
        assert RecordReader(writer.folder).steps.tolist() == []
        gate.set()
        block.flush()
        steps, values, _ = RecordReader(writer.folder).column("a")
        assert steps.tolist() == values.tolist() == list(range(100))


def test_without_a_writer_the_last_row_is_kept() -> None:
    block = RowBlock(None, size=2)
    assert block.latest() == {}
    for step in range(5):
        block.add(pack(step, [Reading(("a", "b"), torch.tensor([1.0 * step, math.nan]), nan_is_missing=True)], {}))
    block.flush()
    assert block.latest() == {"a": 4.0, "b": None}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_loop_never_waits_for_the_device(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run.json", RunHeader("run")) as writer:
        block = RowBlock(writer, size=4, seconds=1e9)
        rows = [torch.full((1000,), float(step), device="cuda") for step in range(16)]
        names = tuple(f"s{i}" for i in range(1000))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step, values in enumerate(rows):
                block.add(pack(step, [Reading(names, values)], {}))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        block.flush()
        values, missing = RecordReader(writer.folder).columns(names)
        assert not missing.any()
        np.testing.assert_array_equal(values, np.arange(16)[:, None] * np.ones(1000))
