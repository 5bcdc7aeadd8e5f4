"""kill -9 at random moments: the record opens, holds true rows up to its last block, and the run resumes to its end.

Eighteen kills are of a loop whose steps take a millisecond, so that they meet blocks, checkpoints, resumes and
beginnings; two are of the command line.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from bifusion_diag.config import Settings
from bifusion_diag.record import RecordReader, Run, load_run
from bifusion_diag.training import resume_training
from bifusion_diag.training.checkpoint import checkpoint_folder, latest_checkpoint

KILLS = 18
STEPS = 240  # of the loop


class Server:
    """Starts trainings of the killable loop."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def train(self, out: Path, beats: int = -1, seconds: float = 0) -> bool:
        """Train; kill it so many seconds after so many steps. Whether it was killed before it ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{out} {beats} {seconds}\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        assert status in (0, signal.SIGKILL)
        return status != 0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Has trained a run that nobody killed."""
    whole = tmp_path / "whole" / "run.json"
    command = [sys.executable, str(Path(__file__).with_name("killable_loop.py")), str(whole)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Server(process)
        process.stdin.close()


def everything(folder: Path) -> tuple[list[int], list[str], np.ndarray, dict[int, list[float]]]:
    """All that a .record folder holds of its steps."""
    reader = RecordReader(folder)
    names = sorted(reader.names)
    values, missing = reader.columns(names)
    assert not missing.any()
    _, steps, counts = reader.histogram("gate/alpha") if reader.histogram_names else (None, np.zeros(0), np.zeros(0))
    return reader.steps.tolist(), names, values, dict(zip(steps.tolist(), counts.tolist(), strict=True))


def notes(run: Run) -> list[str]:
    return [event.message for event in run.events if event.kind == "note"]


@pytest.mark.slow
def test_a_loop_killed_at_random_moments(server: Server, tmp_path: Path) -> None:
    moments = random.Random(0)
    whole = tmp_path / "whole" / "run.json"
    steps, names, values, counts = everything(whole.with_name("run.record"))
    assert steps == list(range(STEPS))

    def check(folder: Path) -> None:
        """What is there is what was computed; everything before the latest checkpoint is there."""
        found, found_names, found_values, found_counts = everything(folder)
        assert found == list(range(len(found)))
        assert found_names in ([], names)
        if found:
            np.testing.assert_array_equal(found_values, values[: len(found)])
        assert found_counts == {step: row for step, row in counts.items() if step in found_counts}
        parent = checkpoint_folder(folder.with_name("run.json"))
        if any(parent.glob("step-*")):
            saved = latest_checkpoint(parent).step
            assert len(found) >= saved
            assert set(found_counts) >= {step for step in counts if step < saved}
        run = load_run(folder)
        # Killed between the header's last word and run.json, the record is complete.
        assert run.status == "running" or (run.status, found) == ("completed", steps)
        assert run.steps.tolist() == found
        assert notes(run) == [f"step {step}" for step in range(0, STEPS, 10)][: len(notes(run))]

    killed, lengths, number = 0, [], 0
    while killed < KILLS or number == 0:
        out = tmp_path / str(number) / "run.json"
        # From the first beat on, the record is there; a resume is also killed in its beginnings.
        while killed < KILLS and server.train(
            out, moments.randint(0 if out.parent.exists() else 1, STEPS // 2), moments.uniform(0, 0.01)
        ):
            killed += 1
            check(out.with_name("run.record"))
            lengths.append(len(RecordReader(out.with_name("run.record")).steps))
        if killed == KILLS:
            server.train(out)
        number += 1
        run = load_run(out)
        assert run.status == "completed"
        ended = everything(out.with_name("run.record"))
        assert (ended[0], ended[1], ended[3]) == (steps, names, counts)
        np.testing.assert_array_equal(ended[2], values)
        assert notes(run) == notes(load_run(whole))
        assert_same_weights(out, whole)
    assert len(set(lengths)) > KILLS // 3  # it was not always the same moment


def assert_same_weights(one: Path, other: Path) -> None:
    tensors = [
        load_file(latest_checkpoint(checkpoint_folder(out)).folder / "state.safetensors") for out in (one, other)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@pytest.mark.slow
def test_the_command_line_killed_twice(
    train: Callable[..., Run], tiny: Callable[..., Settings], quiet: Console, tmp_path: Path
) -> None:
    moments = random.Random(1)
    steps, every = 24, "training.checkpoint_every=2"
    whole = train("baseline-5cm", every, name="whole", steps=steps, probes=("grads",))
    out = tmp_path / "parts.json"
    (tmp_path / "settings.yaml").write_text(
        yaml.safe_dump(tiny("baseline-5cm", every, steps=steps).model_dump(mode="json")), encoding="utf-8"
    )
    first = ["--config", str(tmp_path / "settings.yaml"), "--probe", "grads"]
    for arguments in (first, ["--resume"]):
        saved = latest(out)
        command = [sys.executable, "-m", "bifusion_diag", "train", "--out", str(out), *arguments]
        with subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
            deadline = time.monotonic() + 60
            while latest(out) <= saved and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.3))
            process.kill()
        assert process.returncode == -signal.SIGKILL
        run = load_run(tmp_path / "parts.record")
        assert run.status == "running"
        assert len(run.steps) >= latest(out) > saved
        compare(run, whole, len(run.steps))
    run = resume_training(out, console=quiet)
    assert run.status == "completed"
    compare(run, whole, steps)
    assert_same_weights(out, tmp_path / "whole.json")


def latest(out: Path) -> int:
    found = [int(path.name.removeprefix("step-")) for path in checkpoint_folder(out).glob("step-*")]
    return max(found, default=0)


def compare(run: Run, whole: Run, rows: int) -> None:
    """The first rows are those of the run that nobody killed."""
    assert run.steps.tolist() == list(range(rows))
    assert set(run.names()) == set(whole.names())
    for name in whole.names():
        if "seconds" not in name:
            expected, found = whole.all_series[name], run.all_series[name]
            np.testing.assert_array_equal(found.value, expected.value[:rows], err_msg=name)
