"""Two sides of one or more runs each, compared: what their means differ by, and what a test over the runs says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bifusion_diag.diagnosis.assess import RunAssessment, assess_part
from bifusion_diag.diagnosis.comparing.alignment import Alignment
from bifusion_diag.diagnosis.comparing.alignment import align as align_runs
from bifusion_diag.diagnosis.comparing.attribution import Attribution, Profile, attribute, profile_of
from bifusion_diag.diagnosis.comparing.pair import RunComparison, alignment_limits, compare_parts, distinct_names
from bifusion_diag.diagnosis.comparing.resampling import smallest_p
from bifusion_diag.diagnosis.comparing.sides import RunGroup, seed_of
from bifusion_diag.diagnosis.comparing.suspicion import Suspect
from bifusion_diag.diagnosis.comparing.tested import (
    Interval,
    Side,
    Tested,
    bad_share,
    known_shares,
    say_what_one_run_tells,
    say_what_runs_tell,
    tested_over_runs,
    tested_over_steps,
)
from bifusion_diag.diagnosis.phrase import Phrase, join, say
from bifusion_diag.diagnosis.quantity import Quantity
from bifusion_diag.diagnosis.restrict import cut_run
from bifusion_diag.diagnosis.thresholds import DEFAULT_THRESHOLDS, Thresholds
from bifusion_diag.diagnosis.verdict import CHANCE, State, Verdict
from bifusion_diag.record.schema import Run

__all__ = ["GroupComparison", "Interval", "Side", "Tested", "compare_groups"]


BY_THEMSELVES = "By themselves, {unstable} of {runs} runs are unstable (baseline {before} of {runs_before})."


@dataclass(frozen=True)
class GroupComparison:
    """A candidate side against the baseline side.

    Attributes:
        baseline: side.
        candidate: side.
        verdict: on the candidate side against the baseline side.
        pairs: every run of the candidate side with the first run of the baseline side.
        tested: the measures; the first is what the verdict is about, the others in the order of the definitions.
        attribution: modules and terms that make up the difference of the means, the largest share first.
        suspects: settings that differ between the sides, the most suspect first.
        statement: what was tested and what was not, exactly.
        limits: what the comparison of the sides leaves out.
    """

    baseline: Side
    candidate: Side
    verdict: Verdict
    pairs: tuple[RunComparison, ...]
    tested: tuple[Tested, ...]
    attribution: tuple[Attribution, ...]
    suspects: tuple[Suspect, ...]
    statement: Phrase
    limits: tuple[str, ...] = ()


def compare_groups(
    baseline: RunGroup, candidate: RunGroup, thresholds: Thresholds = DEFAULT_THRESHOLDS, align: str = "step"
) -> GroupComparison:
    """Compare two sides over what all their runs cover.

    Raises:
        UserError: the runs have nothing in common, or one doesn't tell its epochs or samples.
    """
    runs = (*baseline.runs, *candidate.runs)
    count = len(baseline.runs)
    alignment = align_runs(runs, align)
    names = _names(baseline, candidate)
    reference = runs[0]
    assessed = [
        assess_part(run, name, steps, None, thresholds)
        if place < count
        else assess_part(run, name, steps, reference, thresholds, (alignment.scales[0], alignment.scales[place]))
        for place, (run, name, steps) in enumerate(zip(runs, names, alignment.steps, strict=True))
    ]
    pairs = tuple(
        compare_parts((reference, assessed[0]), (runs[place], assessed[place]), alignment.pair(0, place), thresholds)
        for place in range(count, len(runs))
    )
    left, right = (
        Side(group.name, tuple(part), tuple(seed_of(run) for run in group.runs), group.why)
        for group, part in ((baseline, assessed[:count]), (candidate, assessed[count:]))
    )
    alone = len(runs) == 2
    tested = tested_over_steps(runs, pairs[0], alignment) if alone else tested_over_runs(left, right)
    worst = max(pairs, key=lambda pair: bad_share(pair.candidate) or 0.0)
    return GroupComparison(
        baseline=left,
        candidate=right,
        verdict=pairs[0].verdict if alone else _judge_sides(left, right, tested[0], worst),
        pairs=pairs,
        tested=tested,
        attribution=pairs[0].attribution if alone else _attribute(runs, assessed, alignment, count),
        suspects=worst.suspects,
        statement=say_what_one_run_tells(pairs[0], alignment) if alone else say_what_runs_tell(left, right, tested),
        limits=() if alone else alignment_limits(runs, names, alignment),
    )


def _names(baseline: RunGroup, candidate: RunGroup) -> tuple[str, ...]:
    """Different names for all runs; runs of the same name are told apart by their side and seed."""
    runs = (*baseline.runs, *candidate.runs)
    if len(runs) == 2:
        return distinct_names(runs, ("baseline", "candidate"))
    words = [
        say("{side}, seed {seed}", side=side, seed=seed_of(run))
        for side, group in (("baseline", baseline), ("candidate", candidate))
        for run in group.runs
    ]
    names = distinct_names(runs, words)
    if len(set(names)) < len(names):
        names = distinct_names(runs, [say("run {number}", number=place + 1) for place in range(len(runs))])
    return names


def _judge_sides(baseline: Side, candidate: Side, primary: Tested, worst: RunComparison) -> Verdict:
    """The verdict over runs. "Less stable" takes the test; what some seeds alone show is told, and is no verdict."""
    left, right = ([bad_share(run) for run in side.runs] for side in (baseline, candidate))
    difference = primary.difference.value if isinstance(primary.difference, Quantity) else None
    unstable = sum(run.verdict.state == "unstable" for run in candidate.runs)
    unstable_before = sum(run.verdict.state == "unstable" for run in baseline.runs)
    judged = sum(run.verdict.state != "not enough data" for run in candidate.runs)
    shown = primary.p is not None and difference is not None and difference > 0 and primary.p <= CHANCE
    most = 2 * unstable > len(candidate.runs)
    state: State
    if shown:
        state = "less stable"
    elif most and (2 * unstable_before > len(baseline.runs) or unstable == len(candidate.runs)):
        state = "unstable"
    elif (difference or 0.0) > 0 or unstable or not judged or difference is None:
        state = "not enough data"
    else:
        state = "stable"
    words = {
        "stable": "is stable",
        "less stable": say("is less stable than {baseline}", baseline=baseline.name),
        "unstable": "is unstable",
        "not enough data": say("cannot be told from {baseline} yet", baseline=baseline.name),
    }[state]
    sentence = say(
        "{name} {is_what}: {bad} of {runs} runs have bad steps, {share} of the steps on average (baseline {bad_before} "
        "of {runs_before}, {share_before}){test}.",
        name=candidate.name,
        is_what=words,
        bad=sum(bool(value) for value in right),
        runs=len(known_shares(candidate)) or len(right),
        share=_percent(right),
        bad_before=sum(bool(value) for value in left),
        runs_before=len(known_shares(baseline)) or len(left),
        share_before=_percent(left),
        test=_tested_words(primary),
    )
    by_itself = say(
        BY_THEMSELVES,
        unstable=unstable,
        runs=len(right),
        before=unstable_before,
        runs_before=len(left),
    )
    return Verdict(
        state,
        sentence,
        join([by_itself, _too_few(known_shares(baseline), known_shares(candidate), shown)]),
        worst.verdict.remedy,
        worst.verdict.tried,
    )


def _percent(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{100 * float(np.mean(known)):.3g} %" if known else "not measured"


def _tested_words(primary: Tested) -> str:
    if primary.p is None:
        return ""
    return say("; permutation test over runs, one-sided: p = {p}", p=f"{primary.p:.2g}")


def _too_few(left: Sequence[object], right: Sequence[object], shown: bool) -> str:
    """What so few runs cannot show, whatever they are."""
    least = smallest_p(len(left), len(right), "greater")
    if shown or least <= CHANCE or not left or not right:
        return ""
    return say(
        "With {left} and {right} runs no difference can be shown at {level}: the smallest possible p is {least}. Three "
        "seeds a side are the fewest that can.",
        left=len(left),
        right=len(right),
        level=f"{CHANCE:g}",
        least=f"{least:.2g}",
    )


def _attribute(
    runs: Sequence[Run], assessed: Sequence[RunAssessment], alignment: Alignment, count: int
) -> tuple[Attribution, ...]:
    profiles: list[Profile] = [
        profile_of(run, cut_run(run, steps), one.measures)
        for run, one, steps in zip(runs, assessed, alignment.steps, strict=True)
    ]
    return attribute(profiles[:count], profiles[count:])
