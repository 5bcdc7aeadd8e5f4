"""The incidents of a run as the page shows them: what happened, where, why, and what was tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bifusion_diag.diagnosis.incidents import RecordedIncident, incidents_of
from bifusion_diag.record.schema import Run
from bifusion_diag.reports.numbers import text

SHOWN = 20  # incidents of a run that the page shows in full; the rest are in the record
AROUND = 6  # modules of the trace before the first bad one, and after it
_EVIDENCE = 12


@dataclass(frozen=True)
class TraceLine:
    """One module of the trace."""

    module: str
    inputs: str
    outputs: str
    gradient: str
    bad: bool  # the first whose outputs or gradients are not finite


@dataclass(frozen=True)
class TrialLine:
    """One remedy that was tried."""

    name: str
    patch: str
    result: str
    grad_norm: str
    loss: str
    cost: str


@dataclass(frozen=True)
class IncidentArticle:
    """One incident."""

    incident: RecordedIncident
    again: str
    where: str
    evidence: list[tuple[str, str]]
    trace: list[TraceLine]
    trials: list[TrialLine]


@dataclass(frozen=True)
class IncidentGroup:
    """The incidents of one run."""

    name: str
    articles: list[IncidentArticle]
    left_out: int


def incident_groups(names: Sequence[str], runs: Sequence[Run]) -> list[IncidentGroup]:
    """Of every run that has incidents."""
    groups = []
    for name, run in zip(names, runs, strict=True):
        incidents = incidents_of(run)
        if incidents:
            articles = [_article(incident) for incident in incidents[:SHOWN]]
            groups.append(IncidentGroup(name, articles, len(incidents) - len(articles)))
    return groups


def _article(incident: RecordedIncident) -> IncidentArticle:
    if incident.identical:
        again = "The step ran again, and every loss and gradient was the same bit for bit."
    elif incident.identical is None:
        again = f"The step was not run again: {incident.difference}." if incident.difference else ""
    else:
        again = f"The step did not run again as it had run: {incident.difference} differs."
    where = [incident.direction, incident.op, incident.source]
    return IncidentArticle(
        incident,
        again,
        " · ".join(part for part in where if part),
        [(key, _value(value)) for key, value in list(incident.evidence.items())[:_EVIDENCE]],
        _trace(incident.tables.get("modules")),
        [_trial(trial) for trial in incident.trials],
    )


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, (int, float)):
        return text(float(value), whole=isinstance(value, int))
    if isinstance(value, str):
        try:
            return text(float(value))  # "NaN" and "Infinity" are text in JSON
        except ValueError:
            return value
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(entry)}" for key, entry in value.items())
    return ", ".join(map(_value, value)) if isinstance(value, (list, tuple)) else str(value)


def _trace(rows: Any) -> list[TraceLine]:
    """The modules around the first bad one in execution order; none where every one is finite."""
    calls = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    forward = next((i for i, row in enumerate(calls) if row.get("output_bad")), None)
    backward = next((i for i in reversed(range(len(calls))) if calls[i].get("gradient_bad")), None)
    first = backward if forward is None else forward
    if first is None:
        return []
    lines = []
    for place in range(max(0, first - AROUND), min(len(calls), first + AROUND + 1)):
        row = calls[place]
        lines.append(
            TraceLine(
                str(row.get("name", "")),
                _range(row.get("input_absmax"), row.get("input_bad")),
                _range(row.get("output_absmax"), row.get("output_bad")),
                _range(row.get("gradient_norm"), row.get("gradient_bad")),
                place == first,
            )
        )
    return lines


def _range(value: Any, bad: Any) -> str:
    shown = "–" if value is None else _value(value)
    return f"{shown}, {bad} non-finite" if bad else shown


def _trial(trial: Mapping[str, Any]) -> TrialLine:
    patch = trial.get("patch")
    return TrialLine(
        str(trial.get("name", "")),
        " ".join(f"{key}={value}" for key, value in patch.items()) if isinstance(patch, Mapping) else "",
        str(trial.get("result", "")),
        _value(trial.get("grad_norm")),
        _value(trial.get("loss")),
        _value(trial.get("cost")),
    )
