"""One run assessed, or two compared, as pure data: everything that terminal, HTML and JSON show comes from here."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.diagnosis.attribution import Attribution
from bifusion_diag.diagnosis.criteria import Criterion, judge
from bifusion_diag.diagnosis.definitions import definition_of, member_of
from bifusion_diag.diagnosis.findings import Context, Finding, Unmeasured, apply_rules
from bifusion_diag.diagnosis.incidents import incidents_of
from bifusion_diag.diagnosis.measures import Measures
from bifusion_diag.diagnosis.modules import ModuleGradient, ModulePair, module_gradients, pair_modules
from bifusion_diag.diagnosis.names import is_exact
from bifusion_diag.diagnosis.parting import Parting, find_partings, first_loss_difference
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity, Reading, number
from bifusion_diag.diagnosis.restrict import cut_run, measure_on
from bifusion_diag.diagnosis.rules import RULES
from bifusion_diag.diagnosis.rules.incidents import without_repeats
from bifusion_diag.diagnosis.settings_diff import SettingGroup, diff_settings
from bifusion_diag.diagnosis.suspicion import Suspect
from bifusion_diag.diagnosis.thresholds import DEFAULT_THRESHOLDS, Thresholds
from bifusion_diag.diagnosis.validation import common_evaluation, same_validation, validation_limits
from bifusion_diag.diagnosis.verdict import Verdict, ending_of, judge_pair, judge_run, with_ending
from bifusion_diag.errors import UserError
from bifusion_diag.record.schema import Run

NAME_LENGTH = 64  # characters of a name in sentences and tables


@dataclass(frozen=True)
class RunAssessment:
    """What one run by itself shows.

    Attributes:
        name: of the run; two runs of a comparison have different ones.
        preset: of its model.
        status: how it ended.
        error: the error's text where it failed.
        steps: how many steps are assessed.
        step_range: the first and the last of them.
        measures: of these steps.
        criteria: of the documents.
        findings: worst first.
        unmeasured: rules that had no data.
        modules: gradients by module, in execution order.
        verdict: on the run by itself.
        limits: what has to be said beside its numbers; of a comparison, see there.
    """

    name: str
    preset: str
    status: str
    error: str | None
    steps: int
    step_range: tuple[int, int]
    measures: Measures
    criteria: tuple[Criterion, ...]
    findings: tuple[Finding, ...]
    unmeasured: tuple[Unmeasured, ...]
    modules: tuple[ModuleGradient, ...]
    verdict: Verdict
    limits: tuple[str, ...] = ()


@dataclass(frozen=True)
class MeasurePair:
    """One measure of both runs; `ratio` is candidate ÷ baseline, None where it means nothing."""

    key: str
    group: str
    title: str
    member: str
    baseline: Reading
    candidate: Reading
    ratio: float | None


@dataclass(frozen=True)
class RunComparison:
    """A candidate against a baseline, over the steps that both recorded.

    Attributes:
        baseline: the baseline over the common steps.
        candidate: the candidate over the common steps.
        verdict: on the candidate against the baseline.
        measures: side by side.
        partings: where the runs part, earliest first; empty where they don't.
        first_loss_difference: first common step with a different loss.
        modules: gradients of the modules that both have, worst first.
        settings: side by side, differences first.
        limits: what cannot be compared, and what the comparison had to leave out.
        attribution: modules and terms that make up the difference, the largest share first.
        suspects: settings that differ, the most suspect first.
    """

    baseline: RunAssessment
    candidate: RunAssessment
    verdict: Verdict
    measures: tuple[MeasurePair, ...]
    partings: tuple[Parting, ...]
    first_loss_difference: int | None
    modules: tuple[ModulePair, ...]
    settings: tuple[SettingGroup, ...]
    limits: tuple[str, ...]
    attribution: tuple[Attribution, ...] = ()
    suspects: tuple[Suspect, ...] = ()


def assess_run(run: Run, thresholds: Thresholds = DEFAULT_THRESHOLDS) -> RunAssessment:
    """Assess one run.

    Raises:
        UserError: the run recorded no step.
    """
    if not len(run.steps):
        raise UserError(
            f"run {run.header.name!r} recorded no step: there is nothing to report. Its status: {run.status}."
        )
    assessment = _assess(run, display_name(run), run.steps, None, thresholds)
    reduced = () if is_exact(run) else ("The record is reduced: curves by module show buckets of several steps.",)
    return replace(assessment, limits=(*reduced, *validation_limits([("this run", run)])))


def compare_runs(baseline: Run, candidate: Run, thresholds: Thresholds = DEFAULT_THRESHOLDS) -> RunComparison:
    """Compare two runs over the steps that both recorded.

    Raises:
        UserError: they have no step in common.
    """
    common = np.intersect1d(baseline.steps, candidate.steps)
    if not common.size:
        raise UserError(
            f"the runs have no step in common: {baseline.header.name!r} recorded {_range(baseline)}, "
            f"{candidate.header.name!r} {_range(candidate)}. Compare runs that cover the same steps."
        )
    names = _distinct_names(baseline, candidate)
    left = _assess(baseline, names[0], common, None, thresholds)
    right = _assess(candidate, names[1], common, baseline, thresholds)
    return RunComparison(
        baseline=left,
        candidate=right,
        verdict=with_ending(
            judge_pair(
                names,
                (left.measures, right.measures),
                common,
                right.findings,
                thresholds,
                incidents_of(cut_run(candidate, common)),
            ),
            candidate,
        ),
        measures=_validation_pairs(_pair_measures(left.measures, right.measures), baseline, candidate, common),
        partings=find_partings((baseline, left.measures), (candidate, right.measures), common),
        first_loss_difference=first_loss_difference(baseline, candidate, common),
        modules=pair_modules(left.modules, right.modules),
        settings=diff_settings(baseline, candidate),
        limits=_limits(baseline, candidate, common),
    )


def _assess(
    run: Run, name: str, steps: NDArray[np.int64], baseline: Run | None, thresholds: Thresholds
) -> RunAssessment:
    measures = measure_on(run, steps)
    part = cut_run(run, steps)
    context = Context(part, measures, thresholds, baseline)
    found, unmeasured = apply_rules(context, RULES)
    findings = without_repeats(found)
    return RunAssessment(
        name=name,
        preset=run.header.preset,
        status=run.status,
        error=run.error,
        steps=int(steps.size),
        step_range=(int(steps[0]), int(steps[-1])),
        measures=measures,
        criteria=judge(part, measures, baseline),
        findings=findings,
        unmeasured=unmeasured,
        modules=module_gradients(part if part.names("grads/") else run),
        verdict=with_ending(judge_run(name, measures, steps, findings, thresholds, context.incidents), run),
    )


def display_name(run: Run) -> str:
    """The run's name on one line, without control characters (they could reorder the text around it), cut if long."""
    name = "".join(
        " " if letter.isspace() else letter
        for letter in run.header.name
        if letter.isspace() or unicodedata.category(letter) not in ("Cc", "Cf", "Cs")
    )
    name = " ".join(name.split())
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH // 2]}…{name[-NAME_LENGTH // 2 + 1 :]}"


def _distinct_names(baseline: Run, candidate: Run) -> tuple[str, str]:
    left, right = display_name(baseline), display_name(candidate)
    return (left, right) if left != right else (f"{left} (baseline)", f"{right} (candidate)")


def _range(run: Run) -> str:
    return f"steps {run.steps[0]}–{run.steps[-1]}" if len(run.steps) else "none"


def _pair_measures(baseline: Measures, candidate: Measures) -> tuple[MeasurePair, ...]:
    """Union of the keys, in the order of the definitions; families that neither run has measured as one line."""
    keys = _merge(list(baseline.readings), list(candidate.readings))
    families = {key.split("/")[0] for key in keys if not key.endswith("/*")}
    pairs = []
    for key in keys:
        if key.endswith("/*") and key.split("/")[0] in families:
            continue  # one run has members of the family, and states the other's gap beside each
        definition = definition_of(key)
        left, right = _with_gap(baseline, key), _with_gap(candidate, key)
        ratio = None if key == "first_nonfinite_step" or key == "steps" else _ratio(left, right)
        pairs.append(MeasurePair(key, definition.group, definition.title, member_of(key), left, right, ratio))
    return tuple(pairs)


def _validation_pairs(
    pairs: Sequence[MeasurePair], baseline: Run, candidate: Run, common: NDArray[np.int64]
) -> tuple[MeasurePair, ...]:
    """Metrics of two runs are set against each other at one step, and not at all where they are of different scenes."""
    comparable = same_validation(baseline, candidate)
    left, right = cut_run(baseline, common), cut_run(candidate, common)
    exact = is_exact(left, "eval/") and is_exact(right, "eval/")

    def at_one_step(pair: MeasurePair) -> MeasurePair:
        if not pair.key.startswith("eval/"):
            return pair
        if not comparable:
            return replace(pair, ratio=None)
        found = common_evaluation(left, right, pair.key) if exact else None
        if found is None:
            return pair
        one, other = Quantity(found.one), Quantity(found.other)
        return replace(pair, baseline=one, candidate=other, ratio=_ratio(one, other))

    return tuple(at_one_step(pair) for pair in pairs)


def _with_gap(measures: Measures, key: str) -> Reading:
    family = measures.readings.get(f"{key.split('/')[0]}/*")
    return measures.readings.get(key) or family or NotMeasured("was not recorded")


def _ratio(baseline: Reading, candidate: Reading) -> float | None:
    left, right = number(baseline), number(candidate)
    if left is None or right is None or left == 0 or left * right < 0:
        return None
    return right / left


def _merge(left: list[str], right: list[str]) -> list[str]:
    """Both lists' entries once each; entries of one list alone stay behind their predecessor."""

    def insert(merged: list[str], item: tuple[int, str]) -> list[str]:
        place, key = item
        if key not in merged:
            merged.insert(merged.index(right[place - 1]) + 1 if place else 0, key)
        return merged

    return reduce(insert, enumerate(right), list(left))


def _limits(baseline: Run, candidate: Run, common: NDArray[np.int64]) -> tuple[str, ...]:
    limits = []
    for word, run in (("baseline", baseline), ("candidate", candidate)):
        if len(run.steps) != common.size:
            limits.append(
                f"The {word} recorded {len(run.steps)} steps ({_range(run)}); the numbers cover the {common.size} "
                "steps that both runs have."
            )
        if not is_exact(run):
            limits.append(
                f"The {word}'s record is reduced: curves by module show buckets of several steps with their extremes."
            )
        if word == "baseline" and (ending := ending_of(run, "The baseline")):
            limits.append(ending)
    only = {
        "baseline": sorted(set(baseline.header.probes) - set(candidate.header.probes)),
        "candidate": sorted(set(candidate.header.probes) - set(baseline.header.probes)),
    }
    for word, probes in only.items():
        if probes:
            limits.append(f"Only the {word} was probed with {', '.join(probes)}: these measures stand alone.")
    return (*limits, *validation_limits((("the baseline", baseline), ("the candidate", candidate))))
