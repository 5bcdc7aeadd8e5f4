"""The verdict: a state word and one sentence with its numbers."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.diagnosis.findings import SEVERITIES, Finding
from bifusion_diag.diagnosis.incidents import RecordedIncident
from bifusion_diag.diagnosis.measures import Measures
from bifusion_diag.diagnosis.phrase import join, say
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity
from bifusion_diag.diagnosis.rules.incidents import PREFIX
from bifusion_diag.diagnosis.thresholds import DEFAULT_THRESHOLDS, Thresholds
from bifusion_diag.record.schema import Run

State = Literal["stable", "less stable", "unstable", "not enough data"]
LOST_STEPS = 10  # a run that ends with so many non-finite steps on end did not recover
ERROR_LENGTH = 200  # characters of an error that the verdict shows
CHANCE = 0.05  # one-sided level at which more bad steps than the baseline's are not put down to chance


_FEW_NONFINITE = (
    "Non-finite are {count} of its {total} steps and none of the baseline's; that alone may be chance (p = {p})."
)


@dataclass(frozen=True)
class Verdict:
    """The answer of the first screen.

    Attributes:
        state: never a score.
        sentence: in plain words.
        detail: a second sentence: where bad steps start, or what a comparison of the counts says; may be "".
        remedy: settings to change, of the worst finding that has one.
        tried: it was tried on a bad step, and helped.
    """

    state: State
    sentence: str
    detail: str = ""
    remedy: Mapping[str, Any] | None = None
    tried: bool = False


def judge_run(
    name: str,
    measures: Measures,
    steps: NDArray[np.int64],
    findings: Sequence[Finding],
    thresholds: Thresholds = DEFAULT_THRESHOLDS,
    incidents: Sequence[RecordedIncident] = (),
) -> Verdict:
    """The verdict on one run by itself: stable, unstable, or not enough data."""
    state = state_of(measures, steps, thresholds)
    words = {"stable": "is stable", "unstable": "is unstable", "not enough data": "cannot be judged yet"}[state]
    lacking = _lacking(measures, steps.size, thresholds) if state == "not enough data" else ""
    numbers = join([_bad_in(measures, steps.size), _first(measures), _tail(measures), lacking], "")
    detail, leading = _where(measures, incidents)
    sentence = say("{name} {is_what}: {numbers}.", name=name, is_what=words, numbers=numbers)
    return Verdict(state, sentence, detail, *_remedy(findings, leading))


def judge_pair(
    names: tuple[str, str],
    measures: tuple[Measures, Measures],
    steps: NDArray[np.int64],
    findings: Sequence[Finding],
    thresholds: Thresholds = DEFAULT_THRESHOLDS,
    incidents: Sequence[RecordedIncident] = (),
    baseline_steps: int | None = None,
) -> Verdict:
    """The verdict on a candidate against a baseline over the steps (K,) that both have.

    *Unstable*: the candidate did not recover (its last 10 steps or at least half of all are non-finite), or it is
    unstable by itself and the baseline has as many bad steps. *Less stable*: it has non-finite steps and the baseline
    has none, or more bad steps than chance explains (Fisher's exact test, one-sided, p < 0.05). *Not enough data*: it
    is unstable by its spikes, but chance may explain that it has more of them than the baseline. Otherwise its own
    state holds.

    Args:
        names: of baseline and candidate.
        measures: of baseline and candidate.
        steps: (K,) the common steps.
        findings: of the candidate.
        thresholds: bounds.
        incidents: of the candidate.
        baseline_steps: how many steps the baseline has, where these are not as many.
    """
    baseline, candidate = measures
    total = steps.size
    total_before = total if baseline_steps is None else baseline_steps
    bad, bad_before = _count(candidate, "bad_steps"), _count(baseline, "bad_steps")
    own = state_of(candidate, steps, thresholds)
    chance = fisher_more(bad, bad_before, total, total_before)
    counted = all(isinstance(one.readings.get("bad_steps"), Quantity) for one in measures)
    known = isinstance(baseline.readings.get("first_nonfinite_step"), Quantity)
    lacking = bool(candidate.nonfinite and known and not baseline.nonfinite)
    more = counted and bad * total_before > bad_before * total
    state: State = own
    if _is_lost(candidate, steps):
        state = "unstable"
    elif lacking or (more and chance < CHANCE):
        state = "less stable"
    elif more and own == "unstable" and not candidate.nonfinite:
        state = "not enough data"
    words = {
        "stable": say("is stable over {steps} steps", steps=total),
        "less stable": say("is less stable than {baseline}", baseline=names[0]),
        "unstable": "is unstable",
        "not enough data": say("cannot be told from {baseline} yet", baseline=names[0]),
    }[state]
    before = _bad(baseline)
    if total_before != total and before != "not measured":
        before = say("{bad} in {steps}", bad=before, steps=total_before)
    counts = say("{bad} (baseline {before})", bad=_bad_in(candidate, total), before=before)
    missing = _lacking(candidate, total, thresholds) if state == "not enough data" else ""
    numbers = join([counts, _first(candidate), _tail(candidate, baseline), missing], "")
    sentence = say("{name} {is_what}: {numbers}.", name=names[1], is_what=words, numbers=numbers)
    detail, leading = _where(candidate, incidents)
    perhaps = (
        say("So few more bad steps than the baseline's may be chance (p = {p}).", p=f"{chance:.2g}")
        if more and not lacking and chance >= CHANCE
        else ""
    )
    if state == "less stable" and lacking and counted and not (more and chance < CHANCE):
        few = _count(candidate, "nonfinite_steps")
        alike = fisher_more(few, 0, total, total_before)
        perhaps = say(_FEW_NONFINITE, count=few, total=total, p=f"{alike:.2g}") if alike >= CHANCE else ""
    return Verdict(state, sentence, join([detail, perhaps]), *_remedy(findings, leading))


def state_of(
    measures: Measures, steps: NDArray[np.int64], thresholds: Thresholds = DEFAULT_THRESHOLDS
) -> Literal["stable", "unstable", "not enough data"]:
    """The state of a run by itself: unstable with any non-finite step, or several spikes that are more than 1 %."""
    rate = measures.number("spike_rate")
    if measures.nonfinite:
        return "unstable"
    if steps.size < thresholds.min_steps or rate is None:
        return "not enough data"
    several = (measures.number("spikes") or 0) > 1  # of a short run, a single spike says nothing about the rate
    return "unstable" if several and rate > thresholds.spike_rate else "stable"


def fisher_more(candidate: int, baseline: int, steps: int, baseline_steps: int | None = None) -> float:
    """Fisher's exact test, one-sided: the chance that, of all bad steps of two runs, at least `candidate` fall to the
    candidate if both runs are alike.

    Args:
        candidate: its bad steps.
        baseline: its bad steps.
        steps: of the candidate.
        baseline_steps: of the baseline, where these are not as many.
    """
    bad = candidate + baseline
    before = steps if baseline_steps is None else baseline_steps

    def log_choose(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    all_ways = log_choose(steps + before, bad)
    least, most = max(candidate, bad - before), min(bad, steps)
    ways = (log_choose(steps, k) + log_choose(before, bad - k) - all_ways for k in range(least, most + 1))
    return min(1.0, math.fsum(math.exp(way) for way in ways))


def _is_lost(measures: Measures, steps: NDArray[np.int64]) -> bool:
    nonfinite = np.isin(steps, np.asarray(measures.nonfinite, dtype=np.int64))
    total = _count(measures, "nonfinite_steps")
    at_the_end = steps.size >= LOST_STEPS and bool(nonfinite[-LOST_STEPS:].all())
    return at_the_end or total * 2 >= steps.size > 0


def _count(measures: Measures, key: str) -> int:
    number = measures.number(key)
    return int(number) if number is not None else len(measures.bad if key == "bad_steps" else measures.nonfinite)


def _bad(measures: Measures) -> str:
    """How many steps are bad; of a reduced or smoothed record at least as many as it shows."""
    reading = measures.readings.get("bad_steps")
    if isinstance(reading, Quantity) and reading.value is not None:
        return str(int(reading.value))
    least = _apart(measures.bad, measures.smoothing)
    return say("at least {number}", number=least) if least else "not measured"


def _apart(steps: Sequence[int], window: int) -> int:
    """How many steps were bad at the least, if the means over so many steps that end at these are."""
    least, last = 0, -math.inf
    for step in steps:
        if step - last >= window:  # no step is part of both means
            least, last = least + 1, step
    return least


def _bad_in(measures: Measures, total: int) -> str:
    bad = _bad(measures)
    reading = measures.readings.get("bad_steps")
    if bad == "not measured":
        if isinstance(reading, NotMeasured):
            return say("its bad steps are not measured ({reason})", reason=reading.reason)
        return "its bad steps are not measured"
    if bad == "0":
        return say("no bad steps in {steps}", steps=total)
    template = "{bad} bad step in {steps}" if bad in ("1", "at least 1") else "{bad} bad steps in {steps}"
    counted = say(template, bad=bad, steps=total)
    if measures.smoothing > 1 and isinstance(reading, NotMeasured):
        return say("{counted} ({reason})", counted=counted, reason=reading.reason)
    return counted


def _lacking(measures: Measures, total: int, thresholds: Thresholds) -> str:
    """What a run that cannot be judged lacks."""
    if total < thresholds.min_steps:
        return say("; calling a run stable takes {steps} steps", steps=thresholds.min_steps)
    spikes = measures.readings.get("spikes")
    if isinstance(spikes, NotMeasured) and _bad(measures) != "not measured":
        return say("; spikes are not measured ({reason})", reason=spikes.reason)
    return ""


def _first(measures: Measures) -> str:
    return say(", first at step {step}", step=measures.bad[0]) if measures.bad else ""


def _tail(measures: Measures, baseline: Measures | None = None) -> str:
    """The third number where there is no first bad step to name: how far the norm's tail reaches."""
    tail = measures.number("grad_norm/p99")
    if measures.bad or tail is None:
        return ""
    before = None if baseline is None else baseline.number("grad_norm/p99")
    if before is None:
        return say("; 99 % of its gradient norms are below {norm}", norm=f"{tail:.3g}")
    return say(
        "; 99 % of its gradient norms are below {norm} (baseline {before})", norm=f"{tail:.3g}", before=f"{before:.3g}"
    )


@dataclass(frozen=True)
class _Start:
    """Where one bad step starts: a place in words, and what the incident or else the record says about it."""

    place: str | None
    scenes: tuple[str, ...]
    incident: RecordedIncident | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Steps with the same are one thing."""
        return self.place or "", self.incident.mechanism if self.incident else ""


def _where(measures: Measures, incidents: Sequence[RecordedIncident]) -> tuple[str, RecordedIncident | None]:
    """Where most of the bad steps start, in a sentence, "" where unknown; and the first incident among these."""
    starts = {origin.step: _Start(origin.place, origin.scenes) for origin in measures.origins}
    for one in incidents:  # a place that was found by running the step again wins over a guess
        if one.located and one.step in measures.bad:
            starts[one.step] = _Start(one.place, tuple(sample.label for sample in one.samples), one)
    counts = Counter(starts[step].key for step in sorted(starts) if starts[step].place is not None)
    if not counts:
        return "", None
    key, count = counts.most_common(1)[0]  # of equally many the earliest
    alike = {step: start for step, start in sorted(starts.items()) if start.place is not None and start.key == key}
    first = next(iter(alike.values()))
    where = first.place or ""
    if first.incident is not None and first.incident.explained:
        where = say("{place} ({mechanism})", place=where, mechanism=_inside_a_sentence(first.incident.title))
    named = next(((step, start.scenes) for step, start in alike.items() if start.scenes), None)
    scenes = ", ".join(named[1]) if named else ""
    if len(starts) == 1:
        if scenes:
            return say("It starts in {place}, on {scenes}.", place=where, scenes=scenes), first.incident
        return say("It starts in {place}.", place=where), first.incident
    on = ""
    if named:
        is_first = named[0] == next(iter(alike))
        on = (
            say(", the first on {scenes}", scenes=scenes)
            if is_first
            else say(", at step {step} on {scenes}", step=named[0], scenes=scenes)
        )
    if measures.smoothing > 1:  # each bad step makes several of these rows
        rows = "Of {total} logged rows that are bad, {count} start in {place}{on}."
        return say(rows, total=len(starts), count=count, place=where, on=on), first.incident
    more = _count(measures, "bad_steps") > len(starts)
    traced = say("the {count} that were traced", count=len(starts)) if more else str(len(starts))
    template = (
        "{count} of {traced} starts in {place}{on}." if count == 1 else "{count} of {traced} start in {place}{on}."
    )
    return say(template, count=count, traced=traced, place=where, on=on), first.incident


def _inside_a_sentence(title: str) -> str:
    """Without its capital, unless the first word is a name such as BatchNorm."""
    return title[:1].lower() + title[1:] if title.split(" ", 1)[0].istitle() else title


def with_ending(verdict: Verdict, run: Run) -> Verdict:
    """The verdict of a run that did not end by itself says so first."""
    ending = ending_of(run, "It")
    return dataclasses.replace(verdict, detail=join([ending, verdict.detail])) if ending else verdict


def ending_of(run: Run, subject: str) -> str:
    """How a run ended that did not complete, in a sentence; "" of a completed one."""
    how = {
        "failed": "failed",
        "interrupted": "was interrupted",
        "running": "was cut short or is still going",
    }.get(run.status)
    if how is None:
        return ""
    lines = (run.error or "").strip().splitlines()
    end = {"subject": subject, "how": how, "step": int(run.steps[-1])}
    if lines:
        return say("{subject} {how} after step {step}: {error}.", error=lines[0][:ERROR_LENGTH].rstrip("."), **end)
    return say("{subject} {how} after step {step}.", **end)


def _remedy(findings: Sequence[Finding], leading: RecordedIncident | None) -> tuple[Mapping[str, Any] | None, bool]:
    """The remedy of the worst finding that has one, and whether it was tried. One that was goes first; of equally bad
    findings, that of the incident that explains most bad steps."""

    def order(found: Finding) -> tuple[bool, int, bool]:
        leads = leading is not None and (found.rule, found.module) == (PREFIX + leading.mechanism, leading.module)
        return not found.tried, SEVERITIES.index(found.severity), not leads

    known = sorted((found for found in findings if found.remedy), key=order)
    return (known[0].remedy, known[0].tried) if known else (None, False)
