"""The .record folder read back at full resolution, also that of a run that was killed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.record import codec
from bifusion_diag.record.blocks import Block, BlockFile
from bifusion_diag.record.document import check_version, event_from, header_from
from bifusion_diag.record.scene_files import read_snapshots
from bifusion_diag.record.scenes import Snapshot
from bifusion_diag.record.schema import Event, Floats, Ints, RecordError, RunHeader

HEADER_FILE = "header.json"
EVENTS_FILE = "events.jsonl"
RESUME = "resume"  # kind of the event with which a resumed run goes on; data: how many files were there before it
_VOID = np.iinfo(np.int64).min  # stands for the step of a row that a resume has voided


class State(NamedTuple):
    """What header.json holds."""

    header: RunHeader
    status: str
    error: str | None
    measures: dict[str, Any]


def read_state(folder: Path) -> State:
    """Read header.json.

    Raises:
        RecordError: it is missing, damaged or of a newer version.
    """
    path = folder / HEADER_FILE
    try:
        document = codec.loads(path.read_text(encoding="utf-8"))
        check_version(document, path)
        return State(
            header_from(document["header"]), document["status"], document["error"], codec.decode(document["measures"])
        )
    except OSError as error:
        raise RecordError(f"{folder}: not a run record: {HEADER_FILE} cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{path}: damaged ({error}); the run's header cannot be restored") from error


def read_events(folder: Path) -> list[Event]:
    """Events in the order in which they were written; a line that was cut off is left out.

    An event of kind RESUME voids what was recorded before it of its step and of later ones.
    """
    path = folder / EVENTS_FILE
    events: list[Event] = []
    if not path.is_file():
        return events
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = event_from(codec.loads(line))
        except (ValueError, KeyError, TypeError):
            continue
        if event.kind == RESUME and event.step is not None:
            events = [e for e in events if e.step is None or e.step < event.step or e.kind == RESUME]
        events.append(event)
    return events


class RecordReader:
    """Full-resolution access to a .record folder.

    A step that was written twice counts as it was written last. Steps from which a resumed run went on, and later ones,
    count only as they were written after it.

    Attributes:
        state: header, status, error, measures.
        steps: (R,) recorded steps, ascending.
        names: of all series, in the order in which they were first recorded.
        histogram_names: of all histograms.
        truncated: names of files whose last block was cut off.

    Raises:
        RecordError: header.json or the head of another file is damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.state = read_state(self.folder)
        self.truncated: list[str] = []
        self._tables: list[tuple[Path, list[str]]] = []
        self._histograms: dict[str, list[Path]] = {}
        self._edges: dict[str, Floats] = {}
        self._resumes = [(e.data["files"], e.step) for e in read_events(self.folder) if e.kind == RESUME]
        written: list[Ints] = []
        for path in sorted(self.folder.glob("*.arrow")):
            try:
                written.extend(self._survey(path))
            except ValueError as error:  # of the JSON in the metadata
                raise RecordError(
                    f"{path}: damaged at its head ({error}); move it away to read the rest of the record"
                ) from error
        self.names = list(dict.fromkeys(name for _, names in self._tables for name in names))
        self.histogram_names = list(self._histograms)
        self.steps, self._rows = _last_of_each(written)

    def _survey(self, path: Path) -> list[Ints]:
        """Note what a file holds; returns the steps of its rows where they are rows of series."""
        with BlockFile(path) as file:
            steps = [self._valid(path, block.steps) for block in file.blocks(np.zeros(0, np.int64))]
            if file.truncated:
                self.truncated.append(path.name)
            if "names" in file.metadata:
                self._tables.append((path, json.loads(file.metadata["names"])))
                return steps
            if "histogram" in file.metadata:
                name = file.metadata["histogram"]
                self._histograms.setdefault(name, []).append(path)
                self._edges[name] = np.asarray(json.loads(file.metadata["edges"]), dtype=np.float64)
            return []

    def events(self) -> list[Event]:
        """Events of the run, and one for every block that was cut off."""
        lost = [Event(None, "record", f"the last block of {name} was cut off and left out") for name in self.truncated]
        return read_events(self.folder) + lost

    def snapshots(self) -> tuple[Snapshot, ...]:
        """α of a scene at a few moments of the run."""
        return read_snapshots(self.folder)

    def columns(self, names: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Whole series, every recorded step.

        Args:
            names: C names of series.

        Returns:
            values (R, C), NaN where missing, and missing (R, C), in order of :attr:`steps`.
        """
        total = len(self._rows)
        # place[i]: the output row of the i-th written row, −1 where a later one replaces it
        values = np.full((total, len(names)), np.nan, np.float32)
        missing = np.ones((total, len(names)), bool)
        place = np.full(self._written, -1, np.int64)
        place[self._rows] = np.arange(total)
        offset = 0
        for path, known in self._tables:
            index = {name: i for i, name in enumerate(known)}
            into = np.asarray([i for i, name in enumerate(names) if name in index], dtype=np.int64)
            take = np.asarray([index[names[i]] for i in into], dtype=np.int64)
            with BlockFile(path) as file:
                for block in file.blocks(take):
                    rows = place[offset : offset + len(block.steps)]
                    kept = np.flatnonzero(rows >= 0)
                    target = rows[kept, None]
                    values[target, into] = block.values[kept]
                    missing[target, into] = block.missing[kept]
                    offset += len(block.steps)
        return values, missing

    def column(self, name: str) -> tuple[Ints, NDArray[np.float32], NDArray[np.bool_]]:
        """One series at full resolution: steps, values, missing, each (R,)."""
        values, missing = self.columns([name])
        return self.steps, values[:, 0], missing[:, 0]

    def histogram(self, name: str) -> tuple[Floats, Ints, NDArray[np.float32]]:
        """One histogram at full resolution: edges (B + 1,), steps (R,), counts (R, B)."""
        blocks: list[Block] = []
        written: list[Ints] = []
        for path in self._histograms[name]:
            with BlockFile(path) as file:
                for block in file:
                    blocks.append(block)
                    written.append(self._valid(path, block.steps))
        steps, rows = _last_of_each(written)
        counts = np.concatenate([block.values for block in blocks]) if blocks else np.zeros((0, 0), np.float32)
        return self._edges[name], steps, counts[rows]

    def _valid(self, path: Path, steps: Ints) -> Ints:
        """The steps of a file's rows, those that a later resume has voided replaced by _VOID."""
        limits = [step for files, step in self._resumes if file_number(path) < files and step is not None]
        return np.where(steps < min(limits), steps, _VOID) if limits else steps

    @property
    def _written(self) -> int:
        return int(self._rows.max()) + 1 if len(self._rows) else 0


def file_number(path: Path) -> int:
    """The number that a block file's name begins with; files are numbered in the order in which they were begun."""
    return int(path.stem.split("-")[0])


def _last_of_each(written: Sequence[Ints]) -> tuple[Ints, Ints]:
    """Unique valid steps in ascending order, and for each the index of the row that was written last."""
    steps = np.concatenate(written) if written else np.zeros(0, np.int64)
    unique, from_end = np.unique(steps[::-1], return_index=True)
    valid = unique != _VOID
    return unique[valid], (len(steps) - 1 - from_end)[valid]
