"""A step's forward and loss with every module and every operation watched."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from bifusion_diag.probes.loss_terms import LossTerms
from bifusion_diag.replay.examine.frames import line_of, line_of_error, told
from bifusion_diag.replay.examine.origin import Op, OpWatch, Origin, inputs_of
from bifusion_diag.replay.incident import Cause, ModuleTrace
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Training

NEAR = 4.0  # of two jumps that are as large as this apart, the earlier is the cause
EXTREME = 1e15  # no number of a healthy network is larger
LOWEST = 1e38  # but masks may be written as the least number that there is: -3.4e38
#: What these return is at most 1: they may jump, and nothing explodes in them.
BOUNDED = ("_softmax", "_safe_softmax", "sigmoid", "tanh", "hardsigmoid", "erf", "sin", "cos")


@dataclass(frozen=True)
class ForwardTrace:
    """What a forward did.

    Attributes:
        modules: every call, as they ended: inner modules before outer ones.
        ops: every operation that returned floating-point numbers, views left out.
        inputs: by path in the batch: largest finite absolute value (None: none), and how many values are bad.
        terms: raw loss terms; empty where the step raised.
        total: what is differentiated.
        origins: by term, "(total)" included: where its bad values began, the first first. Only bad terms are there.
        definitions: module → where its forward is defined, of modules whose output is bad.
        hooked: index of a call → where a hook of the user's is defined, of those that made its output bad or several
            times larger.
        raised: where the step raised an error, and which.
    """

    modules: tuple[ModuleTrace, ...]
    ops: tuple[Op, ...] = ()
    inputs: Mapping[str, tuple[float | None, int]] = field(default_factory=dict)
    terms: Mapping[str, float] = field(default_factory=dict)
    total: float | None = None
    origins: Mapping[str, tuple[Origin, ...]] = field(default_factory=dict)
    definitions: Mapping[str, str] = field(default_factory=dict)
    hooked: Mapping[int, str] = field(default_factory=dict)
    raised: Cause | None = None

    @property
    def bad_terms(self) -> tuple[str, ...]:
        """Terms that are NaN or infinite."""
        return tuple(name for name, value in self.terms.items() if not math.isfinite(value))

    @property
    def bad_module(self) -> ModuleTrace | None:
        """The first call whose inputs are finite and whose output is not."""
        return next((self.modules[index] for index in self._bad_calls()), None)

    def _bad_calls(self) -> Iterator[int]:
        return (index for index, call in enumerate(self.modules) if call.output_bad and not call.input_bad)

    def origin(self, term: str | None = None) -> Origin | None:
        """Where the bad values of a term began; None: of the first bad term, or else of the total."""
        names = (term,) if term is not None else (*self.bad_terms, "(total)")
        return next((self.origins[name][0] for name in names if self.origins.get(name)), None)

    def cause(self, term: str | None = None) -> Cause | None:
        """As :meth:`origin`; but of an overflow, where the numbers became extreme; and where no operation was seen to
        make bad values, the first bad module. None: all is finite."""
        if self.raised is not None:
            return self.raised
        origin = self.origin(term)
        if origin is not None and (origin.op is not None or origin.parameter is not None):
            return self._swollen(origin) or origin.cause
        if (term is None and not self.bad_terms and not self.bad_total) or (term and term not in self.bad_terms):
            return None
        for index in self._bad_calls():
            name = self.modules[index].name
            return Cause(name, "forward", None, self.hooked.get(index) or self.definitions.get(name))
        return origin.cause if origin is not None else None

    def _swollen(self, origin: Origin) -> Cause | None:
        """Where numbers became so large that an operation after it overflowed."""
        if origin.op is None or not EXTREME < origin.largest < LOWEST:
            return None
        for name, (absmax, _) in self.inputs.items():
            if absmax is not None and absmax > EXTREME:
                return Cause(None, "data", parameter=name)
        for op in self.ops[: origin.after]:
            before, after = op.input_absmax, op.output_absmax
            if before is not None and after is not None and before <= EXTREME < after < LOWEST:
                return Cause(op.module, op.direction, op.op, told(op.line))
        return None

    @property
    def bad_total(self) -> bool:
        """Whether the total is NaN or infinite."""
        return self.total is not None and not math.isfinite(self.total)


class Jump(NamedTuple):
    """Where numbers grew that were ordinary in a healthy run.

    Attributes:
        cause: the place.
        value: what came out of it: largest absolute value in the forward, L2 norm of the gradient in the backward.
        before: the same in the healthy run.
        ratio: value / before.
        given: the same ratio of what went into it.
    """

    cause: Cause
    value: float
    before: float
    ratio: float
    given: float

    @property
    def growth(self) -> float:
        """How much of the ratio is its own."""
        return self.ratio / max(self.given, 1.0)


def trace_forward(training: Training, notes: StepNotes) -> ForwardTrace:
    """Run a step's forward and loss once more and watch it. Changes nothing."""
    with notes.again() as batch:
        watch = OpWatch(training.model, inputs_of(batch), ranges=True)
        calls = watch.calls
        loss: LossTerms | None = None
        raised: Cause | None = None
        with watch.watching():
            try:
                loss = training.loss(batch)
            except Exception as error:
                raised = Cause(calls.current, "forward", type(error).__name__, told(line_of_error(error)))
        definitions = {}
        for call, module in zip(calls.calls, calls.modules, strict=True):
            if call.output_bad and call.name not in definitions and (text := told(line_of(module.forward))):
                definitions[call.name] = text
        found: dict[str, tuple[Origin, ...]] = {}
        terms: dict[str, float] = {}
        total: float | None = None
        if loss is not None:
            assert loss.total is not None
            terms = {name: float(value.detach()) for name, value in loss.terms.items()}
            total = float(loss.total.detach())
            for name, value in {**loss.terms, "(total)": loss.total}.items():
                if not math.isfinite(float(value.detach())):
                    found[name] = tuple(watch.origins_of(value))
        return ForwardTrace(
            tuple(calls.calls),
            tuple(watch.ops),
            watch.inputs,
            terms,
            total,
            found,
            definitions,
            dict(calls.hooks),
            raised,
        )


def first_forward_jump(trace: ForwardTrace, contrast: ForwardTrace, factor: float = 8.0) -> Jump | None:
    """Where numbers first grew by a factor over those of a healthy run of the same model: in the batch, in an
    operation whose inputs did not grow, or else in a module whose inputs did not. None: nowhere."""
    inputs = []
    for path, (value, _) in trace.inputs.items():
        before = contrast.inputs.get(path, (None, 0))[0]
        if value and before:
            inputs.append(Jump(Cause(None, "data", parameter=path), value, before, value / before, 1.0))
    ops = _jumps_of_ops(trace, contrast)
    calls = _jumps_of_calls(trace, contrast)
    for jumps in (inputs, ops, calls):
        large = [jump for jump in jumps if jump.growth >= factor]
        if large:
            largest = max(jump.growth for jump in large)
            return next(jump for jump in large if jump.growth >= largest / NEAR)
    return None


def _jumps_of_ops(trace: ForwardTrace, contrast: ForwardTrace) -> list[Jump]:
    before = _by_place(contrast.ops)
    jumps = []
    for place, op in _by_place(trace.ops).items():
        then = before.get(place)
        if op.op.removeprefix("aten.") in BOUNDED:
            continue
        if then is None:
            then = op._replace(output_absmax=op.input_absmax)  # it was not there: it should have changed nothing
        if op.output_absmax and then.output_absmax and op.input_absmax and then.input_absmax:
            ratio, given = op.output_absmax / then.output_absmax, op.input_absmax / then.input_absmax
            cause = Cause(op.module, op.direction, op.op, told(op.line))
            jumps.append(Jump(cause, op.output_absmax, then.output_absmax, ratio, given))
    return jumps


def _by_place(ops: tuple[Op, ...]) -> dict[tuple[object, ...], Op]:
    """Operations by module, line and how many there have been of that kind there."""
    counts: dict[tuple[object, ...], int] = {}
    found: dict[tuple[object, ...], Op] = {}
    for op in ops:
        place = (op.module, op.op, op.line)
        counts[place] = counts.get(place, 0) + 1
        found[(*place, counts[place])] = op
    return found


def _jumps_of_calls(trace: ForwardTrace, contrast: ForwardTrace) -> list[Jump]:
    counts: dict[str, int] = {}
    before: dict[tuple[str, int], ModuleTrace] = {}
    for call in contrast.modules:
        counts[call.name] = counts.get(call.name, 0) + 1
        before[call.name, counts[call.name]] = call
    counts.clear()
    jumps = []
    for index, call in enumerate(trace.modules):
        counts[call.name] = counts.get(call.name, 0) + 1
        then = before.get((call.name, counts[call.name]))
        if then is None or not (call.output_absmax and then.output_absmax):
            continue
        given = (call.input_absmax or 0.0) / then.input_absmax if then.input_absmax else 1.0
        ratio = call.output_absmax / then.output_absmax
        cause = Cause(call.name, "forward", source=trace.hooked.get(index))
        jumps.append(Jump(cause, call.output_absmax, then.output_absmax, ratio, given))
    return jumps
