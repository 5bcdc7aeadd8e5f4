"""The .record folder of a run that is going on, followed from another process.

Only what is new is read, and only the newest rows are kept: neither the cost of a look nor the memory grows with the
length of the run.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.errors import UserError
from bifusion_diag.record import codec
from bifusion_diag.record.blocks import Block, BlockTail
from bifusion_diag.record.document import event_from
from bifusion_diag.record.reader import EVENTS_FILE, HEADER_FILE, RESUME, file_number, read_state
from bifusion_diag.record.schema import FINGERPRINT, Event, Ints, RecordError, RunHeader

EVENTS_KEPT = 100
_CHUNK = 1 << 16  # bytes of the events read at once
_NO_STEP = -1
_RANK = re.compile(r"\.rank[1-9]\d*$")  # ends the stem of a .record folder of another process than rank 0


def find_record(path: Path) -> Path | None:
    """The .record folder that a path means; None where no run has begun there.

    Args:
        path: a run.json, there or to come, a .record folder, or a folder that holds a run.record or one other.

    Raises:
        UserError: it can mean none, or several.
    """
    named = path if path.name else path.absolute()  # "." has no name
    if (named / HEADER_FILE).is_file():
        return path
    inside = sorted(found.parent for found in named.glob(f"*.record/{HEADER_FILE}")) if named.is_dir() else []
    first = [folder for folder in inside if not _RANK.search(folder.stem)] or inside
    if named / "run.record" in first:
        return named / "run.record"
    if len(first) > 1:
        names = ", ".join(folder.name for folder in first)
        raise UserError(f"{path}: there are several runs in this folder: {names}. Give one of them.")
    if first:
        return first[0]
    beside = named.with_name(f"{named.stem}.record")
    if (beside / HEADER_FILE).is_file():
        return beside
    above = next(parent for parent in named.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UserError(f"{path}: no run can be recorded there, {above} is a file.")
    return None


def document_of(folder: Path) -> Path:
    """The run.json to which a .record folder belongs, also one of another process than rank 0."""
    return folder.with_name(_RANK.sub("", folder.stem) + ".json")


class RecordFollower:
    """The newest rows and events of a run. They are those that :class:`RecordReader` would give.

    Args:
        folder: the .record folder.
        window: recorded steps that are kept.

    Attributes:
        header, status, error: as header.json tells them.
        names: of all series, in the order in which they were first recorded.
        steps: (R,) newest recorded steps, ascending, R ≤ window.
        values: (R, C) of the series, NaN where missing.
        missing: (R, C) bool.
        events: the newest, at most EVENTS_KEPT.
        begun: time at which the header was written, seconds since the epoch.
        written: time at which the newest block was written. None: there is none yet.
        block_rows: rows of the newest block.

    Raises:
        RecordError: there is no record, or its header is damaged.
    """

    header: RunHeader
    status: str
    error: str | None
    begun: float

    def __init__(self, folder: Path | str, window: int = 1000) -> None:
        self.folder = Path(folder)
        self.window = window
        self._stamp: tuple[int, int, int] | None = None
        self._forget()
        self.poll()

    def _forget(self) -> None:
        """Begin anew: another run, or a resume that has voided rows."""
        self._tails: dict[Path, BlockTail] = {}
        self._names_of: dict[Path, list[str]] = {}
        self._resumes: list[tuple[int, int]] = []  # files there were before it, step
        self._events_end = 0
        self._counted: dict[str, array[int]] = {}  # kind -> steps
        self._paces: deque[tuple[float, int]] = deque(maxlen=32)  # when the newest step was written, and which
        self.names: list[str] = []
        self.steps: Ints = np.zeros(0, np.int64)
        self.values: NDArray[np.float32] = np.zeros((0, 0), np.float32)
        self.missing: NDArray[np.bool_] = np.zeros((0, 0), bool)
        self.events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self.written: float | None = None
        self.block_rows = 0

    def poll(self) -> bool:
        """Read what is new; returns whether anything was.

        Raises:
            RecordError: the record is gone, or its header is damaged.
        """
        news = self._read_header()
        news = self._read_events() or news
        news = self._read_blocks() or news
        # Replaced in between: what was read may be of either run. Another run's header is there before its first block.
        return self.poll() if self._stamp != self._header_stamp() else news

    def count(self, kind: str) -> int:
        """How many events of a kind there were in the whole run."""
        return len(self._counted.get(kind, ()))

    @property
    def kinds(self) -> list[str]:
        """The kinds of events there were in the whole run."""
        return [kind for kind, steps in self._counted.items() if steps]

    def column(self, name: str) -> tuple[Ints, NDArray[np.float32]]:
        """Steps (K,) and values (K,) of a series where it was measured."""
        if name not in self.names:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        place = self.names.index(name)
        here = ~self.missing[:, place]
        return self.steps[here], self.values[here, place]

    @property
    def pace(self) -> float | None:
        """Seconds a step by the clock, as long as this follower has watched; None before the second block."""
        if len(self._paces) < 2:
            return None
        (began, first), (ended, last) = self._paces[0], self._paces[-1]
        return (ended - began) / (last - first) if last > first and ended > began else None

    def _header_stamp(self) -> tuple[int, int, int]:
        try:
            status = os.stat(self.folder / HEADER_FILE)
        except OSError as error:
            raise RecordError(f"{self.folder}: no run record is there ({error.strerror})") from error
        return status.st_mtime_ns, status.st_ino, status.st_size  # the file is replaced as a whole

    def _read_header(self) -> bool:
        stamp = self._header_stamp()
        if stamp == self._stamp:
            return False
        state = read_state(self.folder)
        if self._stamp is not None and state.header.run_id != self.header.run_id:
            self._forget()
        self._stamp = stamp
        self.begun = stamp[0] / 1e9
        self.header, self.status, self.error = state.header, state.status, state.error
        return True

    def _read_events(self) -> bool:
        known = bool(self._tails)
        news = False
        for event in self._new_events():
            if event.kind == FINGERPRINT:  # tells nothing of what happens, and would displace what does
                continue
            news = True
            if event.kind == RESUME and event.step is not None:
                if known:  # rows that are kept may be void, and void rows may have displaced valid ones
                    self._forget()
                    self._read_events()
                    return True
                self._void(event.step)
                self._resumes.append((int(event.data.get("files", 0)), event.step))
            self.events.append(event)
            steps = self._counted.setdefault(event.kind, array("q"))
            steps.append(_NO_STEP if event.step is None else event.step)
        return news

    def _new_events(self) -> Iterator[Event]:
        """Events of whole lines; a line that is cut off is read again the next time."""
        try:
            file = (self.folder / EVENTS_FILE).open("rb")
        except OSError:  # not there yet
            return
        with file:
            file.seek(self._events_end)
            rest = b""
            while chunk := file.read(_CHUNK):
                lines, end, rest = (rest + chunk).rpartition(b"\n")
                self._events_end += len(lines) + len(end)
                for line in lines.split(b"\n"):
                    try:
                        yield event_from(codec.loads(line.decode("utf-8", "replace")))
                    except (ValueError, KeyError, TypeError):  # a line that a killed run has cut off
                        continue

    def _void(self, step: int) -> None:
        """What :func:`read_events` does at a resume."""
        kept = [e for e in self.events if e.step is None or e.step < step or e.kind == RESUME]
        self.events = deque(kept, maxlen=EVENTS_KEPT)
        for kind, steps in self._counted.items():
            if kind != RESUME:
                self._counted[kind] = array("q", (s for s in steps if s < step))

    def _read_blocks(self) -> bool:
        found: list[tuple[BlockTail, list[int]]] = []
        for path in sorted(self.folder.glob("*-series.arrow"), key=file_number):
            tail = self._tails.setdefault(path, BlockTail(path))
            try:
                places = tail.update()
                written = path.stat().st_mtime
            except OSError:  # the folder is being replaced
                continue
            if places or (tail.metadata and path not in self._names_of):
                found.append((tail, places))
            if places:
                self.written = max(written, self.written or 0.0)
        if found:
            self._take(found)
        return bool(found)

    def _take(self, found: list[tuple[BlockTail, list[int]]]) -> None:
        """Read new blocks, the newest first and not more than the window holds, and add their rows to it."""
        new: list[tuple[BlockTail, Block]] = []
        gathered: set[int] = set()
        for tail, places in reversed(found):
            limits = [step for files, step in self._resumes if file_number(tail.path) < files]
            for block in map(tail.block, reversed(places)):
                if block is None:
                    continue
                if limits:
                    valid = block.steps < min(limits)
                    block = Block(block.steps[valid], block.values[valid], block.missing[valid])
                if len(block.steps):
                    new.append((tail, block))
                    gathered.update(block.steps.tolist())
                if len(gathered) >= self.window:
                    break
            if len(gathered) >= self.window:
                break
        for tail, _ in found:
            if tail.path not in self._names_of:
                self._names_of[tail.path] = _names(tail)
        paths = sorted(self._names_of, key=file_number)
        self._widen(list(dict.fromkeys(name for path in paths for name in self._names_of[path])))
        if not new:
            return
        self.block_rows = len(new[0][1].steps)
        place_of = {name: i for i, name in enumerate(self.names)}
        steps, values, missing = [self.steps], [self.values], [self.missing]
        for tail, block in reversed(new):
            into = [place_of[name] for name in self._names_of[tail.path]]
            wide = np.full((len(block.steps), len(self.names)), np.nan, np.float32)
            gone = np.ones(wide.shape, bool)
            wide[:, into] = block.values
            gone[:, into] = block.missing
            steps.append(block.steps)
            values.append(wide)
            missing.append(gone)
        # A step that was written twice counts as it was written last.
        every = np.concatenate(steps)
        unique, from_end = np.unique(every[::-1], return_index=True)
        kept = (len(every) - 1 - from_end)[-self.window :]
        self.steps = unique[-self.window :]
        self.values = np.concatenate(values)[kept]
        self.missing = np.concatenate(missing)[kept]
        if self.written is not None:
            self._paces.append((self.written, int(self.steps[-1])))

    def _widen(self, names: list[str]) -> None:
        """Give the kept rows columns for series that appeared; these keep the order of first appearance."""
        if names == self.names:
            return
        into = [names.index(name) for name in self.names]
        values = np.full((len(self.steps), len(names)), np.nan, np.float32)
        missing = np.ones(values.shape, bool)
        values[:, into] = self.values
        missing[:, into] = self.missing
        self.names, self.values, self.missing = names, values, missing


def _names(tail: BlockTail) -> list[str]:
    try:
        names: list[str] = json.loads(tail.metadata["names"])
    except (KeyError, ValueError) as error:
        raise RecordError(
            f"{tail.path}: damaged at its head ({error}); move it away to follow the rest of the record"
        ) from error
    return names
