"""Bad steps that the flight recorder took apart while the run went on, as the record tells of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bifusion_diag.record.schema import IncidentFiles, Run

UNKNOWN = "unknown"


@dataclass(frozen=True)
class RecordedIncident:
    """One bad step as the record tells of it.

    Attributes:
        step: its number.
        kind: how it was bad, an id.
        message: in one line.
        module: where it began; None: in no module, or unknown.
        direction: in which part of the step: forward, loss, backward, update, data.
        op: the operation there, "" if unknown.
        source: its source line, "" if unknown.
        terms: loss terms that it comes from.
        samples: name and reason of each guilty sample; empty: none stands out.
        mechanism: id of the mechanism.
        explanation: the mechanism in words, with this step's numbers.
        evidence: name → number or text.
        identical: whether the step ran again bit for bit; None: it was not run again.
        difference: what differed, or why it was not run again.
        action: what was done about the update.
        harmless: every gradient was good.
        capsule: its folder; None where none was written.
        trials: the remedies that were tried on it, best first; empty: none was.
        tables: the capsule's tables, see :class:`~bifusion_diag.record.schema.IncidentFiles`.
    """

    step: int
    kind: str
    message: str
    module: str | None
    direction: str
    op: str
    source: str
    terms: tuple[str, ...]
    samples: tuple[tuple[str, str], ...]
    mechanism: str
    explanation: str
    evidence: Mapping[str, Any]
    identical: bool | None
    difference: str
    action: str
    harmless: bool
    capsule: str | None
    trials: tuple[Mapping[str, Any], ...] = ()
    tables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The mechanism, or else the kind, as a heading."""
        words = (self.kind if self.mechanism == UNKNOWN else self.mechanism).replace("-", " ")
        return words[:1].upper() + words[1:]

    @property
    def place(self) -> str:
        """Where it began, in words."""
        if self.module is not None:
            return f"{self.module} ({self.op})" if self.op else self.module
        return f"loss term {self.terms[0]}" if self.terms else self.direction or "not found"


def incidents_of(run: Run) -> tuple[RecordedIncident, ...]:
    """The incidents that a record tells of, by step; of events that an unknown version wrote, what can be read."""
    found = []
    for event in run.events:
        stored = event.data.get("incident")
        if isinstance(stored, Mapping) and event.step is not None:
            found.append(_read(event.step, event.message, stored, run))
    return tuple(sorted(found, key=lambda incident: incident.step))


def _read(step: int, message: str, stored: Mapping[str, Any], run: Run) -> RecordedIncident:
    cause = stored.get("cause") or {}
    again = stored.get("reproduction") or {}
    samples = [s for s in stored.get("samples") or () if isinstance(s, Mapping)]
    files = run.incident_files.get(step, IncidentFiles())
    return RecordedIncident(
        step=step,
        kind=str(stored.get("kind", "")),
        message=message,
        module=cause.get("module"),
        direction=str(cause.get("direction") or ""),
        op=str(cause.get("op") or ""),
        source=str(cause.get("source") or ""),
        terms=tuple(map(str, stored.get("terms") or ())),
        samples=tuple((str(s.get("name") or f"sample {s.get('index')}"), str(s.get("why") or "")) for s in samples),
        mechanism=str(stored.get("mechanism") or UNKNOWN),
        explanation=str(stored.get("explanation") or ""),
        evidence=dict(stored.get("evidence") or {}),
        identical=again.get("identical"),
        difference=str(again.get("difference") or ""),
        action=str(stored.get("action") or ""),
        harmless=bool(stored.get("harmless")),
        capsule=stored.get("capsule"),
        trials=tuple(files.trials),
        tables=files.tables,
    )
