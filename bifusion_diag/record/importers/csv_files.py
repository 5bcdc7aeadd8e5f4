"""CSV: exports of TensorBoard and of Weights & Biases, Lightning's metrics.csv, and tables with common column names.

An empty cell is a missing value; "NaN" and "inf" are values.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bifusion_diag.record.importers.names import EPOCH, INNER, STEP, is_ours, place_of
from bifusion_diag.record.importers.source import UNKNOWN, Raw, Segment, Smoothing
from bifusion_diag.record.schema import RecordError

FORMAT = "CSV"
DELIMITERS = (",", ";", "\t", "|")
MAX_CELL = 1 << 20
NO_STEPS = "The table has no column of steps: rows are counted from 0."
EPOCHS_ONLY = "The table has no column of steps, only epochs: a step of this record is an epoch."
GUESSED = "The table does not say how many iterations an epoch has: the last one in any epoch is taken for its length."
BUCKETED = (
    "Weights & Biases exported buckets of several steps (its __MIN and __MAX differ): a value is the mean of one."
)
_MISSING = {"", "none", "null", "n/a", "na", "-"}
_TENSORBOARD = ("wall time", "step", "value")
_TENSORBOARD_FILE = re.compile(r"(?:run-(?P<run>.*)-)?tag-(?P<tag>.+)", re.DOTALL)
_PREFIXED = re.compile(r"(?P<run>.+) - (?P<name>[^-].*?)(?P<edge>__MIN|__MAX)?", re.DOTALL)


class Table(NamedTuple):
    """How a file is written."""

    encoding: str
    delimiter: str
    header: list[str]


class _Places(NamedTuple):
    """Columns that say where a row belongs, by their number."""

    step: int | None
    epoch: int | None
    inner: int | None


def look(path: Path) -> Table | None:
    """How a CSV file is written; None of a file that is none.

    Raises:
        RecordError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(1 << 16)
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror}).") from error
    encoding = "utf-8-sig"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    text = head.decode(encoding, "replace").replace("\0", "")
    first = next((line for line in text.splitlines() if line.strip()), "")
    counts = {delimiter: len(next(csv.reader([first], delimiter=delimiter), [])) for delimiter in DELIMITERS}
    delimiter = max(DELIMITERS, key=lambda one: counts[one])
    header = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
    if len(header) < 2 or sum(_number(name, delimiter) is None for name in header) < len(header) / 2:
        return None
    return Table(encoding, delimiter, header)


def runs_in(header: Sequence[str]) -> dict[str, list[int]]:
    """Columns by run of an export of Weights & Biases (``run - train/loss``); empty of another table."""
    found: dict[str, list[int]] = {}
    for number, name in enumerate(header):
        if match := _PREFIXED.fullmatch(name):
            found.setdefault(match["run"], []).append(number)
    return (
        found if any("__MIN" in name for name in header) or len({*header}) - 1 == sum(map(len, found.values())) else {}
    )


def tag_of(path: Path) -> tuple[str, str]:
    """Run and tag of one of TensorBoard's exports, which only its file name tells."""
    match = _TENSORBOARD_FILE.fullmatch(path.stem)
    return (match["run"] or "", match["tag"]) if match else ("", "Value")


def is_tensorboard(table: Table) -> bool:
    """Whether TensorBoard has exported it."""
    return tuple(name.lower() for name in table.header) == _TENSORBOARD


def read(path: Path, name: str, files: Sequence[Path], given: Mapping[str, str]) -> Raw:
    """Read one table, or TensorBoard's exports of one run, a file a tag.

    Args:
        path: what was asked for.
        name: of the run.
        files: the tables.
        given: our names → theirs, as the user says.

    Raises:
        RecordError: a file is no table, or holds several runs.
    """
    raw = Raw(FORMAT, path, name, [], list(files))
    segment = Segment(path.name)
    for file in files:
        table = look(file)
        if table is None:
            raise RecordError(f"{file}: no table: its first line has no column names.")
        if is_tensorboard(table):
            raw.format = "CSV of TensorBoard"
            _add(segment, file, table, raw, {2: tag_of(file)[1]}, _Places(1, None, None))
        else:
            _read_table(segment, file, table, raw, given)
    raw.segments = [segment] if segment.values else []
    if is_ours(segment.columns()):
        raw.smoothing = Smoothing(1, "the values of single steps, as bifusion-diag writes them")
    return raw


def _read_table(segment: Segment, file: Path, table: Table, raw: Raw, given: Mapping[str, str]) -> None:
    runs = runs_in(table.header)
    names = dict(enumerate(table.header))
    if runs:
        raw.format = "CSV of Weights & Biases"
        names = _one_run(file, table.header, runs, given)
    places = _places(table.header, given)
    values = {number: name for number, name in names.items() if number not in places and place_of(name) is None}
    if runs and _bucketed(file, table, runs):
        raw.notes.append(BUCKETED)
        raw.smoothing = UNKNOWN._replace(window=-1)  # the distance of rows
    if file.name == "metrics.csv" and places.step is not None and places.epoch is not None:
        raw.format = "CSV of Lightning"
    _add(segment, file, table, raw, values, places)


def _one_run(
    file: Path, header: Sequence[str], runs: Mapping[str, Sequence[int]], given: Mapping[str, str]
) -> dict[int, str]:
    """Columns of the one run, without its name; of several, of the one that the user's columns are of."""
    asked = {run for run, numbers in runs.items() if {header[number] for number in numbers} & {*given.values()}}
    if len(runs) > 1 and len(asked) != 1:
        raise RecordError(
            f"{file}: {len(runs)} runs in one file: {', '.join(map(repr, list(runs)[:10]))}. Export one, or say which "
            f'with --columns loss="{header[next(iter(runs.values()))[0]]}".'
        )
    run = next(iter(asked or runs))
    names = {}
    for number in runs[run]:
        match = _PREFIXED.fullmatch(header[number])
        assert match is not None
        if not match["edge"]:
            names[number] = header[number] if header[number] in given.values() else match["name"]
    return names


def _bucketed(file: Path, table: Table, runs: Mapping[str, Sequence[int]]) -> bool:
    place = {name: number for number, name in enumerate(table.header)}
    pairs = [
        (place[name], place[name[:-5] + "__MAX"])
        for name in place
        if name.endswith("__MIN") and name[:-5] + "__MAX" in place
    ]
    for count, row in enumerate(_rows(file, table)):
        if any(max(pair) < len(row) and row[pair[0]].strip() != row[pair[1]].strip() for pair in pairs):
            return True
        if count > 10_000:
            break
    return False


def _places(header: Sequence[str], given: Mapping[str, str]) -> _Places:
    """The columns of steps, epochs and iterations; those that the user names come first."""
    found: dict[str, int] = {}
    for number, name in enumerate(header):
        kind = place_of(name)
        if kind and kind not in found:
            found[kind] = number
    for kind in (STEP, EPOCH, INNER):
        if given.get(kind) in header:
            found[kind] = list(header).index(given[kind])
    return _Places(found.get(STEP), found.get(EPOCH), found.get(INNER))


def _add(segment: Segment, file: Path, table: Table, raw: Raw, values: Mapping[int, str], places: _Places) -> None:
    """Add a table's rows."""
    per_epoch, first_epoch = _epoch_length(file, table, places)
    if per_epoch:
        raw.notes.append(GUESSED)
    if places.step is None and places.inner is None:
        raw.notes.append(EPOCHS_ONLY if places.epoch is not None else NO_STEPS)
    for count, row in enumerate(_rows(file, table)):
        if not any(cell.strip() for cell in row):
            continue
        cells = {name: _cell(row, number, table.delimiter, raw) for number, name in values.items()}
        step = _step(row, places, table.delimiter, per_epoch, first_epoch, count)
        if step is None:
            raw.skipped += 1
            continue
        segment.add(step, cells)


def _step(
    row: Sequence[str], places: _Places, delimiter: str, per_epoch: int, first_epoch: int, count: int
) -> int | None:
    inner = places.step if places.step is not None else places.inner
    if inner is None and places.epoch is None:
        return count
    if inner is None:
        return _whole(row, places.epoch, delimiter)
    step = _whole(row, inner, delimiter)
    epoch = _whole(row, places.epoch, delimiter) if per_epoch else None
    return step + (epoch - first_epoch) * per_epoch if step is not None and epoch is not None else step


def _epoch_length(file: Path, table: Table, places: _Places) -> tuple[int, int]:
    """Iterations in an epoch and the first epoch's number, where iterations begin anew in each; else 0, 0."""
    inner = places.step if places.step is not None else places.inner
    if inner is None or places.epoch is None:
        return 0, 0
    highest: dict[int, tuple[int, int]] = {}  # epoch -> lowest and highest iteration
    for row in _rows(file, table):
        step, epoch = _whole(row, inner, table.delimiter), _whole(row, places.epoch, table.delimiter)
        if step is not None and epoch is not None:
            low, high = highest.get(epoch, (step, step))
            highest[epoch] = min(low, step), max(high, step)
    epochs = sorted(highest)
    pairs = list(pairwise(epochs))
    anew = sum(highest[later][0] < highest[epoch][1] for epoch, later in pairs)
    if not pairs or anew <= len(pairs) / 2:
        return 0, 0
    from_zero = min(low for low, _ in highest.values()) == 0
    return max(high for _, high in highest.values()) + from_zero, epochs[0]


def _rows(file: Path, table: Table) -> Iterator[list[str]]:
    """Rows below the header; what is longer than a cell may be ends the table."""
    limit = csv.field_size_limit(MAX_CELL)
    try:
        with file.open(encoding=table.encoding, errors="replace", newline="") as stream:
            reader = csv.reader(_without_nul(stream), delimiter=table.delimiter)
            seen = False
            while True:
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error:
                    continue
                if not seen:
                    seen = any(cell.strip() for cell in row)
                    continue
                yield row
    except OSError as error:
        raise RecordError(f"{file}: cannot be read ({error.strerror}).") from error
    finally:
        csv.field_size_limit(limit)


def _without_nul(stream: io.TextIOBase | Iterator[str]) -> Iterator[str]:
    for line in stream:
        yield line.replace("\0", "")


def _cell(row: Sequence[str], number: int, delimiter: str, raw: Raw) -> float | None:
    """A value; None where it is missing. What is no number is missing and counted."""
    text = row[number].strip() if number < len(row) else ""
    if text.lower() in _MISSING:
        return None
    found = _number(text, delimiter)
    raw.skipped += found is None
    return found


def _whole(row: Sequence[str], number: int | None, delimiter: str) -> int | None:
    found = _number(row[number].strip(), delimiter) if number is not None and number < len(row) else None
    return int(found) if found is not None and np.isfinite(found) and found == int(found) and found >= 0 else None


def _number(text: str, delimiter: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        pass
    if delimiter != "," and text.count(",") == 1 and "." not in text:  # 0,5
        try:
            return float(text.replace(",", "."))
        except ValueError:
            pass
    return None
