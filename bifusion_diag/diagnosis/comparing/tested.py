"""What is tested of two sides, over their runs, or over the steps where a side is one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.diagnosis.assess import RunAssessment
from bifusion_diag.diagnosis.comparing.alignment import Alignment
from bifusion_diag.diagnosis.comparing.pair import RunComparison
from bifusion_diag.diagnosis.comparing.resampling import (
    BLOCK_RESAMPLES,
    LEAST_RUNS,
    LEVEL,
    MOST_WAYS,
    RESAMPLES,
    block_interval,
    block_length,
    bootstrap_interval,
    holm,
    permutation_p,
    smallest_p,
    ways,
)
from bifusion_diag.diagnosis.definitions import definition_of, is_defined
from bifusion_diag.diagnosis.measures import LISTED_STEPS
from bifusion_diag.diagnosis.names import COEFFICIENT, table
from bifusion_diag.diagnosis.phrase import Phrase, join, say
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity, Reading
from bifusion_diag.diagnosis.restrict import cut_run
from bifusion_diag.diagnosis.verdict import CHANCE, fisher_more
from bifusion_diag.record.schema import Run

#: The measure that the verdict is about, tested by itself and one-sided: more bad steps.
PRIMARY = "bad_steps"
#: Measures that are tested besides, two-sided and corrected for being so many. Of every other one only the interval is
#: given: testing all would leave no power for these.
SECONDARY = (
    "nonfinite_steps",
    "spike_rate",
    "grad_norm/p50",
    "grad_norm/p99",
    "grad_cv",
    "clipped_share",
    "update_ratio/p50",
    "eval/miou",
    "eval/ap50",
)
_PER_STEP = ("bad_steps", "nonfinite_steps", "spikes")  # counts that are compared as shares of the steps
_NO_MEAN = ("steps", "first_nonfinite_step", "bad_steps", "spikes")  # bad_steps stands first, by itself


@dataclass(frozen=True)
class Side:
    """Runs that differ in their seed alone, or that the user put together.

    Attributes:
        name: of the side.
        runs: assessed over the steps that all runs of both sides have; at least one.
        seeds: of the runs, "—" where a run states none.
        why: why these runs were put together.
    """

    name: str
    runs: tuple[RunAssessment, ...]
    seeds: tuple[str, ...]
    why: Phrase


@dataclass(frozen=True)
class Interval:
    """Where a difference lies.

    Attributes:
        low: lower end.
        high: upper end.
        level: of confidence, such as 0.95.
        how: how it was found.
    """

    low: float
    high: float
    level: float
    how: Phrase


@dataclass(frozen=True)
class Tested:
    """One measure of both sides. Counts of steps are shares of the steps here.

    Attributes:
        measure: its key.
        title: in words.
        baseline: mean over the runs of the side that have it.
        candidate: likewise.
        difference: candidate − baseline.
        interval: of the difference; None where nothing can be resampled.
        p: of the test that the statement names; None where there was none.
        statement: what was done, with how many runs, or why it was not.
        p_adjusted: `p` corrected for how many measures were tested.
    """

    measure: str
    title: str
    baseline: Reading
    candidate: Reading
    difference: Reading
    interval: Interval | None
    p: float | None
    statement: Phrase
    p_adjusted: float | None = None


def tested_over_runs(baseline: Side, candidate: Side) -> tuple[Tested, ...]:
    """Every measure that some run of both sides has, resampled and tested over runs."""
    keys = dict.fromkeys(key for run in (*baseline.runs, *candidate.runs) for key in run.measures.readings)
    keys = dict.fromkeys([PRIMARY, *(key for key in keys if key not in _NO_MEAN and is_defined(key))])
    found = [_test_runs(key, baseline, candidate) for key in keys]
    tested = [place for place, one in enumerate(found) if one.p is not None and one.measure in SECONDARY]
    adjusted = holm([found[place].p or 0.0 for place in tested])
    for place, p in zip(tested, adjusted, strict=True):
        found[place] = replace(found[place], p_adjusted=p)
    return tuple(one for one in found if one.measure == PRIMARY or isinstance(one.difference, Quantity))


def _test_runs(key: str, baseline: Side, candidate: Side) -> Tested:
    left, right = ([_value(run, key) for run in side.runs] for side in (baseline, candidate))
    known_left, known_right = ([value for value in side if value is not None] for side in (left, right))
    title = _title(key)
    if not known_left or not known_right:
        gaps = [_gap(side.runs, key) for side in (baseline, candidate)]
        readings = [
            Quantity(float(np.mean(known))) if known else gap
            for known, gap in zip((known_left, known_right), gaps, strict=True)
        ]
        gap = next(gap for gap, known in zip(gaps, (known_left, known_right), strict=True) if not known)
        statement = say("Not tested: {reason}.", reason=gap.reason)
        return Tested(key, title, readings[0], readings[1], gap, None, None, statement)
    counts = len(known_left), len(known_right)
    means = float(np.mean(known_left)), float(np.mean(known_right))
    ends = bootstrap_interval(known_left, known_right)
    interval = None if ends is None else Interval(*ends, LEVEL, say(_BOOTSTRAP, resamples=RESAMPLES))
    p, test = None, say("it was not tested")
    if key == PRIMARY or key in SECONDARY:
        p = permutation_p(known_left, known_right, "greater" if key == PRIMARY else "two-sided")
        test = _test_words(key, *counts) if p is not None else say("a test over runs needs two on each side")
    statement = join(
        [
            say("Means of {left} and {right} runs", left=counts[0], right=counts[1]),
            say("resampled {resamples} times", resamples=RESAMPLES)
            if interval
            else say("no interval: {why}", why=_why_none(known_left, known_right)),
            test,
        ],
        "; ",
    )
    left_mean, right_mean = Quantity(means[0]), Quantity(means[1])
    difference = Quantity(means[1] - means[0])
    adjusted = p if key == PRIMARY else None
    return Tested(key, title, left_mean, right_mean, difference, interval, p, statement, adjusted)


_BOOTSTRAP = (
    "percentile bootstrap over runs, {resamples} resamples, widened for few runs to Student's t (Hesterberg 2015)"
)


def _test_words(key: str, left: int, right: int) -> Phrase:
    number = ways(left, right)
    how = "exact" if number <= MOST_WAYS else "random"
    asked = "one-sided" if key == PRIMARY else "two-sided"
    least = smallest_p(left, right, "greater" if key == PRIMARY else "two-sided")
    return say(
        "{how} permutation test over runs, {asked}, {ways} ways to deal them, smallest possible p {least}",
        how=how,
        asked=asked,
        ways=min(number, MOST_WAYS) if how == "exact" else RESAMPLES,
        least=f"{least:.2g}",
    )


def _why_none(left: Sequence[float], right: Sequence[float]) -> str:
    if min(len(left), len(right)) < LEAST_RUNS:
        return say("it takes {count} runs on each side", count=LEAST_RUNS)
    return "the runs of each side are all alike"


def _value(run: RunAssessment, key: str) -> float | None:
    value = run.measures.number(key)
    if value is None or not math.isfinite(value):
        return None
    return value / run.steps if key in _PER_STEP else value


def bad_share(run: RunAssessment) -> float | None:
    return _value(run, PRIMARY)


def known_shares(side: Side) -> list[float]:
    """The share of bad steps of each run that counts them: what the verdict's test takes."""
    return [share for run in side.runs if (share := bad_share(run)) is not None]


def _gap(runs: Sequence[RunAssessment], key: str) -> NotMeasured:
    for run in runs:
        reading = run.measures.readings.get(key) or run.measures.readings.get(f"{key.split('/')[0]}/*")
        if isinstance(reading, NotMeasured):
            return reading
    return NotMeasured("was not recorded")


def _title(key: str) -> str:
    definition = definition_of(key)
    if key in _PER_STEP:
        return say("{measure}, share of the steps", measure=definition.title)
    if "/" in key:
        return say("{group}: {measure}", group=definition.group, measure=definition.title)
    return definition.title


def say_what_runs_tell(baseline: Side, candidate: Side, tested: Sequence[Tested]) -> Phrase:
    corrected = [one for one in tested if one.p is not None and one.measure in SECONDARY]
    intervals = sum(one.interval is not None for one in tested)
    left, right = (len(known_shares(side)) for side in (baseline, candidate))
    primary = tested[0]
    return join(
        [
            say(
                "Of {left} and {right} runs, the verdict rests on one test: the share of bad steps a run, {test}, "
                "p = {p}, level {level}.",
                left=left,
                right=right,
                test=_test_words(PRIMARY, left, right),
                p=f"{primary.p:.2g}",
                level=f"{CHANCE:g}",
            )
            if primary.p is not None
            else "No test over runs was possible: it takes two runs on each side that count their bad steps.",
            say(
                "{count} more measures were tested two-sided, with Holm's correction for {count} tests ({measures}).",
                count=len(corrected),
                measures=", ".join(one.measure for one in corrected),
            )
            if corrected
            else "",
            say(
                "{count} differences of means have a {level} interval: {how}. They are not corrected for being so "
                "many.",
                count=intervals,
                level=f"{100 * LEVEL:g} %",
                how=say(_BOOTSTRAP, resamples=RESAMPLES),
            )
            if intervals
            else say("There are no intervals: they take {count} runs on each side.", count=LEAST_RUNS),
            say(
                "{baseline}: {why}. {candidate}: {why_right}.",
                baseline=baseline.name,
                why=baseline.why,
                candidate=candidate.name,
                why_right=candidate.why,
            ),
            "Runs were resampled and dealt, never steps.",
        ]
    )


def tested_over_steps(runs: Sequence[Run], pair: RunComparison, alignment: Alignment) -> tuple[Tested, ...]:
    """What can be tested over the steps of two runs; all of it is about these two runs only."""
    sides = (pair.baseline, pair.candidate)
    found = []
    for key in (PRIMARY, "nonfinite_steps", "spike_rate", "clipped_share"):
        values = [_value(side, key) for side in sides]
        left, right = values
        if left is None or right is None:
            gap = _gap([side for side, value in zip(sides, values, strict=True) if value is None], key)
            readings = [gap if value is None else Quantity(value) for value in values]
            statement = say("Not tested: {reason}.", reason=gap.reason)
            found.append(Tested(key, _title(key), readings[0], readings[1], gap, None, None, statement))
            continue
        steps = [_by_step(key, run, side, at) for run, side, at in zip(runs, sides, alignment.steps, strict=True)]
        interval = None
        if steps[0] is not None and steps[1] is not None and (ends := block_interval(steps[0], steps[1])) is not None:
            how = say(
                "moving-block bootstrap within each run, blocks of {length} steps, {resamples} resamples: of these two "
                "runs only",
                length="/".join(map(str, sorted({block_length(one.size) for one in steps if one is not None}))),
                resamples=BLOCK_RESAMPLES,
            )
            interval = Interval(*ends, LEVEL, how)
        p = None
        statement = say("One run a side: not tested.")
        if key == PRIMARY:
            counts = [round(value * side.steps) for value, side in zip(values, sides, strict=True) if value is not None]
            p = fisher_more(counts[1], counts[0], sides[1].steps, sides[0].steps)
            statement = say("Fisher's exact test of bad steps over steps, one-sided, of one run a side.")
        difference = Quantity(right - left)
        found.append(Tested(key, _title(key), Quantity(left), Quantity(right), difference, interval, p, statement, p))
    return tuple(found)


def _by_step(key: str, run: Run, side: RunAssessment, steps: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """1 at the steps (K,) that the measure counts, else 0; None where the record doesn't list them all."""
    measures = side.measures
    if key == "clipped_share":
        series = cut_run(run, steps).series(COEFFICIENT)
        if series is None or not series.exact:
            return None
        values = table(run, [COEFFICIENT], steps)[0]
        return (values[np.isfinite(values)] < 1).astype(np.float64)
    listed = {"nonfinite_steps": (measures.nonfinite,), "spike_rate": (measures.spikes,)}.get(
        key, (measures.nonfinite, measures.spikes)
    )
    if any(len(one) >= LISTED_STEPS for one in listed):
        return None
    return np.isin(steps, [step for one in listed for step in one]).astype(np.float64)


def say_what_one_run_tells(pair: RunComparison, alignment: Alignment) -> Phrase:
    smoothed = [side.name for side in (pair.baseline, pair.candidate) if side.measures.smoothing > 1]
    counted = all(isinstance(side.measures.readings.get(PRIMARY), Quantity) for side in (pair.baseline, pair.candidate))
    return join(
        [
            say(
                "Compared: one run a side, {left} and {right} steps.",
                left=alignment.steps[0].size,
                right=alignment.steps[1].size,
            ),
            say(
                "Tested: bad steps over steps, Fisher's exact test, one-sided, level {level}. It takes steps as "
                "independent; intervals are by moving blocks within each run.",
                level=f"{CHANCE:g}",
            )
            if counted
            else say(
                "Bad steps were not tested: {reason}.",
                reason=say("{names} smoothed", names=", ".join(smoothed))
                if smoothed
                else "they are not measured in both runs",
            ),
            "Both are about these two runs: what another seed would do, one run a side cannot tell.",
        ]
    )
