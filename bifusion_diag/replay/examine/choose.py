"""Where a bad step began: the decision, from what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from bifusion_diag.probes.base import ROOT
from bifusion_diag.replay.examine.backward_trace import BackwardTrace, first_backward_jump
from bifusion_diag.replay.examine.facts import GRAPH, SPIKES, UPDATE, Facts, common_part, few_row_norm, owner
from bifusion_diag.replay.examine.forward_trace import NEAR, ForwardTrace, Jump, first_forward_jump
from bifusion_diag.replay.examine.frames import told
from bifusion_diag.replay.incident import Cause, Direction, SampleShare
from bifusion_diag.replay.watch.vitals import FROZEN, NO_GRADIENT, ZERO

GAIN = 50.0  # of one operation: layers of healthy models stay below it, but for normalisations
SCALING = ("aten.mul", "aten.div")  # what grows there is not the labels' doing
JUMPED = 3.0  # times its usual value, from which on a loss term has jumped
OUTLIER = 3.0  # times the usual largest absolute value of an input


class Choice(NamedTuple):
    """Where it began.

    Attributes:
        cause: the place.
        terms: guilty loss terms, the strongest first.
        samples: guilty samples, the strongest first.
        jump: how numbers grew there.
    """

    cause: Cause | None
    terms: tuple[str, ...] = ()
    samples: tuple[SampleShare, ...] = ()
    jump: Jump | None = None


def choose(facts: Facts) -> Choice:
    """Decide. Each kind has its own order of suspects; what was not measured is passed over."""
    if facts.kind in GRAPH:
        return Choice(_graph(facts))
    if facts.kind == "rank-divergence":
        return Choice(None)
    terms = tuple(share.name for share in facts.term_shares)
    samples = facts.samples.shares if facts.samples is not None and not facts.healthy_too else ()
    if facts.kind == "exception":
        return Choice(_raised(facts), (), samples)
    if facts.updated or facts.kind in UPDATE:
        return Choice(_update(facts))
    if facts.kind == "altered-gradient":
        if facts.again is not None and facts.again.bad_parameters:
            return Choice(_backward(facts), terms, samples)
        return Choice(_altered(facts))
    if facts.nonfinite:
        cause = _nonfinite(facts)
        if cause is not None and cause.direction == "update":
            return Choice(cause, terms)
        return Choice(cause, terms, samples or _of_input(facts, cause) or _of_shape(facts))
    if facts.kind in SPIKES:
        return _spike(facts, terms, samples)
    return Choice(_of_trigger(facts), terms, samples)


# --- not finite ------------------------------------------------------------------------------------------------------


def _nonfinite(facts: Facts) -> Cause | None:
    forward = facts.forward
    if forward is not None:
        cause = forward.cause()
        if facts.kind == "nonfinite-buffers" and facts.again is not None and facts.again.bad_at_start:
            return _of_parameters(facts.again.bad_at_start)
        if cause is None and facts.kind == "nonfinite-buffers" and forward.bad_module is not None:
            cause = Cause(forward.bad_module.name, "forward")
        if cause is None or facts.kind == "nonfinite-input":
            cause = _bad_input(facts) or cause
        if cause is not None:
            return cause
    elif bad := _bad_input(facts):
        return bad
    if (cause := _backward(facts)) is not None:
        return cause
    if facts.kind == "nonfinite-gradient" and facts.again is not None and facts.again.finite:
        return _altered(facts)  # the backward has left good gradients; something has written into them after it
    return _of_trigger(facts)


def _backward(facts: Facts) -> Cause | None:
    return None if facts.backward is None else facts.backward.cause()


def _bad_input(facts: Facts) -> Cause | None:
    """A tensor of the batch that is not finite and was before."""
    usual = facts.history.get("inputs_bad", {})
    for path, given in facts.vitals.inputs.items():
        if given.bad and not usual.get(path):
            return Cause(None, "data", parameter=path)
    return None


def _of_input(facts: Facts, cause: Cause | None) -> tuple[SampleShare, ...]:
    """The sample whose input is bad, where running the samples apart did not show it."""
    if cause is None or cause.direction != "data" or facts.healthy_too or facts.samples is not None:
        return ()
    given = facts.vitals.inputs.get(cause.parameter or "")
    if given is None or given.sample is None:
        return ()
    why = f"{given.bad} values of {cause.parameter} are not finite" if given.bad else f"it holds {given.absmax:.4g}"
    return (SampleShare(given.sample, None, why),)


def _of_shape(facts: Facts) -> tuple[SampleShare, ...]:
    """The sample of an operation on nothing, where the shape of that nothing is of one sample alone: a step with random
    queries does not go as it went when samples are left out."""
    origin = facts.forward.origin() if facts.forward is not None else None
    if origin is None or facts.samples is None or facts.healthy_too:
        return ()
    empty = [argument.shape for argument in origin.arguments if 0 in argument.shape]
    sizes = {size for shape in empty for size in shape if size > 1}
    found = [i for i, lengths in enumerate(facts.samples.lengths) if sizes & lengths]
    if len(found) != 1:
        return ()
    name, notes = facts.samples.named[found[0]]
    return (SampleShare(found[0], name, f"the empty selection has its shape, {tuple(empty[0])}", notes),)


# --- far too large ---------------------------------------------------------------------------------------------------


def _spike(facts: Facts, terms: tuple[str, ...], samples: tuple[SampleShare, ...]) -> Choice:
    if facts.healthy_too:
        return _at_fault_is_the_code(facts, terms)
    jump = _forward_jump(facts)
    if (norm := few_row_norm(facts)) is not None:
        return Choice(Cause(norm.module, "forward", norm.op, norm.source), terms, samples, jump)
    if jump is not None and jump.cause.direction == "data":
        return Choice(jump.cause, terms, samples or _of_input(facts, jump.cause), jump)
    if (cause := outlier(facts)) is not None:
        return Choice(cause, terms, samples or _of_input(facts, cause), jump)
    if samples and facts.samples is not None and facts.samples.small:
        return Choice(Cause(None, "data"), terms, samples, jump)
    if jump is not None and jump.cause.direction == "forward":
        return Choice(jump.cause, terms, samples, jump)
    if samples:
        return Choice(Cause(None, "data"), terms, samples)
    back = None if _loss_is_high(facts) else _backward_jump(facts)
    if back is not None:
        return Choice(back.cause, terms, (), back)
    if jump is not None and (facts.healthy is None or jump.cause.op in SCALING):
        return Choice(jump.cause, terms, (), jump)
    if facts.healthy_too is False and terms and _loss_is_high(facts):
        return Choice(Cause(None, "data"), terms)  # the code and the weights do well with another batch
    return Choice(_of_trigger(facts), terms)


def _at_fault_is_the_code(facts: Facts, terms: tuple[str, ...]) -> Choice:
    """Even the last healthy batch is bad now: weights, a module, a hook or the loss are to blame."""
    if facts.hook is not None:
        hook = facts.hook
        parameter = hook.owner if hook.parameter else None
        module = owner(hook.owner) if hook.parameter else hook.owner
        direction = _direction(facts)
        inside = _largest_gain(facts, module) if direction in ("forward", "backward") else None
        op = inside.cause.op if inside is not None and inside.cause.direction == direction else None
        return Choice(Cause(module, direction, op, hook.source, parameter), terms, (), inside if op else None)
    if changed := changed_outside(facts):
        return Choice(Cause(common_part(changed), "update"), terms)
    if facts.moments or facts.rates:
        return Choice(_update(facts), terms)
    jump = _largest_gain(facts)
    of_loss = facts.kind in ("loss-spike", "loss-shift")
    if jump is not None and not (of_loss and jump.cause.direction == "backward"):
        return Choice(jump.cause, terms, (), jump)
    if terms and of_loss:
        return Choice(Cause(None, "loss"), terms)
    return Choice(_of_trigger(facts), terms)


def _loss_is_high(facts: Facts) -> bool:
    """Whether it is a loss that has risen: what happens to the gradient in the same step cannot have done that."""
    return bool(facts.kinds & {"loss-spike", "loss-shift"})


def _direction(facts: Facts) -> Direction:
    """In which part of the step the guilty hook does its harm: a forward hook that leaves the losses as they are has
    hung something into the backward."""
    hook, again = facts.hook, facts.again
    assert hook is not None
    if hook.direction != "forward":
        return "backward" if hook.direction == "backward" else "after backward"
    if again is not None and facts.hookless is not None and again.terms == facts.hookless.terms:
        return "backward"
    return "loss" if hook.in_loss else "forward"


def outlier(facts: Facts) -> Cause | None:
    """A tensor of the batch far outside the range of those before."""
    for trigger in facts.plain.triggers:
        if trigger.kind == "input-outlier":
            return Cause(None, "data", parameter=trigger.parameter)
    usual = facts.history.get("inputs", {})
    found = [
        (given.absmax / usual[path], path)
        for path, given in facts.vitals.inputs.items()
        if usual.get(path) and given.absmax > OUTLIER * usual[path]
    ]
    return Cause(None, "data", parameter=max(found)[1]) if found else None


def _forward_jump(facts: Facts) -> Jump | None:
    if facts.forward is None or facts.healthy_forward is None:
        return None
    return first_forward_jump(facts.forward, facts.healthy_forward)


def _backward_jump(facts: Facts) -> Jump | None:
    if facts.backward is None or facts.healthy_backward is None:
        return None
    return first_backward_jump(facts.backward, facts.healthy_backward)


def _largest_gain(facts: Facts, module: str | None = None) -> Jump | None:
    """With no healthy run to compare with: the operation that multiplies most by itself, of one module or of all. In
    the forward where a loss has jumped, else in the backward."""
    usual = facts.history.get("terms", {})
    jumped = any(value > JUMPED * usual[name] for name, value in facts.vitals.terms.items() if usual.get(name))
    ways = [_gains_of_ops(facts.forward), _gains_of_nodes(facts.backward)]
    for gains in ways if jumped else ways[1:]:
        found = [jump for jump in gains if module is None or jump.cause.module == module]
        large = [jump for jump in found if jump.ratio >= GAIN and math.isfinite(jump.ratio)]
        largest = max((jump.ratio for jump in large), default=0.0)
        if large:
            return next(jump for jump in large if jump.ratio >= largest / NEAR)
    return None


def _gains_of_ops(trace: ForwardTrace | None) -> Iterable[Jump]:
    for op in trace.ops if trace is not None else ():
        if op.input_absmax and op.output_absmax:
            direction: Direction = "loss" if op.module is None else "forward"
            cause = Cause(op.module, direction, op.op, told(op.line))
            yield Jump(cause, op.output_absmax, op.input_absmax, op.output_absmax / op.input_absmax, 1.0)


def _gains_of_nodes(trace: BackwardTrace | None) -> Iterable[Jump]:
    for node in trace.nodes if trace is not None else ():
        out = max((norm for norm in node.outgoing if norm is not None), default=None)
        if out and node.incoming and node.op != "AccumulateGrad":
            yield Jump(node.cause, out, node.incoming, out / node.incoming, 1.0)


# --- updates, gradients that were written into, the graph ------------------------------------------------------------


def _update(facts: Facts) -> Cause:
    """What an update did wrong, or was given wrong."""
    if facts.moments:
        names = list(dict.fromkeys(moment.parameter for moment in facts.moments))
        return _of_parameters(names)
    if not facts.updated and (changed := changed_outside(facts)):
        return Cause(common_part(changed), "update")
    if facts.rates:
        modules = [trigger.module for trigger in facts.plain.triggers if trigger.kind == "update-jump"]
        every = len(facts.rates) == len(facts.vitals.rates)
        return Cause(ROOT if every else common_part(m for m in modules if m is not None), "update")
    if facts.vitals.bad_weights:
        return _of_parameters(facts.vitals.bad_weights)
    found = _of_trigger(facts)
    return found or Cause(ROOT, "update")


def _altered(facts: Facts) -> Cause | None:
    names = facts.vitals.altered or facts.vitals.uncleared or facts.vitals.bad_parameters
    bad = [name for name in facts.bad_given if name in names]
    if 0 < len(bad) < len(names):
        names = tuple(bad)  # clipped by an infinite norm: the others are zero
    if not names:
        return _of_trigger(facts)
    return Cause(common_part(map(owner, names)), "after backward", parameter=names[0] if len(names) == 1 else None)


def changed_outside(facts: Facts) -> list[str]:
    """Modules whose weights were changed between the last update and this step, the most changed first; those far less
    changed than the first, as by a running average of weights, are left out."""
    ratios = facts.vitals.outside
    largest = max(ratios.values(), default=0.0)
    return sorted((m for m, ratio in ratios.items() if ratio >= largest / 10), key=lambda m: -ratios[m])


def _of_parameters(names: Iterable[str]) -> Cause:
    names = list(names)
    return Cause(common_part(map(owner, names)), "update", parameter=names[0])


def _graph(facts: Facts) -> Cause:
    """A part that does not learn: where its gradient ends, or who does not let it move."""
    trigger = facts.plain.triggers[0]
    if facts.kind == "not-updated":
        return Cause(trigger.module, "update", parameter=trigger.parameter)
    if facts.kind == "frozen-module":
        return Cause(trigger.module, "graph", parameter=trigger.parameter)
    end = facts.gradient_end
    modules = [t.module for t in facts.plain.triggers if t.kind == facts.kind and t.module is not None]
    part = common_part(modules) if modules else trigger.module
    if end is None:
        return Cause(part, "graph", parameter=trigger.parameter)
    return Cause(end.module or part, end.direction, end.op, end.source, end.parameter)


def _raised(facts: Facts) -> Cause | None:
    return facts.forward.raised if facts.forward is not None else None


def _of_trigger(facts: Facts) -> Cause | None:
    """As far as the signs of life alone show it."""
    trigger = facts.plain.triggers[0]
    module = trigger.module or (owner(trigger.parameter) if trigger.parameter else None)
    direction: Direction = "backward"
    if trigger.kind in ("nonfinite-loss", "loss-spike", "loss-shift"):
        direction = "loss"
    elif trigger.kind in ("nonfinite-input", "input-outlier"):
        return Cause(None, "data", parameter=trigger.parameter)
    elif trigger.kind in ("alpha-collapse", "nonfinite-buffers", "rule"):
        direction = "forward"
    elif trigger.kind in ("nonfinite-weights", "update-jump"):
        direction = "update"
    if module is None and facts.vitals.states and direction == "backward":
        bad = [name for name, state in facts.vitals.states.items() if state not in (FROZEN, NO_GRADIENT, ZERO)]
        bad = [name for name in bad if not math.isfinite(facts.vitals.norms.get(name, 0.0))]
        module = common_part(bad) if bad else None
    if module is None and trigger.term is None and direction != "loss":
        return None
    return Cause(module, direction, parameter=trigger.parameter)
