"""A run cut to some of its steps, so that two runs are compared over the steps that both have."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.diagnosis.measures import Measures, measure
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity, Reading
from bifusion_diag.record.schema import Run, Series

_CANNOT_CUT = NotMeasured("the record is reduced: it cannot be cut to the common steps")


def measure_on(run: Run, steps: NDArray[np.int64]) -> Measures:
    """Measure a run over some of its steps (K,), ascending.

    Series that the record holds in reduced form cannot be cut; measures that need them are "not measured", and origins
    of bad steps are taken from those stored when the run ended.
    """
    whole = measure(run)
    if np.array_equal(run.steps, steps):
        return whole
    cut = cut_run(run, steps)
    part = measure(cut)
    if len(cut.all_series) == len(run.all_series):
        return part
    readings: dict[str, Reading] = dict(part.readings)
    for key, reading in whole.readings.items():
        if not isinstance(readings.get(key), Quantity):
            readings[key] = _CANNOT_CUT if isinstance(reading, Quantity) else reading
    bad = {*part.nonfinite, *part.spikes}
    return dataclasses.replace(
        part, readings=readings, origins=tuple(origin for origin in whole.origins if origin.step in bad)
    )


def cut_run(run: Run, steps: NDArray[np.int64]) -> Run:
    """The run with its exact series cut to some of its steps (K,), and without what cannot be cut."""
    if np.array_equal(run.steps, steps):
        return run
    cut = {name: _cut(series, steps) for name, series in run.all_series.items() if series.exact}
    return dataclasses.replace(run, steps=steps, all_series=cut, histograms={}, measures={})


def _cut(series: Series, steps: NDArray[np.int64]) -> Series:
    kept = np.isin(series.steps, steps)
    return Series.from_values(
        series.name, series.steps[kept], series.value[kept], series.missing[kept] > 0, series.unit
    )
