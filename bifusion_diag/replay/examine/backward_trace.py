"""A step's backward with every autograd node, every operation and every module's gradient watched."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bifusion_diag.probes.base import ROOT
from bifusion_diag.probes.loss_terms import LossTerms
from bifusion_diag.probes.norms import norm_of
from bifusion_diag.probes.outputs import distinct_tensors
from bifusion_diag.replay.examine.calls import tensor_range
from bifusion_diag.replay.examine.forward_trace import NEAR, Jump
from bifusion_diag.replay.examine.frames import Line, line_of, line_of_error, told
from bifusion_diag.replay.examine.origin import OpWatch, Origin, inputs_of, node_name
from bifusion_diag.replay.incident import Cause, ModuleTrace
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Training


class NodeTrace(NamedTuple):
    """One node of the autograd graph, as it ran.

    Attributes:
        op: "SqrtBackward0"; "AccumulateGrad" where a parameter takes its gradient.
        module: whose forward made it.
        line: of the user's code that made it.
        incoming: L2 norm of the gradients that it was given, after users' hooks on them; None: it did not run.
        outgoing: of those that it returned, one for each of `next`; None: it returned none.
        next: indices of the nodes that they go to; -1: nowhere.
        parameter: of an AccumulateGrad.
        backward: where the user's own code ran in it: in a hook or in a Function's backward.
    """

    op: str
    module: str | None
    line: Line | None
    incoming: float | None
    outgoing: tuple[float | None, ...]
    next: tuple[int, ...]
    parameter: str | None = None
    backward: Line | None = None

    @property
    def cause(self) -> Cause:
        """This node."""
        return Cause(self.module, "backward", self.op, told(self.backward or self.line), self.parameter)


@dataclass(frozen=True)
class BackwardTrace:
    """What a backward did.

    Attributes:
        modules: every call of the forward, as they ended, with the gradients that arrived at their outputs.
        nodes: in the order in which they ran, then those that did not. Those inside of re-entrant checkpoints are not
            there.
        gradients: L2 norm by parameter, as the backward left it; a parameter without a gradient is missing.
        accumulated: L2 norm by parameter of what arrived, before hooks that change what was accumulated.
        origins: by parameter whose gradient is bad: where its bad values began, the first first.
        raised: where the step raised an error, and which.
    """

    modules: tuple[ModuleTrace, ...]
    nodes: tuple[NodeTrace, ...] = ()
    gradients: Mapping[str, float] = field(default_factory=dict)
    accumulated: Mapping[str, float] = field(default_factory=dict)
    origins: Mapping[str, tuple[Origin, ...]] = field(default_factory=dict)
    raised: Cause | None = None

    @property
    def bad_parameters(self) -> tuple[str, ...]:
        """Parameters whose gradient is NaN or infinite."""
        return tuple(name for name, norm in self.gradients.items() if not math.isfinite(norm))

    def origin(self, parameter: str | None = None) -> Origin | None:
        """Where the bad values of a parameter's gradient began; None: of all, the first."""
        names = self.bad_parameters if parameter is None else (parameter,)
        found = [origin for name in names for origin in self.origins.get(name, ())]
        backward = [origin for origin in found if origin.node is not None]
        return next(iter(backward or found), None)

    def bad_node(self) -> NodeTrace | None:
        """The first node that was given finite gradients and returned others that arrive at a parameter."""
        arrives: set[int] = set()
        for index in reversed(range(len(self.nodes))):
            node = self.nodes[index]
            if (node.parameter is not None and _is_bad(node.incoming)) or any(
                following in arrives and _is_bad(norm)
                for following, norm in zip(node.next, node.outgoing, strict=False)
            ):
                arrives.add(index)
        return next((self.nodes[index] for index in sorted(arrives) if not _is_bad(self.nodes[index].incoming)), None)

    def cause(self, parameter: str | None = None) -> Cause | None:
        """Where the bad gradients began, of one parameter or of all. None: all are finite."""
        if self.raised is not None:
            return self.raised
        if not self.bad_parameters:
            return None
        origin, node = self.origin(parameter), self.bad_node()
        if origin is not None and (node is None or (origin.node is not None and origin.op is not None)):
            return origin.cause
        return node.cause if node is not None else None


def trace_backward(training: Training, notes: StepNotes, terms: Sequence[str] | None = None) -> BackwardTrace:
    """Run a step once more and watch its backward. Changes nothing.

    Args:
        training: what runs.
        notes: of the step.
        terms: the backward is that of these loss terms alone, with their weights. None: of the total.
    """
    with notes.again() as batch, torch.autograd.set_multithreading_enabled(False):
        arrived: dict[int, tuple[float, int]] = {}  # call → norm and bad values of its outputs' gradients

        def ended(index: int, output: Any) -> None:
            module = calls.modules[index]
            if module._backward_hooks or module._backward_pre_hooks:  # they get a node of their own, made next
                watch.made_by.setdefault(torch.autograd._get_sequence_nr(), (calls.calls[index].name, None))
            _listen(watch, arrived, index, output)

        watch = OpWatch(training.model, inputs_of(batch), ended=ended)
        calls, graph = watch.calls, _Graph(watch)
        raised: Cause | None = None
        forward = 0
        with watch.watching():
            try:
                loss = training.loss(batch)
                if terms is not None:
                    loss = _only(loss, terms)
                forward = len(calls.calls)
                assert loss.total is not None
                with watch.quiet():
                    graph.hook(loss.total)
                training.backward(loss)
            except Exception as error:
                where, node = told(line_of_error(error)), graph.running
                if forward and node is not None:
                    raised = Cause(watch.place(node)[0], "backward", type(error).__name__, where)
                else:
                    raised = Cause(calls.current, "forward", type(error).__name__, where)
            finally:
                graph.unhook()
        scale = training.scaler.get_scale() if training.scaler is not None else 1.0
        gradients = {name: float(norm_of(g)) for name, g in training.gradients().items()}
        origins = {
            name: tuple(watch.origins_of(g))
            for name, g in training.gradients().items()
            if not math.isfinite(gradients[name])
        }
        nodes, accumulated = graph.trace({id(p): name for name, p in training.parameters().items()})
        rows = _rows(calls.calls, forward or len(calls.calls), arrived)
        accumulated = {name: norm / scale for name, norm in accumulated.items()}
        return BackwardTrace(rows, nodes, gradients, accumulated, origins, raised)


def first_backward_jump(trace: BackwardTrace, contrast: BackwardTrace, factor: float = 8.0) -> Jump | None:
    """Where the gradient first grew by a factor over that of a healthy run of the same model, on its way from the loss:
    in a hook of the user's, in a node, or else in a module as a whole. None: nowhere."""
    for find in (_jumps_of_nodes, _jumps_of_modules):
        large = [jump for jump in find(trace, contrast) if jump.growth >= factor and jump.ratio >= factor]
        if large:
            largest = max(jump.growth for jump in large)
            return next(jump for jump in large if jump.growth >= largest / NEAR)
    return None


def _is_bad(norm: float | None) -> bool:
    return norm is not None and not math.isfinite(norm)


class _Graph:
    """Hooks on the nodes of a graph."""

    def __init__(self, watch: OpWatch) -> None:
        self._watch = watch
        self._nodes: list[Any] = []
        self._index: dict[Any, int] = {}
        self._handles: list[Any] = []
        self._ran: list[int] = []
        self._incoming: dict[int, float] = {}
        self._outgoing: dict[int, tuple[float | None, ...]] = {}

    def hook(self, total: Tensor) -> None:
        """Put hooks on every node that leads to a tensor."""
        waiting = [total.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in self._index:
                continue
            index = self._index[node] = len(self._nodes)
            self._nodes.append(node)
            waiting += [following for following, _ in node.next_functions]
            self._handles.append(node.register_prehook(self._began(index)))
            self._handles.append(node.register_hook(self._ended(index)))

    def unhook(self) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def running(self) -> Any:
        """The node that has begun and not ended; None: none has."""
        return next((self._nodes[index] for index in reversed(self._ran) if index not in self._outgoing), None)

    def _began(self, index: int) -> Callable[[Any], None]:
        def began(gradients: Any) -> None:
            self._ran.append(index)
            with self._watch.quiet():
                self._incoming[index] = math.hypot(*(_norm(g) or 0.0 for g in gradients))

        return began

    def _ended(self, index: int) -> Callable[[Any, Any], None]:
        def ended(returned: Any, given: Any) -> None:
            with self._watch.quiet():
                self._outgoing[index] = tuple(_norm(g) for g in returned)

        return ended

    def trace(self, names: Mapping[int, str]) -> tuple[tuple[NodeTrace, ...], dict[str, float]]:
        """The nodes, and the norms that arrived at parameters. ``names``: by the parameter's id."""
        ran = list(dict.fromkeys([*self._ran, *range(len(self._nodes))]))
        place = {index: position for position, index in enumerate(ran)}
        found = []
        accumulated: dict[str, float] = {}
        for index in ran:
            node = self._nodes[index]
            module, line = self._watch.place(node)
            parameter = names.get(id(node.variable)) if hasattr(node, "variable") else None
            if parameter is not None:
                accumulated[parameter] = self._incoming.get(index, 0.0)
            following = tuple(place.get(self._index[n], -1) if n is not None else -1 for n, _ in node.next_functions)
            function = getattr(type(node), "_forward_cls", None)
            found.append(
                NodeTrace(
                    node_name(node),
                    module,
                    line,
                    self._incoming.get(index),
                    self._outgoing.get(index, ()),
                    following,
                    parameter,
                    self._watch.ran_by_user.get(node) or (function and line_of(function.backward)),
                )
            )
        return tuple(found), accumulated


def _listen(watch: OpWatch, arrived: dict[int, tuple[float, int]], index: int, output: Any) -> None:
    """Measure the gradients of a call's outputs as they arrive."""

    def measure(gradient: Tensor) -> None:
        with watch.quiet():
            norm = float(norm_of(gradient))
            bad = 0 if math.isfinite(norm) else tensor_range(gradient)[1]
            before, bad_before = arrived.get(index, (0.0, 0))
            arrived[index] = (math.hypot(before, norm), bad_before + bad)

    for tensor in distinct_tensors(output):
        if tensor.requires_grad and not tensor.is_leaf:
            tensor.register_hook(measure)


def _rows(
    calls: Sequence[ModuleTrace], forward: int, arrived: Mapping[int, tuple[float, int]]
) -> tuple[ModuleTrace, ...]:
    """Calls of the forward with their gradients; those of checkpointed blocks have theirs from the second forward."""
    again: dict[str, list[int]] = {}
    for index in range(forward, len(calls)):
        if index in arrived:
            again.setdefault(calls[index].name, []).append(index)
    rows = []
    for index, call in enumerate(calls[:forward]):
        found = arrived.get(index)
        if found is None and again.get(call.name):
            found = arrived[again[call.name].pop(0)]
        norm, bad = found if found is not None else (None, 0)
        rows.append(dataclasses.replace(call, gradient_norm=norm, gradient_bad=bad))
    return tuple(rows)


def _only(loss: LossTerms, terms: Sequence[str]) -> LossTerms:
    """The loss of some terms alone."""
    parts = [loss.terms[name].reshape(()) * loss.weights.get(name, 1.0) for name in terms]
    return loss._replace(total=torch.stack(parts).sum())


def _norm(gradient: Tensor | None) -> float | None:
    return None if gradient is None else float(norm_of(gradient))


# --- where a gradient grew --------------------------------------------------------------------------------------------


class _Passage(NamedTuple):
    """What a gradient went through: its norm before and after."""

    cause: Cause
    before: float
    after: float


def _jumps_of_nodes(trace: BackwardTrace, contrast: BackwardTrace) -> list[Jump]:
    return _jumps(_passages(trace), _passages(contrast))


def _jumps(here: Mapping[Any, _Passage], there: Mapping[Any, _Passage]) -> list[Jump]:
    jumps = []
    for place, passage in here.items():
        other = there.get(place)
        if other is None:
            other = passage._replace(after=passage.before)  # it was not there: it should have changed nothing
        norms = (passage.before, passage.after, other.before, other.after)
        if all(math.isfinite(norm) and norm > 0 for norm in norms):
            ratio, given = passage.after / other.after, passage.before / other.before
            jumps.append(Jump(passage.cause, passage.after, other.after, ratio, given))
    return jumps


def _passages(trace: BackwardTrace) -> dict[Any, _Passage]:
    """Through hooks on gradients, and through nodes, in the order in which they ran."""
    found: dict[Any, _Passage] = {}
    counts: dict[Any, int] = {}
    arrives = _arrivals(trace)
    for index, node in enumerate(trace.nodes):
        place = (node.module, node.op, node.line, node.parameter)
        counts[place] = counts.get(place, 0) + 1
        if node.incoming is None:
            continue
        if index in arrives:  # a norm of a sum is at most the sum of the norms
            cause = dataclasses.replace(node.cause, op=f"hook on the gradient before {node.op}")
            found[("hook", *place, counts[place])] = _Passage(cause, arrives[index], node.incoming)
        after = max((norm for norm in node.outgoing if norm is not None), default=None)
        if after is not None:
            found[(*place, counts[place])] = _Passage(node.cause, node.incoming, after)
    for name, norm in trace.gradients.items():
        if name in trace.accumulated:
            module = name.rpartition(".")[0] or ROOT
            cause = Cause(module, "backward", "hook on the accumulated gradient", None, name)
            found["accumulated", name] = _Passage(cause, trace.accumulated[name], norm)
    return found


def _arrivals(trace: BackwardTrace) -> dict[int, float]:
    """Sum of the norms that were sent to each node."""
    sent: dict[int, float] = {}
    for node in trace.nodes:
        for following, norm in zip(node.next, node.outgoing, strict=False):
            if following >= 0 and norm is not None:
                sent[following] = sent.get(following, 0.0) + norm
    return sent


def _jumps_of_modules(trace: BackwardTrace, contrast: BackwardTrace) -> list[Jump]:
    return _jumps(_through_modules(trace), _through_modules(contrast))


def _through_modules(trace: BackwardTrace) -> dict[Any, _Passage]:
    """Through modules as a whole, inner ones before outer ones."""
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    for node in trace.nodes:
        inside = _with_outer(node.module)
        for following, norm in zip(node.next, node.outgoing, strict=False):
            if following < 0 or norm is None:
                continue
            target = trace.nodes[following]
            others = _with_outer(target.module)
            for name in others - inside:
                before[name] = math.hypot(before.get(name, 0.0), norm)
            left = inside if target.parameter is not None else inside - others
            for name in left:
                after[name] = math.hypot(after.get(name, 0.0), norm)
    names = sorted(before.keys() & after.keys(), key=lambda name: -name.count("."))
    return {name: _Passage(Cause(name, "backward"), before[name], after[name]) for name in names}


def _with_outer(module: str | None) -> set[str]:
    """A module and all that hold it, but the model itself."""
    if module is None or module == ROOT:
        return set()
    parts = module.split(".")
    return {".".join(parts[: size + 1]) for size in range(len(parts))}
