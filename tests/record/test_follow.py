"""Following a record that is being written, against the reader of whole records."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bifusion_diag.errors import UserError
from bifusion_diag.record import RecordError, RecordFollower, RecordReader, RunHeader, RunWriter
from bifusion_diag.record.blocks import Block
from bifusion_diag.record.follow import document_of, find_record
from bifusion_diag.record.reader import read_events

RNG = np.random.default_rng(0)


def start(path: Path, run_id: str = "a", **options: int) -> RunWriter:
    return RunWriter(path, RunHeader(name="run", run_id=run_id, steps_planned=1000), **options)  # type: ignore[arg-type]


def add(writer: RunWriter, first: int, end: int, names: tuple[str, ...] = ("x", "y"), block: int = 8) -> None:
    for begin in range(first, end, block):
        rows = np.arange(begin, min(begin + block, end))
        values = RNG.normal(size=(len(rows), len(names))).astype(np.float32)
        values[rows % 7 == 3, 0] = np.nan
        writer.append_block(rows, names, values, RNG.random(values.shape) < 0.2)
    writer.flush()


def note(writer: RunWriter, step: int, message: str = "high") -> None:
    writer.event(step, "spike", message, scenes=["room"])
    writer.flush()


def assert_same(follower: RecordFollower) -> None:
    """The follower holds what the reader of the whole record gives, of the newest steps."""
    reader = RecordReader(follower.folder)
    values, missing = reader.columns(reader.names)
    kept = slice(-follower.window, None)
    assert follower.names == reader.names
    np.testing.assert_array_equal(follower.steps, reader.steps[kept])
    np.testing.assert_array_equal(follower.missing, missing[kept])
    np.testing.assert_array_equal(follower.values, np.where(missing, np.nan, values)[kept])
    events = read_events(follower.folder)
    assert list(follower.events) == events
    for kind in {event.kind for event in events}:
        assert follower.count(kind) == sum(event.kind == kind for event in events)


@pytest.mark.parametrize("window", [20, 1000])
def test_follows_rows_new_series_and_events_as_they_are_written(tmp_path: Path, window: int) -> None:
    writer = start(tmp_path / "run.json")
    follower = RecordFollower(tmp_path / "run.record", window)
    assert (follower.status, len(follower.steps), follower.written) == ("running", 0, None)
    add(writer, 0, 30)
    assert follower.poll()
    assert_same(follower)
    assert not follower.poll()
    note(writer, 30)
    add(writer, 30, 41, ("x", "late"))  # begins another file
    writer.append_histogram("gate/alpha", [40], [[1, 2]], [0, 0.5, 1])
    writer.flush()
    assert follower.poll()
    assert_same(follower)
    add(writer, 35, 38)  # steps that are written again
    follower.poll()
    assert_same(follower)
    writer.finish("completed")
    assert follower.poll()
    assert follower.status == "completed"
    assert_same(follower)
    assert_same(RecordFollower(tmp_path / "run.record", window))  # joined late: the same


def test_a_block_that_is_cut_off_is_taken_once_it_is_whole(tmp_path: Path) -> None:
    writer = start(tmp_path / "run.json")
    add(writer, 0, 24)
    writer.finish("completed")
    blocks = tmp_path / "run.record" / "000000-series.arrow"
    content = blocks.read_bytes()
    blocks.unlink()
    follower = RecordFollower(tmp_path / "run.record", 100)
    seen = []
    with blocks.open("wb") as file:
        for begin in range(0, len(content), 61):
            file.write(content[begin : begin + 61])
            file.flush()
            follower.poll()
            seen.append(len(follower.steps))
            assert_same(follower)
    assert sorted(set(seen)) == [0, 8, 16, 24]
    assert seen == sorted(seen)


@pytest.mark.parametrize("window", [10, 1000])
def test_a_resume_voids_rows_and_events_also_where_void_rows_had_displaced_valid_ones(
    tmp_path: Path, window: int
) -> None:
    path = tmp_path / "run.json"
    writer = start(path)
    add(writer, 0, 50)
    for step in (5, 30, 45):
        note(writer, step)
    follower = RecordFollower(tmp_path / "run.record", window)
    with start(path, resume_at=28) as again:  # the first process is still there, but writes no more
        again.flush()
        follower.poll()
        assert_same(follower)
        assert (follower.steps[-1], follower.count("spike")) == (27, 1)
        add(again, 28, 33, ("y", "z"))
        note(again, 29)
        follower.poll()
        assert_same(follower)
    with start(path, resume_at=30) as third:
        third.flush()
        follower.poll()
        assert_same(follower)
    follower.poll()
    assert_same(RecordFollower(tmp_path / "run.record", window))
    with pytest.warns(RuntimeWarning, match="another run records there now"):
        writer.finish("failed")


def test_another_run_in_the_same_place_starts_afresh(tmp_path: Path) -> None:
    first = start(tmp_path / "run.json", "a")
    add(first, 0, 40)
    note(first, 3)
    follower = RecordFollower(tmp_path / "run.record", 1000)
    with start(tmp_path / "run.json", "b") as second:
        add(second, 0, 60, ("x",))
        assert follower.poll()
        assert (follower.header.run_id, follower.names, len(follower.steps)) == ("b", ["x"], 60)
        assert_same(follower)
    with pytest.warns(RuntimeWarning, match="another run records there now"):
        first.finish("failed")


def test_a_run_that_is_replaced_in_the_middle_of_a_look_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start(tmp_path / "run.json", "a")
    add(first, 0, 8)
    first.event(3, "spike", "high")
    first.finish("completed")
    follower = RecordFollower(tmp_path / "run.record", 1000)
    real = RecordFollower._read_blocks

    def replaced(self: RecordFollower) -> bool:
        monkeypatch.setattr(RecordFollower, "_read_blocks", real)
        with start(tmp_path / "run.json", "b") as second:
            add(second, 0, 60, ("x",))
        return real(self)

    monkeypatch.setattr(RecordFollower, "_read_blocks", replaced)
    follower.poll()
    assert follower.header.run_id == "b"
    assert_same(follower)


def test_a_line_of_the_events_that_is_cut_off_waits(tmp_path: Path) -> None:
    writer = start(tmp_path / "run.json")
    note(writer, 1, "größer")
    events = tmp_path / "run.record" / "events.jsonl"
    line = events.read_bytes()
    follower = RecordFollower(tmp_path / "run.record")
    for cut in range(1, len(line)):
        events.write_bytes(line + line[:cut])
        follower.poll()
        assert follower.count("spike") == 1
    events.write_bytes(line + line)
    follower.poll()
    assert [event.message for event in follower.events] == ["größer"] * 2
    with pytest.warns(RuntimeWarning, match="another run records there now"):
        writer.finish("completed")


def test_a_column_holds_what_was_measured(tmp_path: Path) -> None:
    with start(tmp_path / "run.json") as writer:
        writer.append([0, 1, 2], {"x": [1.0, np.nan, 3.0]}, {"x": [False, False, True]})
        writer.flush()
        follower = RecordFollower(tmp_path / "run.record")
        steps, values = follower.column("x")
        assert steps.tolist() == [0, 1]
        np.testing.assert_array_equal(values, np.float32([1, np.nan]))
        assert len(follower.column("y")[0]) == 0


def test_the_pace_is_that_of_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = start(tmp_path / "run.json")
    add(writer, 0, 8)
    follower = RecordFollower(tmp_path / "run.record")
    assert follower.pace is None
    add(writer, 8, 16)
    blocks = tmp_path / "run.record" / "000000-series.arrow"
    before = follower.written
    assert before is not None
    os.utime(blocks, (before + 4, before + 4))
    follower.poll()
    assert follower.pace == pytest.approx(0.5, abs=1e-3)
    assert follower.block_rows == 8
    writer.finish("completed")


def test_no_record_and_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no run record is there"):
        RecordFollower(tmp_path / "none.record")
    with start(tmp_path / "run.json") as writer:
        add(writer, 0, 8)
        follower = RecordFollower(tmp_path / "run.record")
        (tmp_path / "run.record" / "header.json").rename(tmp_path / "away")
        with pytest.raises(RecordError, match="no run record is there"):
            follower.poll()
        (tmp_path / "away").rename(tmp_path / "run.record" / "header.json")
        assert_same(follower)


def test_joining_late_reads_the_end_alone_and_following_only_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bifusion_diag.record import follow

    read: list[int] = []
    real: Callable[..., Block | None] = follow.BlockTail.block
    monkeypatch.setattr(follow.BlockTail, "block", lambda tail, place: read.append(place) or real(tail, place))
    writer = start(tmp_path / "run.json")
    add(writer, 0, 4000)
    follower = RecordFollower(tmp_path / "run.record", window=40)
    assert len(read) == 5
    add(writer, 4000, 4016)
    follower.poll()
    assert len(read) == 7
    assert_same(follower)
    tracemalloc.start()
    for begin in range(4016, 8016, 400):
        add(writer, begin, begin + 400)
        follower.poll()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 40_000  # 4000 rows would be 72 kB
    assert peak < 200_000  # of which most is one look at the events
    assert_same(follower)
    writer.finish("completed")


#: Six times eighty steps, each time when a line comes in; then it waits to be killed.
WRITER = """
import sys, numpy as np
from bifusion_diag.record import RunHeader, RunWriter
writer = RunWriter(sys.argv[1], RunHeader(name="run"))
for line in sys.stdin:
    for block in range(10):
        rows = int(line) + np.arange(block * 8, block * 8 + 8)
        writer.append(rows, {"x": np.sin(rows), "y": rows * 0.5})
"""


def test_a_writer_in_another_process_which_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "run.json")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
    assert process.stdin is not None
    deadline = time.monotonic() + 60
    try:
        while not (tmp_path / "run.record" / "header.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        follower = RecordFollower(tmp_path / "run.record", 100)
        for first in range(0, 480, 80):
            print(first, file=process.stdin, flush=True)
            while not len(follower.steps) or follower.steps[-1] < first + 79:
                assert time.monotonic() < deadline
                follower.poll()
                np.testing.assert_array_equal(np.diff(follower.steps), 1)
                np.testing.assert_array_equal(follower.column("y")[1], np.float32(0.5) * follower.steps)
                time.sleep(0.001)
    finally:
        process.kill()
        process.communicate()
    assert follower.status == "running"
    assert_same(follower)


def test_what_a_path_may_mean(tmp_path: Path) -> None:
    assert find_record(tmp_path / "mine" / "run.json") is None  # not begun
    start(tmp_path / "mine" / "run.json").finish("completed")
    folder = tmp_path / "mine" / "run.record"
    for path in ("mine", "mine/run.json", "mine/run.record", "mine/run"):
        assert find_record(tmp_path / path) == folder
    assert find_record(Path("mine")) == Path("mine/run.record")  # of the working directory
    assert find_record(tmp_path / "mine" / "other.json") is None
    assert find_record(tmp_path) is None
    for name in ("run.rank1.json", "second.json"):  # another process of the same run, and another run
        start(tmp_path / "mine" / name).finish("completed")
        assert find_record(tmp_path / "mine") == folder
    folder.rename(tmp_path / "mine" / "first.record")
    with pytest.raises(UserError, match=r"several runs in this folder: first\.record, second\.record"):
        find_record(tmp_path / "mine")
    assert find_record(tmp_path / "mine" / "first.json") == tmp_path / "mine" / "first.record"
    with pytest.raises(UserError, match=r"run\.json is a file"):
        find_record(tmp_path / "mine" / "run.json" / "x.json")


def test_the_document_of_a_record() -> None:
    assert document_of(Path("a/run.record")) == document_of(Path("a/run.rank3.record")) == Path("a/run.json")
    assert document_of(Path("a/lr1.5.record")) == Path("a/lr1.5.json")
