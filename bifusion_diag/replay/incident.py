"""What goes wrong in a step, in plain data: what set the alarm off, and what the step's re-execution found."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bifusion_diag.replay.examine.mechanisms import MECHANISMS, UNKNOWN

#: How an incident is bad, with what it means. The ids are stable: they stand in records and capsules.
KINDS: dict[str, str] = {
    "nonfinite-loss": "a loss term is NaN or infinite",
    "nonfinite-gradient": "a parameter's gradient is NaN or infinite while every loss term is finite",
    "nonfinite-weights": "the update has made weights NaN or infinite",
    "nonfinite-buffers": "the forward has made a buffer NaN or infinite, such as BatchNorm's running statistics",
    "nonfinite-input": "the batch holds NaN or infinite numbers that earlier batches did not",
    "overflowed-norm": "every gradient is finite, and their float32 norm is not: clipping by it loses the step",
    "altered-gradient": "the gradient that the optimiser sees is not the one that the backward pass left",
    "gradient-spike": "the pre-clip gradient norm, of the model or of a module, is far above those of the steps before",
    "loss-spike": "a loss term is far above those of the steps before",
    "loss-shift": "a loss term stays above all that it was before",
    "input-outlier": "one sample's input is far outside the range of all batches before",
    "alpha-collapse": "a fusion gate has saturated: nearly every α is at one end",
    "detached-module": "a module that runs and should learn gets no gradient any more",
    "dead-module": "a module's gradient has become exactly zero",
    "frozen-module": "a module that was learning does not require a gradient any more, and nobody said that it would",
    "not-updated": "a module gets a gradient, and its weights do not move",
    "update-jump": "an update has changed a module's weights far more than those before it",
    "rank-divergence": "the processes of one run do not hold the same weights",
    "exception": "the step has raised an error",
    "rule": "a rule of the user's holds",
}

#: The kinds under which records of all versions count bad steps.
NON_FINITE, SPIKE = "non-finite", "spike"
FAMILY: dict[str, str] = {
    **dict.fromkeys(("nonfinite-loss", "nonfinite-gradient", "nonfinite-weights", "overflowed-norm"), NON_FINITE),
    "gradient-spike": SPIKE,
    "loss-spike": SPIKE,
}

EVENT = 16_000  # bytes of an incident in the record; usual are three thousand
TEXTS = (600, 200, 40)  # characters of a text there, the first with which it fits
ENTRIES, DEPTH = 12, 4  # of a list there, and of lists in lists

Direction = Literal["data", "forward", "loss", "backward", "after backward", "update", "graph"]


@dataclass(frozen=True)
class Trigger:
    """What one sign of life looked like when the alarm went off.

    Attributes:
        kind: of :data:`KINDS`.
        message: in words, with the number and the bound.
        module: where, as far as the numbers of the step alone show it.
        term: which loss term, likewise.
        parameter: which parameter or buffer, likewise.
        sample: which sample of the batch, likewise.
        value: the number that set it off.
        limit: what it was compared with.
        since: the first step at which it was so; None: this one.
    """

    kind: str
    message: str
    module: str | None = None
    term: str | None = None
    parameter: str | None = None
    sample: int | None = None
    value: float | None = None
    limit: float | None = None
    since: int | None = None


@dataclass(frozen=True)
class Cause:
    """Where it began: the first place whose inputs are fine and whose outputs are not.

    Attributes:
        module: name; "(root)" is the model itself, None: in no module, such as the loop's own loss.
        direction: in which part of the step.
        op: PyTorch's name of the operation, such as "aten.log" or "SqrtBackward0".
        source: "file.py:123: the line's text", where the operation was called.
        parameter: name of the parameter, buffer or input.
    """

    module: str | None
    direction: Direction
    op: str | None = None
    source: str | None = None
    parameter: str | None = None


@dataclass(frozen=True)
class SampleShare:
    """One sample's part in it.

    Attributes:
        index: in the batch.
        name: what the batch calls it: a file, a scene; None where it does not say.
        why: in words, with the number.
        notes: what the data says about it, such as flaws of a capture.
    """

    index: int
    name: str | None
    why: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reproduction:
    """Whether the step ran again as it had run.

    Attributes:
        identical: every loss and gradient is the same, bit for bit. None: the step was not run again.
        compared: what was compared, in words.
        difference: the first that differs, in words; or why the step was not run again.
    """

    identical: bool | None
    compared: str = ""
    difference: str = ""


@dataclass(frozen=True)
class ModuleTrace:
    """One call of a module in execution order.

    Attributes:
        name: of the module.
        type: its class.
        input_absmax: largest absolute value of its inputs that is finite; None: it has none.
        input_bad: NaN and infinite values in its inputs.
        output_absmax: of its outputs.
        output_bad: in its outputs.
        gradient_norm: L2 norm of the gradient that arrived at its outputs; None: none did, or no backward was run.
        gradient_bad: NaN and infinite values in that gradient.
    """

    name: str
    type: str
    input_absmax: float | None = None
    input_bad: int = 0
    output_absmax: float | None = None
    output_bad: int = 0
    gradient_norm: float | None = None
    gradient_bad: int = 0


@dataclass(frozen=True)
class Incident:
    """A bad step.

    Attributes:
        step: its number.
        kind: that of the first trigger.
        triggers: what set the alarm off, the most telling first.
        cause: where it began; None where it could not be found.
        terms: the loss terms that it comes from, the strongest first.
        samples: the samples that it comes from, the strongest first; empty: all alike.
        mechanism: id of :mod:`bifusion_diag.replay.examine.mechanisms`; "unknown".
        explanation: the mechanism in two sentences, with this step's numbers.
        evidence: name → number or text, in the order of importance.
        tables: name → rows: "terms" (gradient norm of each term by module), "samples", "modules" (see ModuleTrace).
        remedies: ids of changes worth trying, the most promising first.
        reproduction: whether the step ran again as it had run.
        action: what was done about the update: "record", "skip", "rollback" or "stop".
        harmless: the update may be done all the same: every gradient is finite and is that of the healthy samples.
        rank: of the process at which it began.
        capsule: folder of the capsule; None where none was written.
        capsule_note: why not, or what it leaves out.
        seconds: that the diagnosis took.
        step_seconds: that a step takes up to where it is judged: this one, or a healthy one where that takes longer.
    """

    step: int
    kind: str
    triggers: tuple[Trigger, ...]
    cause: Cause | None = None
    terms: tuple[str, ...] = ()
    samples: tuple[SampleShare, ...] = ()
    mechanism: str = "unknown"
    explanation: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Any] = field(default_factory=dict)
    remedies: tuple[str, ...] = ()
    reproduction: Reproduction = Reproduction(None)
    action: str = "record"
    harmless: bool = False
    rank: int = 0
    capsule: str | None = None
    capsule_note: str = ""
    seconds: float = 0.0
    step_seconds: float = 0.0

    @property
    def family(self) -> str:
        """The kind of event in the record: "non-finite" or "spike" if one of its triggers is, or its own kind."""
        families = {FAMILY.get(trigger.kind) for trigger in self.triggers} | {FAMILY.get(self.kind)}
        return next((family for family in (NON_FINITE, SPIKE) if family in families), self.kind)

    @property
    def place(self) -> str:
        """Where it began, in words."""
        if self.cause is None or self.cause.module is None:
            return f"loss term {self.terms[0]}" if self.terms else "an unknown place"
        return self.cause.module

    @property
    def message(self) -> str:
        """One line: what happened, where it began, of which term and sample."""
        parts = [self.triggers[0].message]
        if self.cause is not None and self.cause.module is not None:
            op = f" ({self.cause.op})" if self.cause.op else ""
            parts.append(f"begins in {self.cause.module}{op}, {self.cause.direction}")
        if self.terms:
            parts.append(f"term {', '.join(self.terms[:3])}")
        if self.samples:
            parts.append(f"sample {', '.join(sample.name or str(sample.index) for sample in self.samples[:3])}")
        whole = "; ".join(parts)
        return _cut(whole, TEXTS[0])

    def facts(self) -> dict[str, Any]:
        """For the event in the record: all but the tables, which are in the capsule. Long texts and lists are cut: a
        record holds up to a thousand events in a few megabytes."""
        whole = {name: value for name, value in self.to_dict().items() if name not in ("tables", "capsule")}
        if self.mechanism != UNKNOWN and self.mechanism in MECHANISMS:
            whole["title"] = MECHANISMS[self.mechanism].title
        for length in TEXTS:
            stored = {name: _short(value, length) for name, value in whole.items()}
            if len(json.dumps(stored)) <= EVENT:
                break
        return {"incident": {**stored, "capsule": self.capsule}}  # a path that is cut leads nowhere

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; the inverse of :meth:`from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Incident:
        """Read what :meth:`to_dict` wrote; fields of later versions are ignored."""
        values = _known(cls, stored)
        values["triggers"] = tuple(Trigger(**_known(Trigger, t)) for t in values.get("triggers", ()))
        if values.get("cause") is not None:
            values["cause"] = Cause(**_known(Cause, values["cause"]))
        samples = [_known(SampleShare, sample) for sample in values.get("samples", ())]
        values["samples"] = tuple(SampleShare(**{**s, "notes": tuple(s.get("notes", ()))}) for s in samples)
        values["reproduction"] = Reproduction(**_known(Reproduction, values.get("reproduction", {"identical": None})))
        for name in ("terms", "remedies"):
            values[name] = tuple(values.get(name, ()))
        return cls(**values)


def _short(value: Any, length: int, depth: int = 0) -> Any:
    """A value of few and short parts, as JSON has them."""
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return value
    if depth < DEPTH and isinstance(value, Mapping):
        entries = list(value.items())[: 2 * ENTRIES]
        return {_cut(str(key), length): _short(entry, length, depth + 1) for key, entry in entries}
    if depth < DEPTH and isinstance(value, (list, tuple)):
        return [_short(entry, length, depth + 1) for entry in value[:ENTRIES]]
    return _cut(str(value), length)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _known(kind: type, stored: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(kind)}
    return {name: value for name, value in stored.items() if name in names}
