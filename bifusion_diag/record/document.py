"""A run as a run.json document and back. The published schema is run.schema.json."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from bifusion_diag.record import codec
from bifusion_diag.record.scene_files import snapshots_from, snapshots_to
from bifusion_diag.record.schema import (
    SCHEMA_VERSION,
    STATUSES,
    Event,
    Histogram,
    Ints,
    ModuleInfo,
    RecordError,
    Run,
    RunHeader,
    Series,
    SeriesStats,
)

KIND = "bifusion-diag run"
Grids = dict[tuple[bytes, ...], int]  # key of a grid -> its index


def check_version(document: Any, where: object) -> None:
    """Refuse what is not a run record, and what a newer version wrote.

    Raises:
        RecordError: saying which of the two.
    """
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise RecordError(f'{where}: not a run record (expected "kind": "{KIND}"). Was it written by bifusion-diag?')
    version = str(document.get("schema_version"))
    ours = SCHEMA_VERSION.split(".")[0]
    major = version.split(".")[0]
    if not major.isdecimal():
        raise RecordError(f"{where}: damaged: schema_version is {version!r}; expected something like {SCHEMA_VERSION}")
    if int(major) > int(ours):
        raise RecordError(
            f"{where}: written with schema version {version}, this program reads {ours}.x. Update bifusion-diag."
        )


def header_from(document: dict[str, Any]) -> RunHeader:
    """The header of a document. Keys that a newer minor version added are left out."""
    known = {field.name for field in dataclasses.fields(RunHeader)}
    header = RunHeader(**{key: codec.decode(value) for key, value in document.items() if key in known})
    header.modules = [ModuleInfo(**module) for module in document.get("modules", [])]
    return header


def header_to(header: RunHeader) -> dict[str, Any]:
    """The inverse of :func:`header_from`."""
    document: dict[str, Any] = codec.encode(
        {field.name: getattr(header, field.name) for field in dataclasses.fields(header) if field.name != "modules"}
    )
    document["modules"] = [dataclasses.asdict(module) for module in header.modules]
    return document


def event_from(document: dict[str, Any]) -> Event:
    """An event of a document."""
    return Event(document["step"], document["kind"], document["message"], codec.decode(document["data"]))


def event_to(event: Event) -> dict[str, Any]:
    """The inverse of :func:`event_from`."""
    encoded: dict[str, Any] = codec.encode(dataclasses.asdict(event))
    return encoded


def to_document(run: Run) -> dict[str, Any]:
    """A run as strict JSON can hold it."""
    grids: Grids = {}
    tables: list[dict[str, Any]] = []
    series = {name: _series_to(one, grids, tables) for name, one in run.all_series.items()}
    return {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "status": run.status,
        "error": run.error,
        "header": header_to(run.header),
        "steps": codec.pack_steps(run.steps),
        "grids": tables,
        "series": series,
        "histograms": {name: _histogram_to(one) for name, one in run.histograms.items()},
        "events": [event_to(event) for event in run.events],
        "events_dropped": run.events_dropped,
        "measures": codec.encode(run.measures),
        **({"snapshots": snapshots_to(run.snapshots)} if run.snapshots else {}),
    }


def from_document(document: dict[str, Any]) -> Run:
    """The inverse of :func:`to_document`.

    Raises:
        KeyError, TypeError, ValueError: the document does not follow the schema.
    """
    if document["status"] not in STATUSES:
        raise ValueError(f"status is {document['status']!r}")
    grids = [_grid_from(grid) for grid in document["grids"]]
    return Run(
        header=header_from(document["header"]),
        status=document["status"],
        error=document["error"],
        steps=codec.unpack_steps(document["steps"]),
        all_series={name: _series_from(name, one, grids) for name, one in document["series"].items()},
        histograms={name: _histogram_from(name, one) for name, one in document["histograms"].items()},
        events=[event_from(event) for event in document["events"]],
        measures=codec.decode(document["measures"]),
        events_dropped=document["events_dropped"],
        snapshots=snapshots_from(document["snapshots"]) if "snapshots" in document else (),  # since version 2.1
    )


def _grid_of(series: Series, grids: Grids, tables: list[dict[str, Any]]) -> int:
    """Index of the series' buckets among the grids, added there if they are new."""
    key = (series.steps.tobytes(), series.last.tobytes(), series.rows.tobytes())
    if key not in grids:
        grids[key] = len(tables)
        if series.exact:
            tables.append({"exact": True, "steps": codec.pack_steps(series.steps)})
        else:
            first, last, rows = (array.tolist() for array in (series.steps, series.last, series.rows))
            tables.append({"exact": False, "first": first, "last": last, "rows": rows})
    return grids[key]


def _grid_from(document: dict[str, Any]) -> tuple[Ints, Ints, Ints, bool]:
    """First step, last step and number of rows of each bucket, and whether every bucket is one step."""
    if document["exact"]:
        steps = codec.unpack_steps(document["steps"])
        return steps, steps, np.ones(len(steps), np.int64), True
    first, last, rows = (np.asarray(document[key], dtype=np.int64) for key in ("first", "last", "rows"))
    if not len(first) == len(last) == len(rows):
        raise ValueError("a grid's first, last and rows differ in length")
    return first, last, rows, False


def _series_to(series: Series, grids: Grids, tables: list[dict[str, Any]]) -> dict[str, Any]:
    document = {"unit": series.unit, "grid": _grid_of(series, grids, tables), "stats": _stats_to(series.stats)}
    if series.exact:
        return document | {"value": codec.pack_floats(series.value, series.missing > 0)}
    if len(series.steps) == 1:  # the statistics are its only bucket
        return document
    empty = np.isnan(series.min)
    return document | {
        "value": codec.pack_floats(series.value, empty),
        "min": codec.pack_floats(series.min, empty),
        "max": codec.pack_floats(series.max, empty),
        "nonfinite": codec.pack_counts(series.nonfinite),
        "missing": codec.pack_counts(series.missing),
    }


def _series_from(name: str, document: dict[str, Any], grids: list[tuple[Ints, Ints, Ints, bool]]) -> Series:
    steps, last, rows, exact = grids[document["grid"]]
    stats = _stats_from(document["stats"])
    if not exact and "value" not in document:
        return _one_bucket(name, document["unit"], (steps, last, rows), stats)
    value, missing = codec.unpack_floats(document["value"], len(steps))
    if exact:
        return dataclasses.replace(Series.from_values(name, steps, value, missing, document["unit"]), stats=stats)
    lowest, _ = codec.unpack_floats(document["min"], len(steps))
    highest, _ = codec.unpack_floats(document["max"], len(steps))
    nonfinite, gone = (codec.unpack_counts(document[key], len(steps)) for key in ("nonfinite", "missing"))
    return Series(
        name, document["unit"], steps, last, rows, value, lowest, highest, nonfinite, gone, stats, exact=False
    )


def _one_bucket(name: str, unit: str, grid: tuple[Ints, Ints, Ints], stats: SeriesStats) -> Series:
    """A series of which only statistics were kept: one bucket of all steps."""
    if len(grid[0]) != 1:
        raise ValueError(f"series {name} has no values")
    numbers = [stats.mean, stats.min, stats.max]
    value, lowest, highest = (np.array([np.nan if number is None else number]) for number in numbers)
    nonfinite, gone = (np.array([number], np.int64) for number in (stats.nonfinite, stats.missing))
    return Series(name, unit, *grid, value, lowest, highest, nonfinite, gone, stats, exact=False)


def _stats_to(stats: SeriesStats) -> list[Any]:
    """In the order of the fields: the counts and the first step, then the eight measured numbers."""
    *counts, first, low, high, mean, p1, p5, p50, p95, p99 = dataclasses.astuple(stats)
    numbers = [low, high, mean, p1, p5, p50, p95, p99]
    return [*counts, first, *(numbers if low is None else codec.shortest(np.array(numbers)))]


def _stats_from(document: Any) -> SeriesStats:
    if isinstance(document, dict):  # schema version 1
        return SeriesStats(**{key: codec.decode(value) for key, value in document.items()})
    *counts, low, high, mean, p1, p5, p50, p95, p99 = document
    numbers = [None if n is None else float(np.float32(n)) for n in (low, high, mean, p1, p5, p50, p95, p99)]
    return SeriesStats(*counts, *numbers)


def _histogram_to(histogram: Histogram) -> dict[str, Any]:
    return {
        "edges": histogram.edges.tolist(),
        "first": histogram.steps.tolist(),
        "last": histogram.last.tolist(),
        "counts": [codec.pack_counts(row) for row in histogram.counts],
    }


def _histogram_from(name: str, document: dict[str, Any]) -> Histogram:
    edges = np.asarray(document["edges"], dtype=np.float64)
    first, last = (np.asarray(document[key], dtype=np.int64) for key in ("first", "last"))
    rows = [codec.unpack_counts(row, len(edges) - 1) for row in document["counts"]]
    counts = np.asarray(rows, dtype=np.float64).reshape(len(rows), len(edges) - 1)
    if not len(first) == len(last) == len(rows):
        raise ValueError(f"histogram {name}: first, last and counts differ in length")
    return Histogram(name, edges, first, last, counts)
