"""Two runs compared as pure data: what terminal, HTML and JSON show of them comes from here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

from bifusion_diag.diagnosis.assess import RunAssessment, assess_part
from bifusion_diag.diagnosis.comparing.alignment import Alignment, steps_text
from bifusion_diag.diagnosis.comparing.alignment import align as align_runs
from bifusion_diag.diagnosis.comparing.attribution import Attribution, attribute, profile_of
from bifusion_diag.diagnosis.comparing.parting import Parting, find_partings, first_loss_difference
from bifusion_diag.diagnosis.comparing.suspicion import Suspect, rank_suspects
from bifusion_diag.diagnosis.definitions import definition_of, member_of
from bifusion_diag.diagnosis.incidents import incidents_of
from bifusion_diag.diagnosis.measures import Measures, smoothing_of
from bifusion_diag.diagnosis.modules import ModulePair, pair_modules
from bifusion_diag.diagnosis.names import display_name, is_exact
from bifusion_diag.diagnosis.phrase import join, say
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity, Reading, number
from bifusion_diag.diagnosis.restrict import cut_run
from bifusion_diag.diagnosis.settings_diff import SettingGroup, diff_settings
from bifusion_diag.diagnosis.thresholds import DEFAULT_THRESHOLDS, Thresholds
from bifusion_diag.diagnosis.validation import common_evaluation, same_validation, validation_limits
from bifusion_diag.diagnosis.verdict import Verdict, ending_of, judge_pair, with_ending
from bifusion_diag.record.schema import Run


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


def compare_runs(
    baseline: Run, candidate: Run, thresholds: Thresholds = DEFAULT_THRESHOLDS, align: str = "step"
) -> RunComparison:
    """Compare two runs over the steps that both recorded, or over what covers the same epochs or samples.

    Raises:
        UserError: they have nothing in common, or a run doesn't tell its epochs or samples.
    """
    alignment = align_runs((baseline, candidate), align)
    names = distinct_names((baseline, candidate), ("baseline", "candidate"))
    left = assess_part(baseline, names[0], alignment.steps[0], None, thresholds)
    right = assess_part(candidate, names[1], alignment.steps[1], baseline, thresholds, alignment.scales)
    return compare_parts((baseline, left), (candidate, right), alignment, thresholds)


def compare_parts(
    baseline: tuple[Run, RunAssessment],
    candidate: tuple[Run, RunAssessment],
    alignment: Alignment,
    thresholds: Thresholds = DEFAULT_THRESHOLDS,
) -> RunComparison:
    """Compare two runs that have been assessed over the steps of their alignment."""
    (reference, left), (run, right) = baseline, candidate
    parts = cut_run(reference, alignment.steps[0]), cut_run(run, alignment.steps[1])
    incidents = incidents_of(parts[1])
    verdict = judge_pair(
        (left.name, right.name),
        (left.measures, right.measures),
        alignment.steps[1],
        right.findings,
        thresholds,
        incidents,
        alignment.steps[0].size,
    )
    settings = diff_settings(reference, run)
    return RunComparison(
        baseline=left,
        candidate=right,
        verdict=with_ending(verdict, run),
        measures=_validation_pairs(_pair_measures(left.measures, right.measures), parts, alignment.scales),
        partings=find_partings((reference, left.measures), (run, right.measures), alignment),
        first_loss_difference=first_loss_difference(reference, run, alignment),
        modules=pair_modules(left.modules, right.modules),
        settings=settings,
        limits=(*alignment_limits((reference, run), ("baseline", "candidate"), alignment), *_limits(reference, run)),
        attribution=attribute(
            [profile_of(reference, parts[0], left.measures)], [profile_of(run, parts[1], right.measures)]
        ),
        suspects=rank_suspects(
            settings,
            right.findings,
            right.measures.origins,
            incidents,
            foreign="imported" in {*reference.provenance} ^ {*run.provenance},
        ),
    )


def distinct_names(runs: Sequence[Run], words: Sequence[str]) -> tuple[str, ...]:
    """The names of runs; where some are alike, each with its word behind it."""
    names = [display_name(run) for run in runs]
    return tuple(
        name if names.count(name) == 1 else f"{name} ({word})" for name, word in zip(names, words, strict=True)
    )


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
    pairs: Sequence[MeasurePair], parts: tuple[Run, Run], scales: tuple[float, ...]
) -> tuple[MeasurePair, ...]:
    """Metrics of two runs are set against each other at one moment, and not at all where they are of different scenes.

    Args:
        pairs: of measures.
        parts: both runs, cut to the steps that are compared.
        scales: how far a step of each goes.
    """
    left, right = parts
    comparable = same_validation(left, right)
    exact = is_exact(left, "eval/") and is_exact(right, "eval/")

    def at_one_step(pair: MeasurePair) -> MeasurePair:
        if not pair.key.startswith("eval/"):
            return pair
        if not comparable:
            return replace(pair, ratio=None)
        found = common_evaluation(left, right, pair.key, (scales[0], scales[1])) if exact else None
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


def alignment_limits(runs: Sequence[Run], words: Sequence[str], alignment: Alignment) -> tuple[str, ...]:
    """What an alignment leaves out of runs, each called by its word.

    Words are "baseline" and "candidate", or names.
    """
    limits: list[str] = []
    if not alignment.same_steps:
        paces = join(
            [
                say("{word} {pace} a step", word=word, pace=f"{scale:.6g}")
                for word, scale in zip(words, alignment.scales, strict=True)
            ],
            ", ",
        )
        unit = "samples seen" if alignment.axis == "samples" else "epochs"
        limits.append(
            say(
                "Aligned by {unit}, up to {until}; a step is {paces}. Where runs part, the step is the candidate's.",
                unit=unit,
                until=f"{alignment.until:.6g}",
                paces=paces,
            )
        )
    for word, run, steps in zip(words, runs, alignment.steps, strict=True):
        if len(run.steps) == steps.size:
            continue
        values = {"word": word, "recorded": len(run.steps), "range": steps_text(run), "kept": steps.size}
        if alignment.same_steps:
            template = (
                "The {word} recorded {recorded} steps ({range}); the numbers cover the {kept} steps that both runs "
                "have."
                if len(runs) == 2
                else "The {word} recorded {recorded} steps ({range}); the numbers cover the {kept} steps that all runs "
                "have."
            )
            limits.append(say(template, **values))
        else:
            limits.append(
                say(
                    "The {word} recorded {recorded} steps ({range}); the numbers cover its {kept} steps of the common "
                    "stretch.",
                    **values,
                )
            )
    return tuple(limits)


def _limits(baseline: Run, candidate: Run) -> tuple[str, ...]:
    limits: list[str] = []
    for word, run in (("baseline", baseline), ("candidate", candidate)):
        if not is_exact(run):
            limits.append(
                say(
                    "The {word}'s record is reduced: curves by module show buckets of several steps with their "
                    "extremes.",
                    word=word,
                )
            )
        if (window := smoothing_of(run)) > 1:
            limits.append(
                say(
                    "The {word}'s values are smoothed over {window}: one bad step shows as {window}, so its spikes and "
                    "counts of bad steps are not measured, and not tested against exact ones.",
                    word=word,
                    window=window,
                )
            )
        if (interval := _interval(run)) > window:
            limits.append(
                say(
                    "The {word}'s log has a row every {interval} steps: nothing is known of the other {rest}.",
                    word=word,
                    interval=interval,
                    rest=interval - window,
                )
            )
        if word == "baseline" and (ending := ending_of(run, "The baseline")):
            limits.append(ending)
    only = {
        "baseline": sorted(set(baseline.header.probes) - set(candidate.header.probes)),
        "candidate": sorted(set(candidate.header.probes) - set(baseline.header.probes)),
    }
    for word, probes in only.items():
        if probes:
            limits.append(
                say(
                    "Only the {word} was probed with {probes}: these measures stand alone.",
                    word=word,
                    probes=", ".join(probes),
                )
            )
    return (*validation_limits((("the baseline", baseline), ("the candidate", candidate))), *limits)


def _interval(run: Run) -> int:
    """How many steps a row of an imported log stands for; 1 of our own records."""
    imported = run.provenance.get("imported")
    interval = imported.get("interval") if isinstance(imported, Mapping) else None
    return interval if isinstance(interval, int) and interval > 0 else 1
