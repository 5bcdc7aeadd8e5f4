"""What a run's validation metrics were measured on, and whether two runs' can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.record.schema import Run, Series


def validation_of(run: Run) -> Mapping[str, Any]:
    """The provenance of the validation scenes; empty where none is recorded."""
    found = run.provenance.get("validation")
    return found if isinstance(found, Mapping) else {}


def against(run: Run) -> str:
    """What mIoU and AP are measured against, where that is not the truth; "" where it is, or was not recorded."""
    labels = str(validation_of(run).get("labels", ""))
    return f"against {labels}" if "pseudo" in labels else ""


def validation_limits(runs: Sequence[tuple[str, Run]]) -> tuple[str, ...]:
    """What has to be said beside the metrics of runs, given by name."""
    limits = [
        f"mIoU and AP of {name} are measured {against(run)}: they say how well it agrees with these, not how well it "
        "segments."
        for name, run in runs
        if run.names("eval/") and against(run)
    ]
    evaluated = [run for _, run in runs if run.names("eval/")]
    if any(not same_validation(evaluated[0], run) for run in evaluated[1:]):
        limits.append("The runs were evaluated on different scenes: their mIoU and AP cannot be compared.")
    return tuple(limits)


def same_validation(one: Run, other: Run) -> bool:
    """Whether both were measured on the same scenes, points and labels, as far as the records tell."""
    return validation_of(one) == validation_of(other)


def evaluated_at(series: Series | None) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Steps and values (K,) of a metric, without the steps at which it was not measured."""
    if series is None:
        return np.zeros(0, np.int64), np.zeros(0)
    finite = np.isfinite(series.value)
    return series.steps[finite], series.value[finite]
