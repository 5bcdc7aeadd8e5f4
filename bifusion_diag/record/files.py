"""The files of a .record folder and the TensorBoard events beside it. A disk that fails costs rows, never the run."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.errors import UserError
from bifusion_diag.files import write_text
from bifusion_diag.record import codec
from bifusion_diag.record.append import AppendFile
from bifusion_diag.record.blocks import Block, BlockStream
from bifusion_diag.record.document import KIND, event_to, header_to
from bifusion_diag.record.reader import EVENTS_FILE, HEADER_FILE, RESUME, file_number
from bifusion_diag.record.scene_files import SCENES_FILE, resume_line
from bifusion_diag.record.schema import SCHEMA_VERSION, Event, Floats, Ints, RunHeader
from bifusion_diag.record.tensorboard import TensorBoardSink

MAX_UNWRITTEN = 1000  # events that are kept for a disk that may have room again


class HistogramRows(NamedTuple):
    """Rows of one histogram."""

    name: str
    steps: Ints  # (R,)
    counts: NDArray[np.float32]  # (R, B)
    edges: Floats  # (B + 1,)


class Rows(NamedTuple):
    """Rows of series, with the histograms of the same steps."""

    steps: Ints  # (R,)
    names: Sequence[str]  # C
    values: NDArray[np.float32]  # (R, C)
    missing: NDArray[np.bool_]  # (R, C)
    histograms: Sequence[HistogramRows] = ()


class RecordFiles:
    """Writes one record; not to be used by two threads at a time.

    Where the disk fails, what was written stays as it was, up to its last whole block. Every later block is tried, and
    when there is room again, an event tells how many rows are not there. Where another run has taken the folder, or it
    was removed, nothing is written any more: the rows of two runs must not mix.

    Args:
        folder: the .record folder. It is made, and emptied unless a run is resumed there.
        header: of the run.
        resume_at: the step from which on the record continues.
        tensorboard: gets the same numbers.

    Attributes:
        warnings: what the user is to be told, once.

    Raises:
        OSError, UserError: the folder cannot be begun.
    """

    def __init__(
        self, folder: Path, header: RunHeader, resume_at: int | None, tensorboard: TensorBoardSink | None
    ) -> None:
        self.folder = folder
        self.warnings: deque[str] = deque()
        self._warned = False
        self._tensorboard = tensorboard
        self._names: list[str] = []
        self._place: dict[str, int] = {}  # name -> column
        self._stream: BlockStream | None = None
        self._histograms: dict[str, BlockStream] = {}
        self._unwritten: list[bytes] = []  # lines of events
        self._lost: dict[str, tuple[int, int, int]] = {}  # reason -> rows, first step, last step
        if resume_at is None and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._save_state(header, "running", None, {})
        self._events = AppendFile(folder / EVENTS_FILE)
        if self._events.size:
            self._events.write(b"\n")  # ends a line that a killed run may have cut off
        if tensorboard is not None:
            tensorboard.open(fresh=resume_at is None)
        if resume_at is not None:
            event = Event(resume_at, RESUME, f"resumed at step {resume_at}", {"files": self._next()})
            self._events.write(event_line(event))
            if (folder / SCENES_FILE).exists():
                self._append_scene(resume_line(resume_at))

    def rows(self, rows: Rows) -> None:
        """Append rows."""
        if len(rows.steps):
            try:
                self._write_rows(rows)
            except OSError as error:
                self._fail(self.folder, error)
                self.lose(rows.steps.tolist(), f"the disk failed ({error.strerror or error})")
            else:
                self._report_losses()
            if self._tensorboard is not None:
                sink = self._tensorboard
                self._show(lambda: sink.scalars(rows.steps, rows.names, rows.values, rows.missing))
        for histogram in rows.histograms:
            self.histogram(histogram)

    def check(self) -> None:
        """See that the folder is still that of this run.

        Raises:
            OSError: it is another's, or gone.
        """
        self._events.check(self.folder / EVENTS_FILE)

    def _write_rows(self, rows: Rows) -> None:
        self.check()
        values, missing = rows.values, rows.missing
        if self._stream is None or self._names != list(rows.names):
            values, missing = self._widen(rows)
        assert self._stream is not None
        self._stream.write(Block(rows.steps, values, missing))

    def _widen(self, rows: Rows) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Fit rows to the columns of the open stream; a name never seen before starts a new stream that has it too."""
        new = [name for name in rows.names if name not in self._place]
        if self._stream is None or new:
            union = [*self._names, *new]
            stream = self._open("series", len(union), {"names": json.dumps(union)})
            if self._stream is not None:
                self._stream.close()
            self._stream, self._names = stream, union
            self._place = {name: i for i, name in enumerate(union)}
        into = [self._place[name] for name in rows.names]
        values = np.full((len(rows.steps), len(self._names)), np.nan, np.float32)
        missing = np.ones(values.shape, bool)
        values[:, into] = rows.values
        missing[:, into] = rows.missing
        return values, missing

    def histogram(self, rows: HistogramRows) -> None:
        """Append rows of a histogram."""
        try:
            self.check()
            if rows.name not in self._histograms:
                metadata = {"histogram": rows.name, "edges": json.dumps(rows.edges.tolist())}
                self._histograms[rows.name] = self._open("histogram", rows.counts.shape[1], metadata)
            self._histograms[rows.name].write(Block(rows.steps, rows.counts, np.zeros(rows.counts.shape, bool)))
        except OSError as error:
            self._fail(self.folder, error)
        if self._tensorboard is not None:
            sink = self._tensorboard
            self._show(lambda: sink.histogram(rows.name, rows.steps, rows.counts, rows.edges))

    def event(self, line: bytes) -> None:
        """Append an event, as :func:`event_line` gives it. Where that fails, it waits for the next one or the end."""
        if len(self._unwritten) < MAX_UNWRITTEN:
            self._unwritten.append(line)
        self._write_events()

    def _write_events(self) -> None:
        try:
            self.check()
            self._events.write(b"".join(self._unwritten))
        except OSError as error:
            self._fail(self.folder / EVENTS_FILE, error)
        else:
            self._unwritten = []

    def scene(self, line: bytes) -> None:
        """Append a snapshot, as :func:`snapshot_line` gives it. Where that fails, it is lost."""
        try:
            self.check()
            self._append_scene(line)
        except OSError as error:
            self._fail(self.folder / SCENES_FILE, error)

    def _append_scene(self, line: bytes) -> None:
        """Few and far between: the file is not kept open."""
        file = AppendFile(self.folder / SCENES_FILE)
        try:
            file.write(b"\n" + line if file.size else line)  # ends a line that a killed run may have cut off
        finally:
            file.close()

    def lose(self, steps: Sequence[int], reason: str) -> None:
        """Count rows that are not recorded."""
        count, first, last = self._lost.get(reason, (0, min(steps), max(steps)))
        self._lost[reason] = (count + len(steps), min(first, *steps), max(last, *steps))

    def _report_losses(self) -> None:
        lost, self._lost = self._lost, {}
        for reason, (count, first, last) in lost.items():
            message = f"{count} rows of steps {first} to {last} were not recorded: {reason}"
            self.event(event_line(Event(last, "record", message, {"rows": count, "first": first, "last": last})))

    def state(self, header: RunHeader) -> None:
        """Replace the header of the running run."""
        try:
            self.check()
            self._save_state(header, "running", None, {})
        except (OSError, UserError) as error:
            self._fail(self.folder / HEADER_FILE, error)

    def close(self, header: RunHeader, status: str, error: str | None, measures: Mapping[str, Any]) -> bool:
        """Close all files and note how the run ended; False where the folder is not this run's any more."""
        self._report_losses()
        self._write_events()
        ours = True
        try:
            self.check()
        except OSError as failure:
            ours = False
            self._fail(self.folder, failure)
        for file in (self._stream, *self._histograms.values(), self._events, self._tensorboard):
            if file is not None:
                try:
                    file.close()
                except OSError as failure:  # a network's disk may tell so late
                    self._fail(self.folder, failure)
        if ours:
            try:
                self._save_state(header, status, error, measures)
            except UserError as failure:
                self._fail(self.folder / HEADER_FILE, failure)
        return ours

    def _show(self, write: Callable[[], None]) -> None:
        """Write TensorBoard events; the first failure ends them."""
        assert self._tensorboard is not None
        try:
            write()
        except OSError as error:
            self._fail(self._tensorboard.folder, error)
            sink, self._tensorboard = self._tensorboard, None
            self.event(event_line(Event(None, "record", f"TensorBoard events end here: {error.strerror or error}")))
            with contextlib.suppress(OSError):
                sink.close()

    def _fail(self, where: Path, error: OSError | UserError) -> None:
        if self._warned:
            return
        self._warned = True
        reason = (error.strerror or error) if isinstance(error, OSError) else error
        if isinstance(error, OSError) and error.errno == errno.ESTALE:
            self.warnings.append(f"{where}: {reason}. Training goes on; what this run still records is lost.")
        else:
            self.warnings.append(
                f"{where}: cannot be written ({reason}). Training goes on; the record holds what was written so far, "
                "and goes on where the disk can be written again."
            )

    def _open(self, kind: str, width: int, metadata: Mapping[str, str]) -> BlockStream:
        return BlockStream(self.folder / f"{self._next():06d}-{kind}.arrow", width, metadata)

    def _next(self) -> int:
        """The number of the next block file."""
        return max(map(file_number, self.folder.glob("*.arrow")), default=-1) + 1

    def _save_state(self, header: RunHeader, status: str, error: str | None, measures: Mapping[str, Any]) -> None:
        document = {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "status": status,
            "error": error,
            "measures": codec.encode(measures),
            "header": header_to(header),
        }
        write_text(self.folder / HEADER_FILE, codec.dumps(document))


def event_line(event: Event) -> bytes:
    """An event as its line of events.jsonl. Raises TypeError for what has no JSON form."""
    return (codec.dumps(event_to(event)) + "\n").encode("utf-8")
