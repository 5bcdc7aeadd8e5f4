"""The measures at full resolution, from the folder of a run that is ending: what run.json stores before it is reduced.

The columns that are read whole are those that no module has: of the loop, the losses, the features, the projection and
the gate. Of the many gradients by module only the rows around bad steps are kept. What the statistics of series state
is left out: they are in run.json anyway.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.diagnosis.instruments import instrument_measures
from bifusion_diag.diagnosis.measures import Measures, measure, measures_to_dict
from bifusion_diag.diagnosis.names import is_exact, names_by_module
from bifusion_diag.diagnosis.origins import rows_needed
from bifusion_diag.record.load import load_run, load_with_record, resolve_run
from bifusion_diag.record.reader import RecordReader, read_state
from bifusion_diag.record.schema import RecordError, Run, Series

_GROUP_VALUES = 80_000_000  # values read at once: 320 MB, and 80 MB for which of them are missing


class _Columns(Mapping[str, Series]):
    """Series made on demand from columns (R, C), so that a long run needs one series' arrays at a time."""

    def __init__(self, reader: RecordReader, names: Sequence[str], rows: NDArray[np.int64] | None = None) -> None:
        self._reader = reader
        self._place: dict[str, int] = {name: place for place, name in enumerate(names)}
        self._steps = reader.steps if rows is None else reader.steps[rows]
        self._values = np.empty((len(self._steps), len(names)), np.float32)
        self._missing = np.empty(self._values.shape, bool)
        group = max(1, _GROUP_VALUES // max(1, len(reader.steps)))
        for start in range(0, len(names) if len(self._steps) else 0, group):  # of a run without bad steps no row
            here = slice(start, start + group)
            values, missing = reader.columns(names[here])
            self._values[:, here] = values if rows is None else values[rows]
            self._missing[:, here] = missing if rows is None else missing[rows]

    def __getitem__(self, name: str) -> Series:
        place = self._place[name]
        unit = self._reader.state.header.unit(name)
        return Series.from_values(name, self._steps, self._values[:, place], self._missing[:, place], unit)

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)


def measure_record(reader: RecordReader) -> Measures:
    """Measure a run at full resolution. Store ``measures_to_dict(...)`` of it when the run ends."""
    state = reader.state
    by_module = names_by_module(state.header, reader.names)
    gradients = [name for name in reader.names if name.startswith("grads/")]
    others = [name for name in reader.names if name not in by_module]
    run = Run(state.header, state.status, state.error, reader.steps, _Columns(reader, others), {}, reader.events(), {})
    measures = measure(run)
    rows = rows_needed(reader.steps, measures.bad)
    near_bad = dict(_Columns(reader, gradients, rows))
    traced = measure(dataclasses.replace(run, all_series={**run.all_series, **near_bad}))
    stated = instrument_measures(run)
    readings = {key: reading for key, reading in measures.readings.items() if key not in stated}
    return dataclasses.replace(measures, readings=readings, origins=traced.origins)


def load_measured(path: Path | str) -> Run:
    """Read a run together with its measures at full resolution.

    A long run that was killed never stored its measures: they are taken from its .record folder. Of the folder of a run
    that has ended, the run.json beside it is read: it was made from this very folder, and making it again would take
    minutes.

    Args:
        path: as of :func:`bifusion_diag.record.load_run`.

    Raises:
        RecordError: as of :func:`bifusion_diag.record.load_run`.
    """
    path = resolve_run(path)
    ended = _ended_run(path)
    if ended is not None:
        return ended
    run, record = load_with_record(path)
    if record is None or is_exact(run):
        return run
    return dataclasses.replace(run, measures=measures_to_dict(measure_record(record)))


def _ended_run(folder: Path) -> Run | None:
    """The run of a .record folder as its run.json tells of it, None where there is none of this run."""
    if folder.suffix != ".record" or not folder.is_dir():
        return None
    document = folder.with_name(f"{folder.stem}.json")
    if not document.is_file():
        return None
    try:
        state, run = read_state(folder), load_run(document)
    except RecordError:
        return None
    same = (run.header.run_id, run.status) == (state.header.run_id, state.status)
    return run if same and state.status != "running" else None
