"""The step at which the stability of two runs parts.

The losses of two different models differ from the first step on, so a difference as such says nothing. Over the steps
that both runs recorded, three things count as parting:

- *non-finite*: the first step that is non-finite in exactly one run;
- *spike*: the first step that is a spike in exactly one run;
- *drift*: the first of 10 steps on end at which the ratio of the two gradient norms (running medians over 20 steps) is
  more than 4 × larger or smaller than it was over the first 20 common steps.

The earliest one is where the runs part. Runs that are aligned by epochs or samples and go on at different paces have no
steps in common: there a bad step of one run stands against the steps of the other that cover the same samples, and the
norms are taken at the steps of the run with the longer ones. The step that is named is then the candidate's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.diagnosis.comparing.alignment import Alignment
from bifusion_diag.diagnosis.measures import LISTED_LAST, LISTED_STEPS, Measures
from bifusion_diag.diagnosis.names import NORM, TOTAL, table
from bifusion_diag.diagnosis.phrase import say
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
    baseline: tuple[Run, Measures], candidate: tuple[Run, Measures], alignment: Alignment
) -> tuple[Parting, ...]:
    """The first parting of each kind, earliest first. `alignment` is that of the two runs."""
    if alignment.same_steps:
        common = alignment.steps[0]
        found = [
            _one_sided("non-finite", baseline[1].nonfinite, candidate[1].nonfinite, common),
            _one_sided("spike", baseline[1].spikes, candidate[1].spikes, common),
            _drift(baseline[0], candidate[0], common, common),
        ]
    else:
        found = [
            _one_sided_apart("non-finite", baseline[1].nonfinite, candidate[1].nonfinite, alignment),
            _one_sided_apart("spike", baseline[1].spikes, candidate[1].spikes, alignment),
            _drift(baseline[0], candidate[0], *_steps_side_by_side(alignment)),
        ]
    return tuple(sorted((parting for parting in found if parting is not None), key=lambda parting: parting.step))


def first_loss_difference(baseline: Run, candidate: Run, alignment: Alignment) -> int | None:
    """The first common step with a different total loss.

    None where all are equal, a series is reduced or missing, or the runs have no steps in common. Two NaN at the same
    step do not differ.
    """
    pair = baseline.series(TOTAL), candidate.series(TOTAL)
    if pair[0] is None or pair[1] is None or not (pair[0].exact and pair[1].exact) or not alignment.same_steps:
        return None
    common = alignment.steps[0]
    left, right = table(baseline, [TOTAL], common)[0], table(candidate, [TOTAL], common)[0]
    differs = (left != right) & ~(np.isnan(left) & np.isnan(right))
    return int(common[np.argmax(differs)]) if differs.any() else None


def _steps_side_by_side(alignment: Alignment) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Steps (K,) of both runs that end at about the same place: each of the longer ones with the other run's last."""
    (left, right), (of_left, of_right) = alignment.steps, alignment.scales
    if of_left >= of_right:
        return left, _last_by((left + 1) * of_left, right, of_right)
    return _last_by((right + 1) * of_right, left, of_left), right


def _last_by(ends: NDArray[np.floating[Any]], steps: NDArray[np.int64], scale: float) -> NDArray[np.int64]:
    place = np.searchsorted((steps + 1) * scale, ends * (1 + 1e-9), side="right") - 1
    return steps[place.clip(min=0)]


def _one_sided_apart(
    kind: Literal["non-finite", "spike"], baseline: tuple[int, ...], candidate: tuple[int, ...], alignment: Alignment
) -> Parting | None:
    """The first bad step of one run in whose stretch the other run has none."""
    of_left, of_right = alignment.scales
    left = [(step * of_left, (step + 1) * of_left) for step in baseline]
    right = [(step * of_right, (step + 1) * of_right) for step in candidate]

    def first_alone(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> float | None:
        starts, ends = (np.asarray([pair[i] for pair in other]) for i in (0, 1))
        slack = 1e-9 * max(alignment.until, 1.0)
        return next((a for a, b in one if not ((starts < b - slack) & (ends > a + slack)).any()), None)

    found = [
        (place, run)
        for place, run in ((first_alone(left, right), "baseline"), (first_alone(right, left), "candidate"))
        if place is not None
    ]
    if not found:
        return None
    place, run = min(found)
    return _parting(int(place / of_right + 1e-9), kind, "candidate" if run == "candidate" else "baseline")


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
    return _parting(step, kind, run)


def _parting(step: int, kind: Literal["non-finite", "spike"], run: Literal["baseline", "candidate"]) -> Parting:
    other = "baseline" if run == "candidate" else "candidate"
    what = {
        "non-finite": say("the {run} is non-finite, the {other} is not", run=run, other=other),
        "spike": say("the gradient norm of the {run} has a spike, that of the {other} has none", run=run, other=other),
    }[kind]
    return Parting(step, kind, run, what)


def _holds(common: NDArray[np.int64], step: int) -> bool:
    place = int(np.searchsorted(common, step))
    return place < common.size and int(common[place]) == step


def _drift(
    baseline: Run, candidate: Run, baseline_steps: NDArray[np.int64], candidate_steps: NDArray[np.int64]
) -> Parting | None:
    """Of the norms at steps (K,) of the baseline and those (K,) of the candidate that stand against them."""
    pair = baseline.series(NORM), candidate.series(NORM)
    if pair[0] is None or pair[1] is None or not (pair[0].exact and pair[1].exact):
        return None
    left, right = table(baseline, [NORM], baseline_steps)[0], table(candidate, [NORM], candidate_steps)[0]
    usable = np.isfinite(left) & np.isfinite(right) & (left > 0) & (right > 0)
    steps, left, right = candidate_steps[usable], left[usable], right[usable]
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
    text = say(
        "the gradient norm of the {run} has grown more than {factor} × against the other run's since the start",
        run=run,
        factor=f"{DRIFT_FACTOR:g}",
    )
    return Parting(step, "drift", run, text)


def running_median(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Median of every `window` consecutive values: (K - window + 1,)."""
    windows = np.lib.stride_tricks.sliding_window_view(values, window)
    return np.concatenate(
        [np.median(windows[start : start + 65_536], axis=1) for start in range(0, len(windows), 65_536)]
    )
