"""Bad steps that the flight recorder took apart while the run went on, as the record tells of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bifusion_diag.diagnosis.phrase import Name, say
from bifusion_diag.record.schema import Event, IncidentFiles, Run

UNKNOWN = "unknown"
LENGTH, ENTRIES, PATH = 1000, 16, 4096  # characters of a text, entries of a list, characters of a path that are read
#: Parts of a step, as places.
_PARTS = {
    "data": "the data",
    "forward": "the forward pass",
    "loss": "the loss",
    "backward": "the backward pass",
    "after backward": "what is done to the gradients after the backward pass",
    "update": "the update",
    "graph": "the graph",
}
_ROOT = "(root)"


class GuiltySample(NamedTuple):
    """One sample that an incident comes from.

    Attributes:
        name: of the sample.
        why: in words.
        notes: what the data says about it, such as flaws of a capture.
    """

    name: str
    why: str
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name, with the notes in brackets."""
        return f"{self.name} [{'; '.join(self.notes)}]" if self.notes else self.name


@dataclass(frozen=True)
class RecordedIncident:
    """One bad step as the record tells of it.

    Attributes:
        step: its number.
        family: kind of its event: "non-finite", "spike", or as `kind`.
        kind: how it was bad, an id.
        message: in one line.
        alarm: what set the alarm off, in words.
        value: the number that did, None where it is not a finite one.
        limit: and what it was compared with.
        module: where it began; None: in no module, or unknown.
        direction: in which part of the step: forward, loss, backward, update, data.
        op: the operation there, "" if unknown.
        source: its source line, "" if unknown.
        terms: loss terms that it comes from.
        samples: the guilty ones; empty: none stands out.
        mechanism: id of the mechanism.
        title: of the mechanism, in words; of an unknown one the kind.
        explanation: the mechanism in words, with this step's numbers.
        evidence: name → number or text.
        identical: whether the step ran again bit for bit; None: it was not run again.
        difference: what differed, or why it was not run again.
        action: what was done about the update.
        harmless: every gradient was good.
        by_design: a module that has never got a gradient, as what it gives is used under no_grad alone.
        capsule: its folder; None where none was written.
        trials: the remedies that were tried on it, best first; empty: none was.
        tables: the capsule's tables, see :class:`~bifusion_diag.record.schema.IncidentFiles`.
    """

    step: int
    family: str
    kind: str
    message: str
    alarm: str
    value: float | None
    limit: float | None
    module: str | None
    direction: str
    op: str
    source: str
    terms: tuple[str, ...]
    samples: tuple[GuiltySample, ...]
    mechanism: str
    title: str
    explanation: str
    evidence: Mapping[str, Any]
    identical: bool | None
    difference: str
    action: str
    harmless: bool
    by_design: bool
    capsule: str | None
    trials: tuple[Mapping[str, Any], ...] = ()
    tables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def explained(self) -> bool:
        """Whether the mechanism is known."""
        return self.mechanism != UNKNOWN

    @property
    def located(self) -> bool:
        """Whether the mechanism is known, or at least the module, which running the step again has found."""
        return self.explained or self.module is not None

    @property
    def heading(self) -> str:
        """The title and where it began."""
        if self.module is not None and self.module != _ROOT:
            return say("{title} ({place})", title=self.title, place=Name(self.module))
        return say("{title} (loss term {term})", title=self.title, term=self.terms[0]) if self.terms else self.title

    @property
    def place(self) -> str:
        """Where it began, in words."""
        if self.module is not None:
            return "the model itself" if self.module == _ROOT else Name(self.module)
        if self.terms and self.direction != "data":
            return say("loss term {term}", term=self.terms[0])
        return _PARTS.get(self.direction, self.direction) or "a place that was not found"


def incidents_of(run: Run) -> tuple[RecordedIncident, ...]:
    """The incidents that a record tells of, by step; of events that an unknown version wrote, what can be read."""
    found = []
    for event in run.events:
        stored = event.data.get("incident")
        if isinstance(stored, Mapping) and event.step is not None:
            found.append(_read(event, event.step, stored, run.incident_files.get(event.step, IncidentFiles())))
    return tuple(sorted(found, key=lambda incident: incident.step))


def _read(event: Event, step: int, stored: Mapping[str, Any], files: IncidentFiles) -> RecordedIncident:
    cause, again = _mapping(stored.get("cause")), _mapping(stored.get("reproduction"))
    samples = [sample for sample in _list(stored.get("samples")) if isinstance(sample, Mapping)]
    trigger = next((_mapping(trigger) for trigger in _list(stored.get("triggers"))), {})
    where = [found for key in ("module", "term", "parameter") if (found := _text(trigger.get(key)))]
    alarm = _text(trigger.get("kind")).replace("-", " ")
    kind, mechanism = _text(stored.get("kind")) or event.kind, _text(stored.get("mechanism")) or UNKNOWN
    words = (kind if mechanism == UNKNOWN else mechanism).replace("-", " ")
    identical, capsule = again.get("identical"), stored.get("capsule")
    return RecordedIncident(
        step=step,
        family=event.kind,
        kind=kind,
        message=_text(event.message),
        alarm=say("{alarm} of {place}", alarm=alarm, place=Name(where[0]))
        if alarm and where
        else "".join([alarm, *where[:1]]),
        value=_finite(trigger.get("value")),
        limit=_finite(trigger.get("limit")),
        module=_text(cause.get("module")) or None,
        direction=_text(cause.get("direction")),
        op=_text(cause.get("op")),
        source=_text(cause.get("source")),
        terms=tuple(_text(str(term)) for term in _list(stored.get("terms"))),
        samples=tuple(
            GuiltySample(
                _text(sample.get("name")) or say("sample {index}", index=str(sample.get("index"))),
                _text(sample.get("why")),
                tuple(_text(str(note)) for note in _list(sample.get("notes"))),
            )
            for sample in samples
        ),
        mechanism=mechanism,
        title=_text(stored.get("title")) or words[:1].upper() + words[1:],
        explanation=_text(stored.get("explanation")),
        evidence=_mapping(stored.get("evidence")),
        identical=identical if isinstance(identical, bool) else None,
        difference=_text(again.get("difference")),
        action=_text(stored.get("action")),
        harmless=stored.get("harmless") is True,
        by_design=_is_by_design(kind, trigger, cause),
        capsule=capsule if isinstance(capsule, str) and 0 < len(capsule) <= PATH else None,
        trials=tuple(files.trials),
        tables=files.tables,
    )


def _is_by_design(kind: str, trigger: Mapping[str, Any], cause: Mapping[str, Any]) -> bool:
    """Attention masks are made so, of masks that have a loss of their own or have none."""
    module, end = _text(trigger.get("module")), _text(cause.get("module"))
    never = kind == "detached-module" and trigger.get("since") == 0
    return never and cause.get("op") == "no_grad" and not (end == module or end.startswith(f"{module}."))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> Sequence[Any]:
    return value[:ENTRIES] if isinstance(value, (list, tuple)) else ()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        return ""
    return value if len(value) <= LENGTH else f"{value[: LENGTH - 1]}…"


def _finite(value: Any) -> float | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer without end
        return None
