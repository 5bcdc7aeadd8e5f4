"""The incidents of a run as the page shows them: what happened, where, why, and what was tried."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from bifusion_diag.diagnosis.incidents import RecordedIncident, incidents_of
from bifusion_diag.diagnosis.phrase import Phrase, join, say
from bifusion_diag.record.schema import Run
from bifusion_diag.reports.language import listed, tr
from bifusion_diag.reports.numbers import text

SHOWN = 20  # incidents that the page shows in full, of all its runs; the rest are in the record
AROUND = 6  # modules of the trace before the place of the incident, and after it
LENGTH = 400  # characters of one text of an incident: records and capsules may hold any
BYTES = 500_000  # of HTML or so, of all incidents; usual are 10 kB each
_EVIDENCE, _SAMPLES, _TRIALS = 12, 8, 15
_COST = "the diagnosis took"  # a label that begins so is of the diagnosis, and no evidence
_CONTRAST = "the last healthy "  # a label that begins so tells how another batch fared with the same weights
_WORDS = {"nan": "NaN", "inf": "∞", "-inf": "−∞"}  # numbers as Python writes them
_COUNTED = {  # what the result of a trial counts
    r"(?P<bad>\d+) of (?P<count>\d+) steps not finite": "{bad} of {count} steps not finite",
    r"(?P<n>\d+) spikes": "{n} spikes",
}
_ACTIONS = {
    "record": "done all the same",
    "skip": "left out",
    "rollback": "replaced by an earlier state of the run",
    "stop": "not done: the run was stopped before it",
}


@dataclass(frozen=True)
class TraceLine:
    """One module of the trace."""

    module: str
    inputs: str
    outputs: str
    gradient: str
    here: bool  # the incident begins here


@dataclass(frozen=True)
class Trace:
    """Some modules in execution order."""

    lines: list[TraceLine]
    gradients: bool  # a backward was traced too
    left_out: tuple[int, int]  # modules before and after these


@dataclass(frozen=True)
class TrialLine:
    """One remedy that was tried."""

    name: str
    settings: list[tuple[str, str]]
    result: str
    grad_norm: str
    loss: str
    cost: str
    helps: bool


@dataclass(frozen=True)
class IncidentArticle:
    """One incident. `rows` are pairs of a label and a text."""

    step: int
    anchor: str  # its id in the page
    heading: str
    explanation: str
    rows: list[tuple[str, str]]
    again: str
    trace: Trace | None
    trials: list[TrialLine]
    command: str


@dataclass(frozen=True)
class IncidentGroup:
    """The incidents of one run."""

    name: str
    articles: list[IncidentArticle]
    left_out: int
    place: int = 0  # of the run in the page


def incident_groups(names: Sequence[str], runs: Sequence[Run], most: int = BYTES) -> list[IncidentGroup]:
    """Of every run that has incidents, in `most` bytes of HTML or so."""
    found = [
        (place, name, incidents)
        for place, (name, run) in enumerate(zip(names, runs, strict=True))
        if (incidents := incidents_of(run))
    ]
    groups = []
    for place, name, incidents in found:
        room = most // len(found)
        articles: list[IncidentArticle] = []
        for incident in incidents[: max(1, SHOWN // len(found))]:
            article = _article(incident, f"incident-{place}-{incident.step}")
            room -= len(escape(str(article)))
            if room < 0 and articles:
                break
            articles.append(article)
        groups.append(IncidentGroup(name, articles, len(incidents) - len(articles), place))
    return groups


def assignment(key: str, value: Any) -> str:
    """A setting as an argument of a shell's command line that --set reads."""
    return shlex.quote(f"{key}={_plain(value)}")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _article(incident: RecordedIncident, anchor: str) -> IncidentArticle:
    if incident.identical:
        again = tr("The step ran again, and every loss and gradient was the same, bit for bit.")
    elif incident.identical is False:
        again = tr("The step did not run again as it had run. The first difference: {what}.", what=incident.difference)
    else:
        again = tr("The step was not run again: {why}.", why=incident.difference) if incident.difference else ""
    for label, value in incident.evidence.items():
        if label.startswith(_COST) and isinstance(value, float):
            took = tr("The diagnosis took {times} times as long as the step.", times=f"{value:.1f}")
            again = listed((again, took))
    return IncidentArticle(
        incident.step,
        anchor,
        _cut(_heading(incident)),
        _words(tr(incident.explanation or f"{incident.message}.")),
        _rows(incident),
        _cut(again.strip()),
        _trace(incident),
        [_trial(trial) for trial in incident.trials[:_TRIALS]],
        f"bifusion-diag replay {shlex.quote(incident.capsule)} --trace" if incident.capsule else "",
    )


def _heading(incident: RecordedIncident) -> str:
    return listed([incident.heading, *(sample.name for sample in incident.samples[:1])], ", ")


def _rows(incident: RecordedIncident) -> list[tuple[str, str]]:
    """What was found, each once: evidence that repeats the place or a sample's reason is left out."""
    begins = [tr(incident.place), "" if incident.direction == "data" else tr(incident.direction), incident.op]
    rows = [(tr("begins in"), " · ".join(filter(None, begins)))] if incident.module or incident.direction else []
    rows += [(tr("source"), incident.source)] if incident.source else []
    if incident.terms:
        rows.append((tr("loss terms" if len(incident.terms) > 1 else "loss term"), ", ".join(incident.terms)))
    for sample in incident.samples[:_SAMPLES]:
        rows.append((tr("sample"), f"{sample.label}: {sample.why}" if sample.why else sample.label))
    action = tr(_ACTIONS.get(incident.action, incident.action))
    harmless = tr("every gradient is good, so nothing need be left out") if incident.harmless else ""
    rows += [(tr("update"), listed((action, harmless), "; "))] if action or harmless else []
    told = {sample.why for sample in incident.samples} | {f"sample {sample.name}" for sample in incident.samples}
    told |= {incident.source}
    evidence = []
    for label, value in incident.evidence.items():
        repeated = isinstance(value, str) and (value in told or (incident.source and incident.source in value))
        if label.startswith(_CONTRAST):
            evidence.append((tr("for comparison"), _contrast(str(value))))
        elif not repeated and not label.startswith(_COST):
            evidence.append((tr(label), _value(value).replace("contrast step", "last healthy step")))
    return [(_cut(label), _words(value)) for label, value in (*rows, *evidence[:_EVIDENCE])]


def _contrast(said: str) -> str:
    """How the last healthy batch fared with this step's weights."""
    if "bad" in said:
        return tr(
            "the batch of the last healthy step is bad too with the weights of this step: "
            "it is the weights, not the data"
        )
    if "healthy" in said:
        return tr("the batch of the last healthy step is healthy also with the weights of this step")
    return tr("the batch of the last healthy step, with the weights of this step: {what}", what=said)


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return tr({True: "yes", False: "no", None: "none"}[value])
    if isinstance(value, (int, float)):
        try:
            return text(float(value), whole=isinstance(value, int))
        except OverflowError:  # an integer without end
            return _cut(str(value))
    if isinstance(value, str):
        return {"NaN": "NaN", "Infinity": "∞", "-Infinity": "−∞"}.get(value, value)  # numbers that JSON has not
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(entry)}" for key, entry in list(value.items())[:_EVIDENCE])
    return ", ".join(map(_value, value[:_EVIDENCE])) if isinstance(value, (list, tuple)) else str(value)


def _words(value: str) -> str:
    """A text of the diagnosis, cut, with its numbers as the page writes them."""
    return re.sub(r"(?<![\w.])-?(?:nan|inf)(?![\w.(])", lambda found: _WORDS.get(found[0], "NaN"), _cut(value))


def _cut(value: str) -> str:
    return value if len(value) <= LENGTH else f"{value[: LENGTH - 1]}…"


def _trace(incident: RecordedIncident) -> Trace | None:
    """The modules around the place where it begins, or around the first bad one, in execution order; None where there
    is neither."""
    rows = incident.tables.get("modules")
    calls = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    here = [place for place, row in enumerate(calls) if row.get("name") == incident.module is not None]
    forward = [place for place, row in enumerate(calls) if row.get("output_bad")]
    backward = [place for place, row in enumerate(calls) if row.get("gradient_bad")]
    if here:
        bad = [place for place in here if place in {*forward, *backward}]
        first = (bad or here)[0]
    elif forward or backward:
        first = forward[0] if forward else backward[-1]
    else:
        return None
    start, stop = max(0, first - AROUND), min(len(calls), first + AROUND + 1)
    lines = [
        TraceLine(
            _cut(str(row.get("name", ""))),
            _range(row.get("input_absmax"), row.get("input_bad")),
            _range(row.get("output_absmax"), row.get("output_bad")),
            _range(row.get("gradient_norm"), row.get("gradient_bad")),
            start + place == first,
        )
        for place, row in enumerate(calls[start:stop])
    ]
    gradients = any(row.get("gradient_norm") is not None or row.get("gradient_bad") for row in calls[start:stop])
    return Trace(lines, gradients, (start, len(calls) - stop))


def _range(value: Any, bad: Any) -> str:
    shown = "" if value is None else _value(value)
    return _cut(listed((shown, tr("{n} non-finite", n=_value(bad)) if bad else ""), ", ") or "–")


def _result(said: str) -> Phrase:
    """How a trial went: the phrases of the record one by one."""
    told = []
    for phrase in _cut(said).split(", "):
        counted = ((words, re.fullmatch(pattern, phrase)) for pattern, words in _COUNTED.items())
        told.append(next((say(words, **found.groupdict()) for words, found in counted if found), phrase))
    return join(told, ", ")


def _trial(trial: Mapping[str, Any]) -> TrialLine:
    patch, lost = trial.get("patch"), trial.get("gives_up")
    patch = patch if isinstance(patch, Mapping) else {}
    lost = [str(one) for one in lost] if isinstance(lost, (list, tuple)) else []
    result = [_result(str(trial.get("result", ""))), say("gives up {what}", what=join(lost, "; ")) if lost else ""]
    cost = trial.get("cost")
    return TrialLine(
        _cut(tr(str(trial.get("name", "")))),
        [(_cut(str(key)), _cut(_plain(value))) for key, value in list(patch.items())[:_EVIDENCE]],
        _words(listed(result, "; ")),
        _cut(_value(trial.get("grad_norm"))),
        _cut(_value(trial.get("loss"))),
        "–" if cost is None else _cut(_value(cost)),
        trial.get("helps") is True,
    )
