"""Which of a run's files is read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bifusion_diag.diagnosis import load_measured, measure_record, measures_to_dict
from bifusion_diag.record import RecordReader, RunHeader, RunWriter, reduce


def recorded(path: Path, *, killed: bool = False) -> Path:
    """A run long enough to be reduced, with two bad steps."""
    steps = 3000
    norm = np.random.default_rng(0).lognormal(0, 0.3, steps)
    norm[[700, 1500]] = np.nan
    columns = {"loss/total": np.ones(steps), "train/grad_norm": norm}
    columns |= {f"extra/{number}": norm * number for number in range(160)}
    with RunWriter(path, RunHeader("run")) as writer:
        writer.append(np.arange(steps), columns)
        writer.flush()
        measures = measures_to_dict(measure_record(RecordReader(writer.folder)))
        writer.finish("completed", measures=measures)
    if killed:
        path.unlink()
        header = writer.folder / "header.json"
        header.write_text(json.dumps(json.loads(header.read_text()) | {"status": "running", "measures": {}}))
    return writer.folder


def test_the_folder_of_an_ended_run_is_read_by_the_run_json_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = recorded(tmp_path / "run.json")
    whole = load_measured(tmp_path / "run.json")

    def fail(*_: object) -> None:
        raise AssertionError("the whole record was reduced again")

    monkeypatch.setattr(reduce, "_reduce", fail)
    assert load_measured(folder).measures == whole.measures
    assert whole.measures["nonfinite"] == [700, 1500]


def test_the_run_json_of_another_run_is_not_taken_for_it(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "run.json")
    stored = json.loads((tmp_path / "run.json").read_text())
    stored["header"]["run_id"] = "another"
    stored["measures"]["nonfinite"] = []
    (tmp_path / "run.json").write_text(json.dumps(stored))
    assert load_measured(folder).measures["nonfinite"] == [700, 1500]
    (tmp_path / "run.json").write_text("{")
    assert load_measured(folder).measures["nonfinite"] == [700, 1500]


def test_a_killed_run_is_measured_from_its_folder(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "run.json", killed=True)
    assert not (tmp_path / "run.json").exists()
    assert load_measured(folder).measures["nonfinite"] == [700, 1500]


def test_a_record_is_reduced_alike_in_one_pass_or_in_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = recorded(tmp_path / "run.json", killed=True)
    _, text = reduce.reduce_record(RecordReader(folder))
    monkeypatch.setattr(reduce, "READ_BYTES", 5 * 3000 * 7)  # seven columns a read
    monkeypatch.setattr(reduce, "GROUP_BYTES", 4 * 3000 * 3)  # three of them at a time
    assert reduce.reduce_record(RecordReader(folder))[1] == text
