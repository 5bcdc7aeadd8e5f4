"""From a full-resolution record to a Run of bounded size, in bounded memory.

R recorded steps are cut into K buckets of consecutive steps, each of which keeps the mean, the extremes and the counts
of non-finite and missing values; statistics are taken over all R values. The loop's own scalars and the losses keep
most buckets, what is of the whole model and what is charted by module fewer, and the many others by module fewest. Of
so many series that no buckets fit, only the statistics are kept, and of still more only the first; an event says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.record import codec
from bifusion_diag.record.document import to_document
from bifusion_diag.record.reader import RecordReader
from bifusion_diag.record.scene_files import snapshots_to
from bifusion_diag.record.schema import FINGERPRINT, Event, Floats, Histogram, Ints, Run, Series, SeriesStats

MAX_BYTES = 5_000_000  # of run.json
MAIN = ("loss/", "train/")
CHARTED = (
    "/param_norm",
    "/state",
    "/ratio",
    "/nonfinite",
)  # of the series by module, what reports draw or look through
BYTES = (1_200_000, 800_000, 1_900_000, 1_100_000)  # of series by rank, should no series be constant
EXACT_COST = 12  # bytes that a number takes on average
BUCKET_COST = 3 * EXACT_COST + 4  # mean, min, max and two counts, which are mostly 0
SERIES_COST = 150  # of a series without its name and buckets: mostly statistics
MAX_BUCKETS = 2000  # more than a plot has pixels
MAX_HISTOGRAM_BUCKETS = 300
MAX_EVENTS = 1000
MAX_FINGERPRINTS = 200  # events that say nothing of what happened, and come every few steps
MAX_STEP_RANGES = 4096
READ_BYTES = 400_000_000  # of columns held in memory at once
GROUP_BYTES = 16_000_000  # of those that are worked on


def reduce_record(reader: RecordReader) -> tuple[Run, str]:
    """Reduce a record until its document fits.

    Returns:
        The run, and its run.json text of at most MAX_BYTES bytes.
    """
    snapshots = reader.snapshots()
    shrink = 1.0 - len(codec.dumps(snapshots_to(snapshots))) / MAX_BYTES if snapshots else 1.0
    while True:
        run = replace(_reduce(reader, shrink), snapshots=snapshots)
        text = codec.dumps(to_document(run))
        size = len(text.encode("utf-8"))
        if size <= MAX_BYTES or shrink < 1e-3:
            return run, text
        shrink *= 0.8 * min(1.0, MAX_BYTES / size)


def _reduce(reader: RecordReader, shrink: float) -> Run:
    """One attempt. `shrink` scales every budget."""
    ranks = _ranks(reader)
    names = _kept(ranks, sum(BYTES) * shrink)
    rows = len(reader.steps)
    all_fit = sum(map(_fixed_cost, names)) + len(names) * rows * EXACT_COST <= sum(BYTES) * shrink
    series: dict[str, Series] = {}
    spare = 0.0  # what the losses and the others by module leave is that of the charted ones, then of the whole model
    for rank in (0, 3, 2, 1):
        part = [name for name in names if ranks[name] == rank]
        borrowed = spare if rank in (2, 1) else 0.0
        room = BYTES[rank] * shrink + borrowed - sum(map(_fixed_cost, part))
        starts = np.arange(rows) if all_fit else _bucket_starts(rows, int(room / max(1, len(part))))
        for one in _series(reader, part, starts):
            series[one.name] = one
        cost = EXACT_COST if len(starts) == rows else BUCKET_COST
        spare += room - len(part) * len(starts) * cost - borrowed
    events = _with_fewer_fingerprints(reader.events(), max(1, int(MAX_FINGERPRINTS * shrink)))
    keep = max(2, int(MAX_EVENTS * shrink)) // 2
    dropped = max(0, len(events) - 2 * keep)
    if dropped:  # the first ones tell the cause, the last ones the end
        events = [*events[:keep], *events[-keep:]]
    if len(names) < len(reader.names):
        message = f"{len(reader.names) - len(names)} of {len(reader.names)} series are only in the .record folder"
        events.append(Event(None, "record", message))
    steps = reader.steps
    if len(codec.pack_steps(steps)) > MAX_STEP_RANGES:
        steps = steps[np.arange(2) * (len(steps) - 1)]
    state = reader.state
    buckets = max(
        2, int(shrink * min(MAX_HISTOGRAM_BUCKETS, 8 * MAX_HISTOGRAM_BUCKETS / (len(reader.histogram_names) + 1)))
    )
    return Run(
        header=state.header,
        status=state.status,
        error=state.error,
        steps=steps,
        all_series={name: series[name] for name in names},
        histograms={name: _histogram(reader, name, buckets) for name in reader.histogram_names},
        events=events,
        measures=state.measures,
        events_dropped=dropped,
    )


def _with_fewer_fingerprints(events: list[Event], most: int) -> list[Event]:
    """The events, with at most so many fingerprints, evenly spread."""
    places = [place for place, event in enumerate(events) if event.kind == FINGERPRINT]
    if len(places) <= most:
        return events
    kept = {places[int((number + 0.5) * len(places) / most)] for number in range(most)}
    return [event for place, event in enumerate(events) if event.kind != FINGERPRINT or place in kept]


def _fixed_cost(name: str) -> int:
    return len(name) + SERIES_COST


def _ranks(reader: RecordReader) -> dict[str, int]:
    """Of every series: 0 a loss or of the loop, 1 of the whole model, 2 charted by module, 3 another by module."""
    modules = {module.name for module in reader.state.header.modules}

    def rank(name: str) -> int:
        if name.startswith(MAIN):
            return 0
        by_module = name.partition("/")[2].rpartition("/")[0] in modules
        return 1 if not by_module else 2 if name.endswith(CHARTED) else 3

    return {name: rank(name) for name in reader.names}


def _kept(ranks: Mapping[str, int], room: float) -> list[str]:
    """The names whose statistics fit, in their order; those of a lower rank come before others."""
    by_rank = sorted(ranks, key=ranks.__getitem__)
    kept = set(by_rank[: int(np.searchsorted(np.cumsum([_fixed_cost(name) for name in by_rank]), room, side="right"))])
    return [name for name in ranks if name in kept]


def _bucket_starts(rows: int, bytes_each: int) -> Ints:
    """First row of every bucket: all rows where the exact series fits into its bytes, one bucket where no two fit."""
    if rows * EXACT_COST <= bytes_each:
        return np.arange(rows, dtype=np.int64)
    buckets = min(MAX_BUCKETS, max(1, bytes_each // BUCKET_COST), rows)
    return np.arange(buckets, dtype=np.int64) * rows // buckets


def _series(reader: RecordReader, names: Sequence[str], starts: Ints) -> Iterator[Series]:
    """The reduced series. Every read goes through the whole record, so it takes many columns; few are worked on."""
    rows = len(reader.steps)
    read = max(1, READ_BYTES // (5 * max(1, rows)))  # a number and whether it is missing
    group = max(1, GROUP_BYTES // (4 * max(1, rows)))
    for begin in range(0, len(names), read):
        part = names[begin : begin + read]
        values, missing = reader.columns(part)
        for first in range(0, len(part), group):
            here = slice(first, first + group)
            with np.errstate(invalid="ignore"):  # of a signalling NaN
                wide = values[:, here].astype(np.float64)
            yield from _reduced(reader, part[here], wide, missing[:, here], starts)


def _reduced(
    reader: RecordReader, names: Sequence[str], values: Floats, missing: NDArray[np.bool_], starts: Ints
) -> Iterator[Series]:
    """C series of R steps: values (R, C), missing (R, C)."""
    steps, units = reader.steps, [reader.state.header.unit(name) for name in names]
    rows = len(steps)
    all_stats = SeriesStats.of_columns(steps, values, missing)
    if len(starts) == rows:
        for i, name in enumerate(names):
            yield Series.from_values(name, steps, values[:, i], missing[:, i], units[i], all_stats[i])
        return
    finite = np.isfinite(values)
    count = np.add.reduceat(finite, starts, dtype=np.int64)
    gone = np.add.reduceat(missing, starts, dtype=np.int64)
    total = np.add.reduceat(np.where(finite, values, 0.0), starts)
    nothing = np.full(count.shape, np.nan)
    mean = np.divide(total, count, out=nothing.copy(), where=count > 0).astype(np.float32).astype(np.float64)
    lowest = np.where(count > 0, np.minimum.reduceat(np.where(finite, values, np.inf), starts), nothing)
    highest = np.where(count > 0, np.maximum.reduceat(np.where(finite, values, -np.inf), starts), nothing)
    ends = np.append(starts[1:], rows)
    bad = (ends - starts)[:, None] - count - gone
    first, last = steps[starts], steps[ends - 1]
    mean, lowest, highest = (np.ascontiguousarray(table.T) for table in (mean, lowest, highest))
    bad, gone = (np.ascontiguousarray(table.T) for table in (bad, gone))
    for i, name in enumerate(names):
        columns = (mean[i], lowest[i], highest[i], bad[i], gone[i])
        yield Series(name, units[i], first, last, ends - starts, *columns, all_stats[i], exact=False)


def _histogram(reader: RecordReader, name: str, buckets: int) -> Histogram:
    edges, steps, counts = reader.histogram(name)
    rows = len(steps)
    if not rows:
        empty = np.zeros(0, np.int64)
        return Histogram(name, edges, empty, empty, np.zeros((0, len(edges) - 1)))
    starts = np.arange(rows) if rows <= buckets else np.arange(buckets) * rows // buckets
    ends = np.append(starts[1:], rows)
    summed = np.add.reduceat(counts.astype(np.float64), starts, axis=0)
    return Histogram(name, edges, steps[starts], steps[ends - 1], summed)
