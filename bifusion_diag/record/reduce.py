"""From a full-resolution record to a Run of bounded size, in bounded memory.

R recorded steps are cut into K buckets of consecutive steps, each of which keeps the mean, the extremes and the counts
of non-finite and missing values; statistics are taken over all R values. The loop's own scalars and the losses keep
more buckets than the many series by module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.record import codec
from bifusion_diag.record.document import to_document
from bifusion_diag.record.reader import RecordReader
from bifusion_diag.record.schema import Floats, Histogram, Ints, Run, Series, SeriesStats

MAX_BYTES = 5_000_000  # of run.json
MAIN = ("loss/", "train/")
MAIN_BYTES = 1_500_000  # budgets of the two kinds of series; the rest is for the header, events and histograms
DETAIL_BYTES = 3_000_000
EXACT_COST = 11  # bytes that a number takes on average
BUCKET_COST = 3 * EXACT_COST + 4  # mean, min, max and two counts, which are mostly 0
MAX_BUCKETS = 2000  # more than a plot has pixels
MAX_HISTOGRAM_BUCKETS = 300
MAX_EVENTS = 1000
MAX_STEP_RANGES = 4096
GROUP_BYTES = 64_000_000  # of columns held in memory at once


def reduce_record(reader: RecordReader) -> tuple[Run, str]:
    """Reduce a record until its document fits.

    Returns:
        The run, and its run.json text of at most MAX_BYTES bytes.
    """
    shrink = 1.0
    while True:
        run = _reduce(reader, shrink)
        text = codec.dumps(to_document(run))
        size = len(text.encode("utf-8"))
        if size <= MAX_BYTES or shrink < 1e-3:
            return run, text
        shrink *= 0.8 * min(1.0, MAX_BYTES / size)


def _reduce(reader: RecordReader, shrink: float) -> Run:
    """One attempt. `shrink` scales every budget."""
    main = [name for name in reader.names if name.startswith(MAIN)]
    detail = [name for name in reader.names if not name.startswith(MAIN)]
    series: dict[str, Series] = {}
    for names, budget in ((main, MAIN_BYTES), (detail, DETAIL_BYTES)):
        starts = _bucket_starts(len(reader.steps), int(budget * shrink / max(1, len(names))))
        for one in _series(reader, names, starts):
            series[one.name] = one
    events = reader.events()
    keep = max(2, int(MAX_EVENTS * shrink)) // 2
    dropped = max(0, len(events) - 2 * keep)
    if dropped:  # the first ones tell the cause, the last ones the end
        events = [*events[:keep], *events[-keep:]]
    steps = reader.steps
    if len(codec.pack_steps(steps)) > MAX_STEP_RANGES:
        steps = steps[_bucket_starts(len(steps), 0)]
    state = reader.state
    buckets = max(
        2, int(shrink * min(MAX_HISTOGRAM_BUCKETS, 8 * MAX_HISTOGRAM_BUCKETS / (len(reader.histogram_names) + 1)))
    )
    return Run(
        header=state.header,
        status=state.status,
        error=state.error,
        steps=steps,
        all_series={name: series[name] for name in reader.names},
        histograms={name: _histogram(reader, name, buckets) for name in reader.histogram_names},
        events=events,
        measures=state.measures,
        events_dropped=dropped,
    )


def _bucket_starts(rows: int, bytes_each: int) -> Ints:
    """First row of every bucket: all rows where the exact series fits into its bytes."""
    if rows * EXACT_COST <= bytes_each or rows <= 2:
        return np.arange(rows, dtype=np.int64)
    buckets = min(MAX_BUCKETS, max(2, bytes_each // BUCKET_COST), rows)
    return np.arange(buckets, dtype=np.int64) * rows // buckets


def _series(reader: RecordReader, names: Sequence[str], starts: Ints) -> Iterator[Series]:
    """The reduced series, read a group of columns at a time."""
    rows = len(reader.steps)
    group = max(1, GROUP_BYTES // (4 * max(1, rows)))
    for begin in range(0, len(names), group):
        part = names[begin : begin + group]
        values, missing = reader.columns(part)
        for i, name in enumerate(part):
            yield _one_series(reader, name, values[:, i].astype(np.float64), missing[:, i], starts)


def _one_series(reader: RecordReader, name: str, values: Floats, missing: NDArray[np.bool_], starts: Ints) -> Series:
    steps, unit = reader.steps, reader.state.header.unit(name)
    rows = len(steps)
    if len(starts) == rows:
        return Series.from_values(name, steps, values, missing, unit)
    finite = np.isfinite(values)
    count = np.add.reduceat(finite, starts, dtype=np.int64)
    gone = np.add.reduceat(missing, starts, dtype=np.int64)
    total = np.add.reduceat(np.where(finite, values, 0.0), starts)
    mean = np.divide(total, count, out=np.full(len(starts), np.nan), where=count > 0)
    lowest = np.minimum.reduceat(np.where(finite, values, np.inf), starts)
    highest = np.maximum.reduceat(np.where(finite, values, -np.inf), starts)
    ends = np.append(starts[1:], rows)
    return Series(
        name=name,
        unit=unit,
        steps=steps[starts],
        last=steps[ends - 1],
        rows=ends - starts,
        value=mean.astype(np.float32).astype(np.float64),
        min=np.where(count > 0, lowest, np.nan),
        max=np.where(count > 0, highest, np.nan),
        nonfinite=ends - starts - count - gone,
        missing=gone,
        stats=SeriesStats.of(steps, values, missing),
        exact=False,
    )


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
