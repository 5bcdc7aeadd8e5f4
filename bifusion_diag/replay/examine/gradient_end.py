"""Why a module that runs gets no gradient."""

from __future__ import annotations

import ast
import dataclasses
import linecache
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from bifusion_diag.errors import UserError, near_matches
from bifusion_diag.replay.examine.backward_trace import BackwardTrace, NodeTrace, trace_backward
from bifusion_diag.replay.examine.calls import Calls, eagerly, named_modules
from bifusion_diag.replay.examine.frames import Line, call_into, told, user_lines
from bifusion_diag.replay.examine.origin import storage_of
from bifusion_diag.replay.incident import Cause
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Training

SWITCHES = ("no_grad", "inference_mode", "set_grad_enabled")


def where_gradient_ends(training: Training, notes: StepNotes, module: str) -> Cause | None:
    """Where the gradient of a module that runs is lost on its way from the loss. Changes nothing.

    The direction is "graph" where there is no way: its parameters do not require a gradient ("requires_grad=False"),
    its output is cut off (the operation that did it, such as "Tensor.detach", or "no_grad", or a re-entrant
    "checkpoint"), the loss does not depend on it ("unused"), or it does not run ("not run"). It is "backward" where
    there is a way, on which the gradient becomes exactly zero: the first node or hook that made it so; "after backward"
    for a hook on a parameter.
    None: the module gets a gradient.

    Args:
        training: what runs.
        notes: of the step.
        module: whose parameters are meant, its children's included where it has none of its own.

    Raises:
        UserError: the model has no module of that name that holds parameters.
    """
    modules = named_modules(training.model)
    if module not in modules or not any(True for _ in modules[module].parameters()):
        raise UserError(f"the model has no module {module!r} with parameters.{near_matches(module, modules)}")
    own = list(modules[module].parameters(recurse=False)) or list(modules[module].parameters())
    names = {id(parameter): name for name, parameter in training.parameters().items()}
    learning = [parameter for parameter in own if parameter.requires_grad]
    if not learning:
        return Cause(module, "graph", "requires_grad=False", None, names.get(id(own[0])))
    trace, wanted = trace_backward(training, notes), [names[id(parameter)] for parameter in learning]
    if any(trace.gradients.get(name, 0.0) != 0 for name in wanted):
        return None
    return _cut(training, notes, module, learning) or _zero(trace, wanted)


class _Cut(NamedTuple):
    """An operation whose output has lost the graph that its input had."""

    op: str
    module: str | None
    lines: tuple[Line, ...]  # the user's frames, the innermost first
    enabled: bool  # whether a graph was recorded
    checkpoint: Line | None  # where the user called a checkpoint that it runs in


class _Flow(TorchFunctionMode):
    """Follows what is computed of some parameters, and where it loses its graph."""

    def __init__(self, parameters: Sequence[nn.Parameter], calls: Calls) -> None:
        super().__init__()
        self.cuts: list[_Cut] = []
        self.ran = False
        self.left = frozenset[int]()  # cuts behind which numbers were taken out of PyTorch
        self._calls = calls
        self._parameters = {id(parameter) for parameter in parameters}
        self._leads: dict[Any, bool] = {}  # autograd node → it leads to the parameters
        self._cut_off: dict[int, frozenset[int]] = {}  # storage → cuts
        self._kept: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        connected = [self.leads(value) for value in inputs]
        behind = frozenset[int]()
        for value, whole in zip(inputs, connected, strict=True):
            if not whole:  # memory that a Function computed without a graph may be in one by now
                behind |= self._cut_off.get(storage_of(value), frozenset())
        output = func(*args, **kwargs)
        if any(connected) or behind:
            changed = args[0] if func is Tensor.__setitem__ else output
            self._after(func, changed, any(connected), behind)
        return output

    def _after(self, func: Any, output: Any, connected: bool, behind: frozenset[int]) -> None:
        self.ran = True
        values = [value for value in tree_leaves(output) if isinstance(value, Tensor)]
        lost = [value for value in values if not self.leads(value)]
        if connected and lost:
            name = resolve_name(func) or getattr(func, "__name__", str(func))
            name = name.removeprefix("torch.").removesuffix(".__get__")
            checkpoint = call_into("torch/utils/checkpoint.py")
            enabled = torch.is_grad_enabled()
            self.cuts.append(_Cut(name, self._calls.current, tuple(user_lines()), enabled, checkpoint))
            behind = behind | {len(self.cuts) - 1}
        if not values and isinstance(output, np.ndarray):
            self.left |= behind
        for value in lost:
            self._cut_off[storage_of(value)] = behind
            self._kept.append(value)

    def cut_of(self, value: Tensor) -> _Cut | None:
        """The first cut that a tensor lies behind."""
        found = self._cut_off.get(storage_of(value)) or self.left
        return self.cuts[min(found)] if found else None

    def leads(self, value: Tensor) -> bool:
        """Whether a tensor's gradient reaches the parameters."""
        if id(value) in self._parameters:
            return True
        with torch._C.DisableTorchFunction():
            start = value.grad_fn
        waiting = [start] if start is not None else []
        while waiting:
            node = waiting[-1]
            if node in self._leads:
                waiting.pop()
                continue
            following = [n for n, _ in node.next_functions if n is not None]
            unknown = [n for n in following if n not in self._leads]
            if id(getattr(node, "variable", None)) in self._parameters or any(self._leads.get(n) for n in following):
                self._leads[node] = True
            elif unknown:
                waiting += unknown
            else:
                self._leads[node] = False
        return start is not None and self._leads[start]


def _cut(training: Training, notes: StepNotes, module: str, parameters: Sequence[nn.Parameter]) -> Cause | None:
    """Why there is no way from the loss to the parameters; None: there is one."""
    with notes.again() as batch:
        flow: _Flow
        calls = Calls(training.model, torch._C.DisableTorchFunction, measured=False)
        flow = _Flow(parameters, calls)
        with eagerly(training.model), calls.watching(), flow:
            loss = training.loss(batch)
        assert loss.total is not None
        if flow.leads(loss.total):
            return None
        called = any(call.name == module or call.name.startswith(f"{module}.") for call in calls.calls)
        cut = flow.cut_of(loss.total)
        if cut is None:
            return Cause(module, "graph", "unused" if flow.ran or called else "not run")
        if cut.enabled:
            return Cause(cut.module, "graph", cut.op, told(cut.lines[0] if cut.lines else None))
        line = next((line for frame in cut.lines if (line := _switch(frame)) is not None), None)
        if line is None and cut.checkpoint is not None:  # a re-entrant one, none of whose inputs requires a gradient
            return Cause(cut.module, "graph", "checkpoint", told(cut.checkpoint))
        return Cause(cut.module, "graph", "no_grad", told(line or (cut.lines[0] if cut.lines else None)))


def _switch(line: Line) -> Line | None:
    """The line around another one that switches gradients off: a with statement or a decorator."""
    file, number = line
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return None
    found: Line | None = None
    for node in ast.walk(tree):  # outer ones come first
        if not isinstance(node, (ast.With, ast.FunctionDef)) or not node.lineno <= number <= (node.end_lineno or 0):
            continue
        switches: list[ast.expr] = []
        if isinstance(node, ast.With):
            switches = [item.context_expr for item in node.items]
        else:
            switches = node.decorator_list
            found = None  # what is around a definition is not around its call
        for switch in switches:
            if any(word in ast.unparse(switch) for word in SWITCHES):
                found = file, switch.lineno
    return found


# --- a way on which the gradient becomes zero -------------------------------------------------------------------------


def _zero(trace: BackwardTrace, parameters: Sequence[str]) -> Cause | None:
    """The first node or hook on the way to the parameters that was given a gradient and gave none on."""
    for name in parameters:
        if trace.accumulated.get(name, 0.0) != 0:
            return Cause(name.rpartition(".")[0], "after backward", "hook on the accumulated gradient", None, name)
    arrives: dict[int, float] = {}
    for node in trace.nodes:
        for following, norm in zip(node.next, node.outgoing, strict=False):
            if following >= 0:
                arrives[following] = arrives.get(following, 0.0) + (norm or 0.0)
    leads = sorted(_leading(trace.nodes, set(parameters)))
    for index in leads:  # what someone does to a gradient goes before what is zero by itself, as of a sum over nothing
        node = trace.nodes[index]
        if arrives.get(index, 0.0) != 0 and node.incoming == 0:
            return _hook(node)
    for index in leads:
        node = trace.nodes[index]
        passed = any(norm for following, norm in zip(node.next, node.outgoing, strict=False) if following in leads)
        if node.incoming and not passed and node.parameter is None:
            return node.cause
    return None


def _leading(nodes: Sequence[NodeTrace], parameters: set[str]) -> set[int]:
    """Nodes from which there is a way to some parameters."""
    before: dict[int, list[int]] = {}
    for index, node in enumerate(nodes):
        for following in node.next:
            before.setdefault(following, []).append(index)
    waiting = [index for index, node in enumerate(nodes) if node.parameter in parameters]
    found = set(waiting)
    while waiting:
        new = set(before.get(waiting.pop(), ())) - found
        found |= new
        waiting += new
    return found


def _hook(node: NodeTrace) -> Cause:
    if node.parameter is not None:
        return Cause(node.module, "after backward", "hook on the gradient", None, node.parameter)
    return dataclasses.replace(node.cause, op=f"hook on the gradient before {node.op}")
