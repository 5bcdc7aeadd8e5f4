"""What a reader of a foreign log hands over: columns under their own names, and what is known of the run.

Legend: a *segment* is what one process wrote; a run that was resumed has several.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bifusion_diag.record.schema import Event, Floats, Ints, RecordError

MAX_LINE = 1 << 20  # bytes; longer ones are no log's
MAX_PIECES = 100  # of a broken line
LAST_STEP = 1 << 53
RESUME = "resume"


class Smoothing(NamedTuple):
    """How many steps a logged value is the mean of."""

    window: int  # 0: unknown
    source: str  # how that is known
    others: Mapping[str, int] = {}  # windows of columns, by their own names, that have another one
    only: str = ""  # regular expression of the columns that are means; "": all


UNKNOWN = Smoothing(0, "unknown: neither the log nor its format tells")


class Segment:
    """Columns that one process wrote."""

    def __init__(self, label: str) -> None:
        self.label = label
        self._columns: dict[str, tuple[array[int], array[float]]] = {}
        self.first: int | None = None  # smallest step of a row of training
        self.last: int | None = None
        self.values = 0

    def add(self, step: int, values: Mapping[str, float | None], *, training: bool = True) -> None:
        """Append a row; None is a missing value and leaves nothing."""
        if not 0 <= step < LAST_STEP:
            return
        columns, added = self._columns, 0
        for name, value in values.items():
            if value is not None:
                if name not in columns:
                    columns[name] = array("q"), array("d")
                steps, numbers = columns[name]
                steps.append(step)
                numbers.append(value)
                added += 1
        self.values += added
        if training and added:
            self.first = step if self.first is None else min(self.first, step)
            self.last = step if self.last is None else max(self.last, step)

    def columns(self) -> dict[str, tuple[Ints, Floats]]:
        """Steps and values (K,) of every column, in the order in which they were written."""
        return {
            name: (np.asarray(steps, dtype=np.int64), np.asarray(values, dtype=np.float64))
            for name, (steps, values) in self._columns.items()
        }


@dataclass
class Raw:
    """A foreign log, read.

    Attributes:
        format: name of its format.
        path: what was read.
        name: of the run.
        segments: in the order of time.
        files: what was read, all of it.
        smoothing: of the values.
        norm: what is known of the gradient norm: taken before or after clipping.
        notes: what has to be said of these numbers, in sentences.
        skipped: lines, rows or values that could not be read.
        timed: the format's `time` is the seconds that a step takes.
        units: unit by own column name, where the format states it.
    """

    format: str
    path: Path
    name: str
    segments: list[Segment]
    files: list[Path]
    smoothing: Smoothing = UNKNOWN
    norm: str = "unknown whether before or after clipping"
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    skipped: int = 0
    timed: bool = False
    created: str = ""
    planned: int | None = None
    also: list[str] = field(default_factory=list)  # other formats that lie there, and were not read


def join(segments: Sequence[Segment]) -> tuple[dict[str, tuple[Ints, Floats]], list[Event]]:
    """The columns of a run from its segments: ascending steps, once each. Where a segment begins, what was written
    before of that step and later ones is void; of a step that occurs twice in a segment, the last value counts.

    Returns:
        Steps and values by column, and an event for every segment but the first.
    """
    parts: dict[str, list[tuple[Ints, Floats]]] = {}
    events: list[Event] = []
    begun: int | None = None
    last = -1
    for segment in segments:
        if segment.first is not None:
            if begun is not None:
                events.append(_resumed(segment, begun, last))
                parts = {name: [_before(segment.first, *part) for part in found] for name, found in parts.items()}
            begun = segment.first if begun is None else min(begun, segment.first)
            last = segment.last or segment.first
        for name, column in segment.columns().items():
            parts.setdefault(name, []).append(column)
    joined: dict[str, tuple[Ints, Floats]] = {}
    for name, found in parts.items():
        if len(found) == 1 and (np.diff(found[0][0]) > 0).all():  # nearly always, and as it is: it may be large
            joined[name] = found[0]
            continue
        steps = np.concatenate([part[0] for part in found])
        values = np.concatenate([part[1] for part in found])
        unique, from_end = np.unique(steps[::-1], return_index=True)
        if len(unique):
            joined[name] = unique, values[len(steps) - 1 - from_end]
    return joined, events


def _before(step: int, steps: Ints, values: Floats) -> tuple[Ints, Floats]:
    kept = steps < step
    return steps[kept], values[kept]


def _resumed(segment: Segment, begun: int, last: int) -> Event:
    assert segment.first is not None
    anew = segment.first <= begun
    if anew:
        what = f"began anew with {segment.label}: what was logged before is left out"
    else:
        what = f"resumed with {segment.label}"
    return Event(segment.first, RESUME, what, {"segment": segment.label, "anew": anew, "logged_before": last})


def lines(path: Path) -> Iterator[str]:
    """Lines of a text file of any size, without NUL bytes; what is no UTF-8 is replaced.

    Raises:
        RecordError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            while raw := file.readline(MAX_LINE):
                yield raw.decode("utf-8", "replace").replace("\0", "").rstrip("\r\n")
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror}).") from error


def objects(path: Path, keys: Sequence[str]) -> Iterator[dict[str, Any] | None]:
    """The JSON objects of a file with one a line; None for a line that is broken, then what could be saved of it.

    Args:
        path: the file.
        keys: an object out of a broken line is one only if it has one of these.
    """
    decoder = json.JSONDecoder()
    for line in lines(path):
        text = line.strip()
        if not text:
            continue
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            yield None
            yield from _saved(text, keys, decoder)
        else:
            yield found if isinstance(found, dict) else None


def _saved(text: str, keys: Sequence[str], decoder: json.JSONDecoder) -> Iterator[dict[str, Any]]:
    """Whole objects of a line that two processes wrote into."""
    place = text.find("{")
    for _ in range(MAX_PIECES):  # a line of nothing but braces would be tried at each
        if place < 0:
            return
        try:
            found, place = decoder.raw_decode(text, place)
            if isinstance(found, dict) and any(key in found for key in keys):
                yield found
        except (ValueError, RecursionError):
            place += 1
        place = text.find("{", place)


def number(value: Any) -> float | None:
    """A JSON value, or a text, as a number; None for what is none."""
    if type(value) is float:  # nearly all of them
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def whole(value: Any) -> int | None:
    """A step as a number; None for what is none."""
    if type(value) is int:
        return value if 0 <= value < LAST_STEP else None
    found = number(value)
    if found is None or not np.isfinite(found) or not 0 <= found < LAST_STEP or found != int(found):
        return None
    return int(found)
