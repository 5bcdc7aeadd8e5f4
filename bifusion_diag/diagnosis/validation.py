"""What a run's validation metrics were measured on, and whether two runs' can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.diagnosis.phrase import say
from bifusion_diag.record.schema import Run, Series


def validation_of(run: Run) -> Mapping[str, Any]:
    """The provenance of the validation scenes; empty where none is recorded."""
    found = run.provenance.get("validation")
    return found if isinstance(found, Mapping) else {}


def against(run: Run) -> str:
    """What mIoU and AP are measured against, where that is not the truth; "" where it is, or was not recorded."""
    return measured_against(validation_of(run))


def measured_against(validation: Mapping[str, Any]) -> str:
    """As :func:`against`, of the provenance of validation scenes."""
    labels = str(validation.get("labels", ""))
    return say("against {labels}", labels=labels) if "pseudo" in labels else ""


def validation_limits(runs: Sequence[tuple[str, Run]]) -> tuple[str, ...]:
    """What has to be said beside the metrics of runs, given by name."""
    limits: list[str] = [
        say(
            "mIoU and AP of {name} are measured {against}: they say how well it agrees with these, not how well it "
            "segments.",
            name=name,
            against=against(run),
        )
        for name, run in runs
        if run.names("eval/") and against(run)
    ]
    evaluated = [run for _, run in runs if run.names("eval/")]
    if len(evaluated) > 1 and not all(map(validation_of, evaluated)):
        limits.append(
            "Which scenes the runs were evaluated on is not recorded: their mIoU and AP may not be comparable."
        )
    elif any(not same_validation(evaluated[0], run) for run in evaluated[1:]):
        limits.append("The runs were evaluated on different scenes: their mIoU and AP cannot be compared.")
    return tuple(limits)


def same_validation(one: Run, other: Run) -> bool:
    """Whether both were measured on the same scenes, points and labels, as far as the records tell.

    Superpoints are the model's means and no part of what it is measured on; what pseudo-labels make of them is recorded
    beside the labels.
    """
    measured_on, other_on = (
        {key: value for key, value in validation_of(run).items() if key != "superpoints"} for run in (one, other)
    )
    return measured_on == other_on


class CommonEvaluation(NamedTuple):
    """A metric of two runs at one moment."""

    step: int  # of the first run
    one: float
    other: float


def common_evaluation(
    one: Run, other: Run, name: str, scales: tuple[float, float] = (1.0, 1.0)
) -> CommonEvaluation | None:
    """At the last moment at which the metric was measured in both; None where there is none.

    Args:
        one: run.
        other: run.
        name: of the metric.
        scales: how far a step of each goes on the axis on which they are compared.
    """
    (steps, values), (other_steps, other_values) = (evaluated_at(run.series(name)) for run in (one, other))
    moments, other_moments = np.round(steps * scales[0], 6), np.round(other_steps * scales[1], 6)
    common, mine, theirs = np.intersect1d(moments, other_moments, return_indices=True)
    if not common.size:
        return None
    return CommonEvaluation(int(steps[mine[-1]]), float(values[mine[-1]]), float(other_values[theirs[-1]]))


def evaluated_at(series: Series | None) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Steps and values (K,) of a metric, without the steps at which it was not measured."""
    if series is None:
        return np.zeros(0, np.int64), np.zeros(0)
    finite = np.isfinite(series.value)
    return series.steps[finite], series.value[finite]
