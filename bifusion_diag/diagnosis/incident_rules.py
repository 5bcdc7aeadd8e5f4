"""The findings that incidents are: one a mechanism and place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bifusion_diag.diagnosis.findings import Context, Evidence, Finding, Severity
from bifusion_diag.diagnosis.incidents import UNKNOWN, RecordedIncident
from bifusion_diag.diagnosis.names import NORM
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity

#: Mechanism, the setting that lets it happen at which values, and the value that cures it.
_CURES = (
    ("empty-selection", "losses.instance.empty_match", ("nan",), "zero"),
    ("nonfinite-input", "model.projection.sanitize", ("replace", "clamp", "none"), "strict"),
)
_NOTED = 3  # numbers of an incident that its finding shows


def incident_findings(context: Context) -> list[Finding] | NotMeasured:
    """One finding a mechanism and place."""
    groups: dict[tuple[str, str | None, tuple[str, ...]], list[RecordedIncident]] = {}
    for incident in context.incidents:
        if incident.mechanism != UNKNOWN:
            key = (incident.mechanism, incident.module, incident.terms[:1])
            groups.setdefault(key, []).append(incident)
    if not groups and not context.watched:
        return NotMeasured("the run was not watched by the flight recorder")
    return [_finding(context, group) for group in groups.values()]


def _finding(context: Context, group: Sequence[RecordedIncident]) -> Finding:
    first = group[0]
    count = len(group)
    evidence = [
        Evidence("steps", Quantity(count, "steps"), NORM),
        Evidence("first step", Quantity(first.step, "step"), NORM),
    ]
    numbers = [(k, v) for k, v in first.evidence.items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    evidence += [Evidence(label, Quantity(float(value)), NORM) for label, value in numbers[:_NOTED]]
    again = sum(incident.identical is True for incident in group)
    mechanism = first.explanation
    if again:
        mechanism += f" {'The step' if count == 1 else f'{again} of {count} steps'} ran again bit for bit."
    severity: Severity = "warning" if first.harmless or first.kind.endswith("spike") else "error"
    remedy, tried = _remedy(context, group)
    place = first.module or (f"loss term {first.terms[0]}" if first.terms else None)
    return Finding(
        f"incident-{first.mechanism}",
        severity,
        f"{first.title} in {place}" if place else first.title,
        tuple(evidence),
        mechanism,
        (first.step, group[-1].step),
        count,
        module=first.module,
        term=first.terms[0] if first.terms else None,
        samples=tuple(name for name, _ in first.samples),
        remedy=remedy,
        tried=tried,
    )


def _remedy(context: Context, group: Sequence[RecordedIncident]) -> tuple[Mapping[str, Any] | None, bool]:
    """The change that did best where it was tried, and that it was; else the one that cures this mechanism."""
    for incident in group:
        for trial in incident.trials:
            if trial.get("patch") and trial.get("helps"):
                return dict(trial["patch"]), True
    for mechanism, key, values, cured in _CURES:
        if group[0].mechanism == mechanism and context.settings.get(key) in values:
            return {key: cured}, False
    return None, False
