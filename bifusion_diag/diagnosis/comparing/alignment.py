"""Which steps of several runs are set against each other: the same steps, or those after as much of the data.

A run with twice the batch sees twice the scenes by the same step. On the axis *samples*, step s of a run covers the
samples s·k to (s + 1)·k with k = batch size × processes; on the axis *epoch*, k is the share of an epoch that a step
is. Of every run those steps count that lie within the stretch that all runs cover.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.diagnosis.criteria import samples_per_step, steps_per_epoch
from bifusion_diag.diagnosis.phrase import say
from bifusion_diag.errors import UserError, near_matches
from bifusion_diag.record.schema import Run

Axis = Literal["step", "epoch", "samples"]
AXES: tuple[str, ...] = get_args(Axis)
_ROUNDING = 1e-9  # of positions, relative
_NEEDS = {
    "epoch": "how many scenes an epoch has (provenance scenes_per_epoch) and the batch size (training.batch_size)",
    "samples": "its batch size (training.batch_size)",
}


@dataclass(frozen=True)
class Alignment:
    """Steps of runs that are set against each other.

    Attributes:
        axis: what they have in common.
        steps: of each run, ascending.
        scales: of each run, how far one step goes on the axis.
        until: where the common stretch ends, on the axis.
    """

    axis: Axis
    steps: tuple[NDArray[np.int64], ...]
    scales: tuple[float, ...]
    until: float

    @property
    def same_steps(self) -> bool:
        """Whether a step number means the same in all runs."""
        return len({round(scale, 12) for scale in self.scales}) == 1

    def pair(self, baseline: int, candidate: int) -> Alignment:
        """The alignment of two of the runs."""
        chosen = (baseline, candidate)
        return Alignment(
            self.axis, tuple(self.steps[i] for i in chosen), tuple(self.scales[i] for i in chosen), self.until
        )


def align(runs: Sequence[Run], axis: str = "step") -> Alignment:
    """Find the steps of runs that are set against each other.

    Raises:
        UserError: no such axis, a run doesn't tell where it stands on it, or nothing is common to all of them.
    """
    if axis not in AXES:
        raise UserError(f"--align {axis}: no such axis.{near_matches(axis, AXES)}")
    scales = tuple(_scale(run, axis) for run in runs)
    if len({round(scale, 12) for scale in scales}) == 1:  # a step is the same in all
        common = runs[0].steps
        for run in runs[1:]:
            common = np.intersect1d(common, run.steps)
        until = (float(common[-1]) + 1) * scales[0] if common.size else 0.0
        found = Alignment(axis, (common,) * len(runs), scales, until)  # type: ignore[arg-type]
    else:
        if not all(len(run.steps) for run in runs):
            raise UserError(_nothing_common(runs, axis))
        first = max(float(run.steps[0]) * scale for run, scale in zip(runs, scales, strict=True))
        until = min((float(run.steps[-1]) + 1) * scale for run, scale in zip(runs, scales, strict=True))
        slack = _ROUNDING * max(until, 1.0)
        steps = tuple(
            run.steps[(run.steps * scale >= first - slack) & ((run.steps + 1) * scale <= until + slack)]
            for run, scale in zip(runs, scales, strict=True)
        )
        found = Alignment(axis, steps, scales, until)  # type: ignore[arg-type]
    if not all(steps.size for steps in found.steps):
        raise UserError(_nothing_common(runs, axis))
    return found


def _scale(run: Run, axis: str) -> float:
    if axis == "step":
        return 1.0
    if axis == "samples":
        scale = samples_per_step(run)
    else:
        steps = steps_per_epoch(run)
        scale = None if steps is None else 1.0 / steps
    if scale is None:
        raise UserError(
            f"--align {axis}: the record of {run.header.name!r} does not tell {_NEEDS[axis]}. Use --align step."
        )
    return scale


def _nothing_common(runs: Sequence[Run], axis: str) -> str:
    recorded = [(run.header.name, steps_text(run)) for run in runs]
    if len(runs) == 2:
        (left, of_left), (right, of_right) = recorded
        where = f"{left!r} recorded {of_left}, {right!r} {of_right}"
    else:
        where = "; ".join(f"{name!r} recorded {steps}" for name, steps in recorded)
    if axis == "step":
        return f"the runs have no step in common: {where}. Compare runs that cover the same steps."
    return f"the runs have no {axis} in common: {where}. Compare runs that cover the same stretch, or --align step."


def steps_text(run: Run) -> str:
    """Which steps a run recorded, in words."""
    if not len(run.steps):
        return "none"
    return say("steps {first}–{last}", first=int(run.steps[0]), last=int(run.steps[-1]))
