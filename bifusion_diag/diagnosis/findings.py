"""Findings: what a rule saw in a record, with its evidence. One list for terminal, HTML and JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from bifusion_diag.diagnosis.incidents import RecordedIncident, incidents_of
from bifusion_diag.diagnosis.measures import Measures
from bifusion_diag.diagnosis.origins import Origin
from bifusion_diag.diagnosis.quantity import NotMeasured, Reading
from bifusion_diag.diagnosis.settings_diff import flatten
from bifusion_diag.diagnosis.thresholds import DEFAULT_THRESHOLDS, Thresholds
from bifusion_diag.record.schema import Run

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Evidence:
    """One number of a finding and the series that it comes from."""

    label: str
    reading: Reading
    series: str


@dataclass(frozen=True)
class Finding:
    """What a rule saw.

    Attributes:
        rule: stable id of the rule.
        severity: "error" breaks training, "warning" may, "note" is worth knowing.
        title: in words.
        evidence: the numbers.
        mechanism: how the numbers come about, no further than the record shows it.
        steps: first and last step where it holds, None for the whole run.
        count: how many steps, None for the whole run.
        module: where, None where the rule does not tell.
        term: which loss term, likewise.
        samples: scenes of the first of the steps, where the record names them.
        remedy: settings to change (dotted key → value), None where the record alone does not support one.
        tried: the remedy was tried on a bad step, and helped.
        bad_steps: how many of the run's bad steps it explains.
    """

    rule: str
    severity: Severity
    title: str
    evidence: tuple[Evidence, ...]
    mechanism: str
    steps: tuple[int, int] | None = None
    count: int | None = None
    module: str | None = None
    term: str | None = None
    samples: tuple[str, ...] = ()
    remedy: Mapping[str, Any] | None = None
    tried: bool = False
    bad_steps: int = 0


@dataclass(frozen=True)
class Unmeasured:
    """A rule that had no data."""

    rule: str
    title: str
    reason: str


@dataclass(frozen=True)
class Context:
    """What rules read."""

    run: Run
    measures: Measures
    thresholds: Thresholds = DEFAULT_THRESHOLDS
    baseline: Run | None = None  # what the run is compared with

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The run's settings as text by dotted key."""
        return flatten(self.run.settings)

    @cached_property
    def incidents(self) -> tuple[RecordedIncident, ...]:
        """The bad steps that the flight recorder took apart."""
        return incidents_of(self.run)

    @property
    def watched(self) -> bool:
        """Whether a flight recorder judged every step."""
        return "flight_recorder" in self.run.provenance or bool(self.incidents)

    @cached_property
    def origins(self) -> list[Origin]:
        """The bad steps that no incident explains or finds the place of."""
        located = {incident.step for incident in self.incidents if incident.located}
        return [origin for origin in self.measures.origins if origin.step not in located]

    def reading(self, key: str) -> Reading:
        """A measure, "was not recorded" where there is none."""
        return self.measures.readings.get(key, NotMeasured("was not recorded"))


@dataclass(frozen=True)
class Rule:
    """A rule.

    Attributes:
        id: stable.
        title: where it can't be measured.
        look: the function that looks.
        needs: probes without which it has nothing to look at; empty: what every record of a loop holds.
    """

    id: str
    title: str
    look: Callable[[Context], list[Finding] | NotMeasured]
    needs: tuple[str, ...] = ()


def apply_rules(context: Context, rules: tuple[Rule, ...]) -> tuple[tuple[Finding, ...], tuple[Unmeasured, ...]]:
    """Findings in the order of :func:`worst_first`, then of the rules, and the rules that had no data."""
    findings: list[Finding] = []
    unmeasured: list[Unmeasured] = []
    for rule in rules:
        result = rule.look(context)
        if isinstance(result, NotMeasured):
            unmeasured.append(Unmeasured(rule.id, rule.title, result.reason))
        else:
            findings.extend(result)
    return tuple(sorted(findings, key=worst_first)), tuple(unmeasured)


def worst_first(found: Finding) -> tuple[int, int, int]:
    """The order of findings: the worst, then what explains most bad steps, then the earliest."""
    return SEVERITIES.index(found.severity), -found.bad_steps, found.steps[0] if found.steps else 2**62
