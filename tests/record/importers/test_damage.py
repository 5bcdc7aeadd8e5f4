"""Whatever bytes a log is made of, it is read or refused in words."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from bifusion_diag.record import RecordError, load_run

ROWS = [
    {"lr": 1e-4, "loss": 1.0 + step, "inst_loss": 1.0, "grad_norm": 2.0, "epoch": 1, "iter": step, "step": step}
    for step in range(1, 60)
]
TEXT = "".join(
    f"2026/01/01 00:00:00 - mmengine - INFO - Epoch(train) [1][{row['iter']}/100]  lr: 1.0e-04  eta: 0:00:01  "
    f"grad_norm: 2.0  loss: {row['loss']}  inst_loss: 1.0\n"
    for row in ROWS
)
LOGS = {
    "scalars.json": "".join(json.dumps(row) + "\n" for row in ROWS),
    "a.log.json": "".join(json.dumps({"mode": "train", **row}) + "\n" for row in ROWS),
    "a.log": TEXT,
    "a.csv": "step,loss,grad_norm\n" + "".join(f"{row['step']},{row['loss']},2.0\n" for row in ROWS),
    "trainer_state.json": json.dumps({"log_history": ROWS, "max_steps": 60}, indent=2),
}


@pytest.mark.parametrize("name", LOGS)
def test_random_damage(tmp_path: Path, name: str) -> None:
    random = np.random.default_rng(0)
    whole = LOGS[name].encode()
    read = 0
    refused: list[str] = []
    for round in range(40):
        content = bytearray(whole)
        for _ in range(int(random.integers(1, 6))):
            start = int(random.integers(0, len(content)))
            length = int(random.integers(1, 80))
            piece = [random.bytes(length), b"\0" * length, b"", content[:length], b"[" * 3000, b"9" * 5000][round % 6]
            content[start : start + length] = piece
        path = tmp_path / name
        path.write_bytes(content)
        try:
            run = load_run(path)
        except RecordError as error:
            refused.append(str(error))
        else:
            read += 1
            assert len(run.steps) <= 200
    assert all(str(path) in message for message in refused)
    assert read >= 20 or name == "trainer_state.json", "most of a damaged log can be read"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("scalars.json", '{"step": 1, "loss": ' + '{"a":' * 200_000),
        ("scalars.json", "{" * 1_000_000),
        ("a.log", "Epoch(train) [1][1/2]  loss: " + "x" * 1_000_000),
        ("a.log", "Epoch(train) [1][1/2]  loss: 1 " + "a:" * 400_000),
        ("a.csv", "1," + "9" * 900_000),
    ],
)
def test_a_line_of_a_megabyte_takes_no_time(tmp_path: Path, name: str, line: str) -> None:
    path = tmp_path / name
    path.write_text(LOGS[name] + line + "\n")
    began = time.process_time()
    run = load_run(path)
    assert time.process_time() - began < 10
    assert len(run.steps) in (59, 60)


def test_what_cannot_be_read_in_a_folder_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "gone.csv").symlink_to(tmp_path / "nowhere.csv")
    os.mkfifo(tmp_path / "pipe.log")
    (tmp_path / "a.csv").write_text(LOGS["a.csv"])
    assert len(load_run(tmp_path).steps) == 59
    with pytest.raises(RecordError, match="cannot be read"):
        load_run(tmp_path / "pipe.log")
