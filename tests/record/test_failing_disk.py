"""A disk that is full, for real: a file system of a few kilobytes, or a limit on the size of files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bifusion_diag.record import RecordReader, RunHeader, RunWriter, TensorBoardSink, load_run

NAMES = [f"s{i}" for i in range(64)]


def values(step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(size=(32, 64)).astype("f4")


def check_rows(folder: Path, firsts: list[int]) -> None:
    """The record holds exactly these blocks, with their numbers."""
    reader = RecordReader(folder)
    assert reader.steps.tolist() == [first + i for first in firsts for i in range(32)]
    found, missing = reader.columns(NAMES)
    np.testing.assert_array_equal(found, np.concatenate([values(first) for first in firsts]))
    assert not missing.any()
    assert reader.truncated == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Fill the disk to its last byte."""
    path = folder / "ballast"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1000))
        except OSError:
            return path


def test_a_disk_that_fills_up_and_is_freed_again(small_disk: Path) -> None:
    writer = RunWriter(small_disk / "run.json", RunHeader("run"), tensorboard=TensorBoardSink(small_disk / "tb"))
    writer.append_block(np.arange(32), NAMES, values(0))
    writer.flush()
    ballast = fill(small_disk)
    refused = r"run\.record: cannot be written \(No space left on device\)"
    with pytest.warns(RuntimeWarning, match=refused) as warned:  # noqa: PT031
        for first in (32, 64, 96):
            writer.append_block(np.arange(first, first + 32), NAMES, values(first))
            writer.append_histogram("h", first, np.ones(500), np.arange(501))  # another file cannot even be begun
            writer.event(first, "note", "x" * 3000)
            writer.flush()
        writer.set_modules([])
        writer.flush()
    assert len(warned) == 1
    check_rows(writer.folder, [0])
    assert len(list(writer.folder.glob("*.arrow"))) == 1
    ballast.unlink()
    writer.append_block(np.arange(128, 160), NAMES, values(128))
    writer.finish("completed")
    check_rows(writer.folder, [0, 128])
    run = load_run(small_disk / "run.json")
    assert run.status == "completed"
    assert [event.step for event in run.events if event.kind == "note"] == [32, 64, 96]
    told = [event.message for event in run.events if event.kind == "record"]
    assert "96 rows of steps 32 to 127 were not recorded: the disk failed (No space left on device)" in told
    assert "TensorBoard events end here: No space left on device" in told


def test_a_disk_that_stays_full(small_disk: Path) -> None:
    writer = RunWriter(small_disk / "run.json", RunHeader("run"))
    with pytest.warns(RuntimeWarning) as warned, writer:  # noqa: PT031
        for first in range(0, 3200, 32):
            writer.append_block(np.arange(first, first + 32), NAMES, values(first))
    messages = [str(warning.message) for warning in warned]
    assert len(messages) == 2
    assert "cannot be written (No space left on device). Training goes on" in messages[0]
    assert f"The run can be read from {small_disk / 'run.record'}" in messages[1]
    assert not (small_disk / "run.json").exists()
    whole = len(RecordReader(writer.folder).steps) // 32
    assert whole > 10
    check_rows(writer.folder, [32 * i for i in range(whole)])
    assert load_run(writer.folder).names() == NAMES


LIMITED = """
import resource, sys, warnings
import numpy as np
from pathlib import Path
from bifusion_diag.record import RunHeader, RunWriter, TensorBoardSink

out = Path(sys.argv[1])
writer = RunWriter(out, RunHeader("run"), tensorboard=TensorBoardSink(out.with_name("tb")))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # no file may be larger
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with writer:
        for first in range(0, 320, 32):
            values = np.random.default_rng(first).normal(size=(32, 64)).astype("f4")
            writer.append_block(np.arange(first, first + 32), [f"s{i}" for i in range(64)], values)
            writer.event(first, "note", "x" * 3000)
for one in caught:
    print(one.category.__name__, one.message)
"""


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """Every file of the run meets it: blocks, events, TensorBoard, run.json. The program ends well."""
    out = tmp_path / "run.json"
    done = subprocess.run([sys.executable, "-c", LIMITED, str(out)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert "cannot be written (File too large). Training goes on" in lines[0]
    assert lines[1].startswith("RuntimeWarning")
    assert f"can be read from {tmp_path / 'run.record'}" in lines[1]
    assert done.stderr == ""
    check_rows(tmp_path / "run.record", [0, 32])
    assert load_run(tmp_path / "run.record").status == "completed"
