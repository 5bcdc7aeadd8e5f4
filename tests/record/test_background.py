"""The thread that writes: order, a disk that is too slow, errors that are no disk's, a place that another takes."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import bifusion_diag.record.writer
from bifusion_diag.record import RecordReader, Rows, RunHeader, RunWriter, load_run


def rows(*steps: int) -> Rows:
    count = len(steps)
    return Rows(np.array(steps), ["x"], np.array(steps, "f4").reshape(count, 1), np.zeros((count, 1), bool))


class Gate:
    """A stalled disk: the thread stands at it until it opens."""

    def __init__(self, writer: RunWriter) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        writer.append_later([], 0, self._stand)
        assert self.reached.wait(10)

    def _stand(self) -> Rows:
        self.reached.set()
        assert self.open.wait(30)
        return rows()


def test_a_disk_that_stands_still_costs_rows_and_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bifusion_diag.record.writer, "MAX_WAITING", 1000)
    with RunWriter(tmp_path / "run.json", RunHeader("run")) as writer:
        gate = Gate(writer)
        began = time.perf_counter()
        with pytest.warns(RuntimeWarning, match=r"too slow: rows from step 4 on are not recorded") as warned:  # noqa: PT031
            for step in range(0, 1000, 2):  # two blocks of two rows find room
                writer.append_later([step, step + 1], 500, lambda step=step: rows(step, step + 1))
        writer.event(3, "note", "from the loop, while the disk stands still")
        assert time.perf_counter() - began < 1
        assert len(warned) == 1
        gate.open.set()
        writer.flush()
        writer.append_later([1000], 500, lambda: rows(1000))
        writer.flush()
        assert RecordReader(writer.folder).steps.tolist() == [0, 1, 2, 3, 1000]
    run = load_run(tmp_path / "run.json")
    assert [(event.kind, event.message) for event in run.events] == [
        ("note", "from the loop, while the disk stands still"),
        ("record", "996 rows of steps 4 to 999 were not recorded: the disk was too slow"),
    ]
    assert run.events[1].data == {"rows": 996, "first": 4, "last": 999}


def test_rows_that_were_dropped_last_are_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bifusion_diag.record.writer, "MAX_WAITING", 1000)
    with RunWriter(tmp_path / "run.json", RunHeader("run")) as writer:
        gate = Gate(writer)
        with pytest.warns(RuntimeWarning, match="too slow"):  # noqa: PT031
            for step in range(9):
                writer.append_later([step], 500, lambda step=step: rows(step))
        gate.open.set()
    run = load_run(tmp_path / "run.json")
    assert run.steps.tolist() == [0, 1]
    assert [event.message for event in run.events] == [
        "7 rows of steps 2 to 8 were not recorded: the disk was too slow"
    ]


def test_who_appends_rows_directly_waits_and_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bifusion_diag.record.writer, "MAX_WAITING", 100)
    with RunWriter(tmp_path / "run.json", RunHeader("run")) as writer:
        for step in range(200):
            writer.append([step], {"x": [step]})
            writer.append_histogram("h", step, np.ones(4), np.linspace(0, 1, 5))
    run = load_run(tmp_path / "run.json")
    assert run.steps.tolist() == list(range(200))
    assert run.events == []


def test_what_was_handed_over_may_be_changed(tmp_path: Path) -> None:
    values = np.zeros((1, 1), "f4")
    with RunWriter(tmp_path / "run.json", RunHeader("run")) as writer:
        gate = Gate(writer)
        for step in range(5):
            values[:] = step
            writer.append_block([step], ["x"], values)
        gate.open.set()
    series = load_run(tmp_path / "run.json").series("x")
    assert series is not None
    assert series.value.tolist() == [0, 1, 2, 3, 4]


def test_flush_means_on_disk(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run.json", RunHeader("run")) as writer:
        for step in range(50):

            def slow(step: int = step) -> Rows:
                time.sleep(0.001)
                return rows(step)

            writer.append_later([step], 100, slow)
        writer.event(49, "note", "last")
        writer.flush()
        reader = RecordReader(writer.folder)
        assert reader.steps.tolist() == list(range(50))
        assert [event.message for event in reader.events()] == ["last"]


def test_a_bug_in_the_thread_is_raised_by_the_next_call_once(tmp_path: Path) -> None:
    def fail() -> Rows:
        raise ZeroDivisionError("a bug")

    writer = RunWriter(tmp_path / "run.json", RunHeader("run"))
    writer.append_later([0], 1, lambda: rows(0))
    writer.append_later([1], 1, fail)
    writer._thread.wait()
    with pytest.raises(ZeroDivisionError, match="a bug"):
        writer.event(1, "note", "what is called next")
    writer.append_later([2], 1, lambda: rows(2))  # no row after the lost one
    writer.finish("failed", "ZeroDivisionError: a bug")
    assert load_run(tmp_path / "run.json").steps.tolist() == [0]


def test_a_bug_in_the_thread_is_raised_at_the_end_and_the_record_is_whole(tmp_path: Path) -> None:
    def fail() -> Rows:
        raise ZeroDivisionError("a bug")

    writer = RunWriter(tmp_path / "run.json", RunHeader("run"))
    writer.append_later([0], 1, lambda: rows(0))
    writer.append_later([1], 1, fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        writer.finish("completed")
    run = load_run(tmp_path / "run.json")
    assert run.steps.tolist() == [0]
    assert [event.message for event in run.events] == ["recording ended at an error: ZeroDivisionError: a bug"]


def test_an_event_that_has_no_json_form_is_refused_where_it_is_made(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run.json", RunHeader("run")) as writer:
        with pytest.raises(TypeError, match="a record cannot hold a object"):
            writer.event(0, "note", "bad", thing=object())
        writer.append([0], {"x": [1.0]})
    assert load_run(tmp_path / "run.json").steps.tolist() == [0]


def test_events_and_rows_come_from_several_threads(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run.json", RunHeader("run")) as writer:

        def tell(number: int) -> None:
            for i in range(50):
                writer.event(i, f"thread {number}", str(i))
                writer.append_later([number * 50 + i], 10, lambda: rows(number * 50 + i))  # noqa: B023

        threads = [threading.Thread(target=tell, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    run = load_run(tmp_path / "run.json")
    for number in range(4):
        assert [e.message for e in run.events if e.kind == f"thread {number}"] == [str(i) for i in range(50)]


@pytest.mark.parametrize("resume_at", [None, 4])
def test_a_run_whose_place_another_has_taken_writes_nothing_more(tmp_path: Path, resume_at: int | None) -> None:
    path = tmp_path / "run.json"
    first = RunWriter(path, RunHeader("first"))
    first.append([0, 1], {"x": [1.0, 2.0]})
    first.flush()
    second = RunWriter(path, RunHeader("second"), resume_at=resume_at)
    second.append([4, 5], {"x": [40.0, 50.0]})
    second.flush()
    lost = "run.record: another run records there now. Training goes on; what this run still records is lost."
    with pytest.warns(RuntimeWarning, match=lost) as warned:  # noqa: PT031
        first.append([4, 5], {"x": [4.0, 5.0], "y": [6.0, 7.0]})
        first.event(5, "note", "of the first")
        first.finish("failed", "first")
    assert len(warned) == 1
    assert not path.exists()  # it is for the other to write
    second.append([6], {"x": [60.0], "z": [1.0]})
    second.finish("completed")
    run = load_run(path)
    assert (run.header.name, run.status, run.names()) == ("second", "completed", ["x", "z"])
    expected = ([] if resume_at is None else [1.0, 2.0]) + [40.0, 50.0, 60.0]
    series = run.series("x")
    assert series is not None
    assert series.value.tolist() == expected
    assert "note" not in {event.kind for event in run.events}


def test_a_record_that_was_removed_ends_with_a_warning(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run.json", RunHeader("run"))
    writer.append([0], {"x": [1.0]})
    writer.flush()
    shutil.rmtree(writer.folder)
    with pytest.warns(RuntimeWarning, match=r"the record was removed\. Training goes on"):  # noqa: PT031
        writer.append([1], {"x": [1.0]})
        writer.finish("completed")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_the_end_waits_for_the_disk_costs_nothing(tmp_path: Path) -> None:
    def slow() -> Rows:
        time.sleep(0.2)  # by now the main thread waits
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        return rows(0, 1)

    with pytest.raises(KeyboardInterrupt), RunWriter(tmp_path / "run.json", RunHeader("run")) as writer:  # noqa: PT012
        writer.append_later([0, 1], 500, slow)
        writer.append_later([2], 500, lambda: rows(2))
    run = load_run(tmp_path / "run.json")
    assert (run.status, run.steps.tolist()) == ("completed", [0, 1, 2])
