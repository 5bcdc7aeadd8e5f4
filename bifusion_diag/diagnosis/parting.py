"""The step at which the stability of two runs parts.

The losses of two different models differ from the first step on, so a difference as such says nothing. Over the steps
that both runs recorded, three things count as parting:

- *non-finite*: the first step that is non-finite in exactly one run;
- *spike*: the first step that is a spike in exactly one run;
- *drift*: the first of 10 steps on end at which the ratio of the two gradient norms (running medians over 20 steps) is
  more than 4 × larger or smaller than it was over the first 20 common steps.

The earliest one is where the runs part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.diagnosis.measures import LISTED_LAST, LISTED_STEPS, Measures
from bifusion_diag.diagnosis.names import NORM, TOTAL, table
from bifusion_diag.record.schema import Run

DRIFT_WINDOW = 20
DRIFT_FACTOR = 4.0
DRIFT_STEPS = 10


@dataclass(frozen=True)
class Parting:
    """One way in which two runs part.

    Attributes:
        step: where.
        kind: how.
        run: the run that is worse from there on.
        text: in words.
    """

    step: int
    kind: Literal["non-finite", "spike", "drift"]
    run: Literal["baseline", "candidate"]
    text: str


def find_partings(
    baseline: tuple[Run, Measures], candidate: tuple[Run, Measures], common: NDArray[np.int64]
) -> tuple[Parting, ...]:
    """The first parting of each kind, earliest first. `common` are the steps (K,) that both runs recorded."""
    found = [
        _one_sided("non-finite", baseline[1].nonfinite, candidate[1].nonfinite, common),
        _one_sided("spike", baseline[1].spikes, candidate[1].spikes, common),
        _drift(baseline[0], candidate[0], common),
    ]
    return tuple(sorted((parting for parting in found if parting is not None), key=lambda parting: parting.step))


def first_loss_difference(baseline: Run, candidate: Run, common: NDArray[np.int64]) -> int | None:
    """The first common step with a different total loss; None where all are equal or a series is reduced or missing.

    Two NaN at the same step do not differ.
    """
    pair = baseline.series(TOTAL), candidate.series(TOTAL)
    if pair[0] is None or pair[1] is None or not (pair[0].exact and pair[1].exact):
        return None
    left, right = table(baseline, [TOTAL], common)[0], table(candidate, [TOTAL], common)[0]
    differs = (left != right) & ~(np.isnan(left) & np.isnan(right))
    return int(common[np.argmax(differs)]) if differs.any() else None


def _one_sided(
    kind: Literal["non-finite", "spike"],
    baseline: tuple[int, ...],
    candidate: tuple[int, ...],
    common: NDArray[np.int64],
) -> Parting | None:
    steps = sorted({*baseline} ^ {*candidate})
    for listed in (baseline, candidate):
        if len(listed) == LISTED_STEPS:  # no more may be known of what comes between
            steps = [step for step in steps if step <= listed[-LISTED_LAST - 1]]
    step = next((step for step in steps if _holds(common, step)), None)
    if step is None:
        return None
    run: Literal["baseline", "candidate"] = "candidate" if step in candidate else "baseline"
    other = "baseline" if run == "candidate" else "candidate"
    what = {
        "non-finite": f"the {run} is non-finite, the {other} is not",
        "spike": f"the gradient norm of the {run} has a spike, that of the {other} has none",
    }[kind]
    return Parting(step, kind, run, what)


def _holds(common: NDArray[np.int64], step: int) -> bool:
    place = int(np.searchsorted(common, step))
    return place < common.size and int(common[place]) == step


def _drift(baseline: Run, candidate: Run, common: NDArray[np.int64]) -> Parting | None:
    pair = baseline.series(NORM), candidate.series(NORM)
    if pair[0] is None or pair[1] is None or not (pair[0].exact and pair[1].exact):
        return None
    left, right = table(baseline, [NORM], common)[0], table(candidate, [NORM], common)[0]
    usable = np.isfinite(left) & np.isfinite(right) & (left > 0) & (right > 0)
    steps, left, right = common[usable], left[usable], right[usable]
    if steps.size < DRIFT_WINDOW + DRIFT_STEPS:
        return None
    ratio = np.log(running_median(right, DRIFT_WINDOW) / running_median(left, DRIFT_WINDOW))
    away = ratio - ratio[0]
    beyond = np.abs(away) > np.log(DRIFT_FACTOR)
    held = np.lib.stride_tricks.sliding_window_view(beyond, DRIFT_STEPS).all(axis=1)
    if not held.any():
        return None
    first = int(np.argmax(held))
    step = int(steps[first + DRIFT_WINDOW - 1])  # the window ends here
    run: Literal["baseline", "candidate"] = "candidate" if away[first] > 0 else "baseline"
    text = (
        f"the gradient norm of the {run} has grown more than {DRIFT_FACTOR:g} × against the other run's since the start"
    )
    return Parting(step, "drift", run, text)


def running_median(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Median of every `window` consecutive values: (K - window + 1,)."""
    windows = np.lib.stride_tricks.sliding_window_view(values, window)
    return np.concatenate(
        [np.median(windows[start : start + 65_536], axis=1) for start in range(0, len(windows), 65_536)]
    )
