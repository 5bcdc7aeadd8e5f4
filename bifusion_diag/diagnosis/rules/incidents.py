"""The findings that incidents are: one a mechanism and place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from bifusion_diag.diagnosis.findings import SEVERITIES, Context, Evidence, Finding, Severity, worst_first
from bifusion_diag.diagnosis.incidents import RecordedIncident
from bifusion_diag.diagnosis.names import NORM
from bifusion_diag.diagnosis.phrase import join, say
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity

PREFIX = "incident-"  # of these findings' rules; the mechanism's id follows
#: Mechanism, the setting that lets it happen at which values, and the value that cures it.
_CURES = (
    ("empty-selection", "losses.instance.empty_match", ("nan",), "zero"),
    ("nonfinite-input", "model.projection.sanitize", ("replace", "clamp", "none"), "strict"),
)
#: Rules that see the same thing from outside, by mechanism.
_SAME = {
    "empty-selection": ("empty-match",),
    "masked-softmax-row": ("attention-masked-rows",),
    "nonfinite-input": ("data-nonfinite", "projection-nonfinite", "nonfinite-output"),
}
_OTHER_RULES = ("non-finite", "spike")  # families of events that other rules find where no incident explains them
_WARNINGS = ("gradient-spike", "loss-spike", "loss-shift", "input-outlier", "rule")  # kinds that training may survive
_SHOWN = 15  # of these findings; the rest are counted
_NOTED = 3  # numbers of an incident that its finding shows
_COST = "the diagnosis took"  # a label that begins so is of the diagnosis itself
_LENGTH = 120  # characters of a label


def incident_findings(context: Context) -> list[Finding] | NotMeasured:
    """One finding a mechanism and place; of incidents without a known mechanism, one a kind and place."""
    groups: dict[Hashable, list[RecordedIncident]] = {}
    for incident in context.incidents:
        if incident.located or incident.family not in _OTHER_RULES:
            key = (incident.mechanism, incident.title, incident.module, incident.terms[:1])
            groups.setdefault(key, []).append(incident)
    if not groups and not context.watched:
        return NotMeasured("the run was not watched by the flight recorder")
    found = sorted((_finding(context, group) for group in groups.values()), key=worst_first)
    rest = found[_SHOWN:]
    if rest:
        steps = [finding.steps for finding in rest if finding.steps is not None]
        count = sum(finding.count or 0 for finding in rest)
        evidence = Evidence("steps taken apart", Quantity(count, "steps"), NORM)
        title = say("{n} more incidents of other kinds or in other places", n=len(rest))
        span = min(first for first, _ in steps), max(last for _, last in steps)
        others = Finding(
            f"{PREFIX}others", rest[0].severity, title, (evidence,), "The record has them all.", span, count
        )
        return [*found[:_SHOWN], others]
    return found


def without_repeats(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Findings without those that only see from outside what an incident explains: it takes over their numbers."""
    repeated: dict[int, list[Finding]] = {}
    for other in findings:
        for place, found in enumerate(findings):
            if other.rule in _SAME.get(found.rule.removeprefix(PREFIX), ()) and _overlap(found, other):
                repeated.setdefault(place, []).append(other)
                break
    gone = {id(other) for others in repeated.values() for other in others}
    kept = [_joined(found, repeated.get(at, [])) for at, found in enumerate(findings) if id(found) not in gone]
    return tuple(sorted(kept, key=worst_first))


def _finding(context: Context, group: Sequence[RecordedIncident]) -> Finding:
    first, last = group[0], group[-1]
    count = len(group)
    evidence = [
        Evidence("steps taken apart", Quantity(count, "steps"), NORM),
        Evidence("first step", Quantity(first.step, "step"), NORM),
    ]
    if first.value is not None and first.limit is not None:
        evidence.append(Evidence(_short(first.alarm) or first.kind, Quantity(first.value), NORM))
        evidence.append(Evidence("the limit for it", Quantity(first.limit), NORM))
    evidence += [Evidence(label, Quantity(value), NORM) for label, value in _numbers(first)[:_NOTED]]
    again = sum(incident.identical is True for incident in group)
    told = [first.explanation or say("{message}.", message=first.message)]
    if again and count == 1:
        told.append(say("Step {step} ran again bit for bit.", step=first.step))
    elif again:
        told.append(say("{again} of {count} steps ran again bit for bit.", again=again, count=count))
    remedy, tried = _remedy(context, group)
    return Finding(
        PREFIX + (first.mechanism if first.explained else first.kind),
        _severity(context, group),
        first.heading,
        tuple(evidence),
        join([*told, tried]),
        (first.step, last.step),
        count,
        module=first.module,
        term=first.terms[0] if first.terms else None,
        samples=next((tuple(sample.label for sample in one.samples) for one in group if one.samples), ()),
        remedy=remedy,
        tried=bool(tried),
        bad_steps=len({incident.step for incident in group} & {*context.measures.bad}),
    )


def _short(text: str) -> str:
    """A label of at most so many letters; cut, it cannot be said in another language."""
    return text if len(text) <= _LENGTH else text[:_LENGTH]


def _numbers(incident: RecordedIncident) -> list[tuple[str, float]]:
    return [
        (_short(label), float(value))
        for label, value in incident.evidence.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not label.startswith(_COST)
        if abs(value) < math.inf
    ]


def _severity(context: Context, group: Sequence[RecordedIncident]) -> Severity:
    bad = {*context.measures.nonfinite}
    survived = [
        incident.harmless
        or incident.by_design
        or incident.kind in _WARNINGS
        or (incident.kind == "nonfinite-input" and incident.step not in bad)  # the step itself was fine
        for incident in group
    ]
    return "warning" if all(survived) else "error"


def _remedy(context: Context, group: Sequence[RecordedIncident]) -> tuple[Mapping[str, Any] | None, str]:
    """The settings that did best where they were tried, and how; else those that cure this mechanism."""
    for incident in group:
        for trial in incident.trials:
            patch = trial.get("patch")
            if isinstance(patch, Mapping) and patch and trial.get("helps") is True and not trial.get("code"):
                how = say(
                    "Tried on step {step}: {name}, {result}.",
                    step=incident.step,
                    name=str(trial.get("name", "this")),
                    result=str(trial.get("result", "it helps")),
                )
                return dict(patch), how
    for mechanism, key, values, cured in _CURES:
        if group[0].mechanism == mechanism and context.settings.get(key) in values:
            return {key: cured}, ""
    return None, ""


def _overlap(found: Finding, other: Finding) -> bool:
    if found.steps is None or other.steps is None:
        return False
    return found.steps[0] <= other.steps[1] and other.steps[0] <= found.steps[1]


def _joined(found: Finding, others: Sequence[Finding]) -> Finding:
    """A finding that says what these say too, in one sentence each and with their numbers."""
    for other in others:
        assert found.steps is not None
        assert other.steps is not None
        several = (other.count or 1) > 1
        said = say("{title} at {count} steps." if several else "{title}.", title=other.title, count=other.count)
        found = dataclasses.replace(
            found,
            severity=min(found.severity, other.severity, key=SEVERITIES.index),
            evidence=(*found.evidence, *(one for one in other.evidence if one.label != "steps")),
            mechanism=join([found.mechanism, said, other.mechanism if other.remedy else ""]),
            steps=(min(found.steps[0], other.steps[0]), max(found.steps[1], other.steps[1])),
            count=max(found.count or 1, other.count or 1),
            remedy=found.remedy or other.remedy,
        )
    return found
