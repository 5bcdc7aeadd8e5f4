"""Where NaN and infinite values are made: every operation of a step, and which of its values are bad.

A value that is bad is followed from the operation that made it, of inputs that were all finite, through every storage
that holds something computed of it. Infinities that are written on purpose, as masks are, are nobody's fault until an
operation makes NaN of them, such as the softmax of a row that is masked entirely.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.modules.loss import _Loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bifusion_diag.probes.base import ROOT
from bifusion_diag.probes.data import fields_of
from bifusion_diag.probes.outputs import numbers
from bifusion_diag.replay.examine.batches import tensors_of
from bifusion_diag.replay.examine.calls import Calls, eagerly, named_modules, range_of, tensor_range
from bifusion_diag.replay.examine.frames import Line, hooked_module, told, user_line
from bifusion_diag.replay.incident import Cause, Direction

#: Operations that copy a constant: the infinities that they write were meant.
WRITERS = {
    *("fill", "fill_", "masked_fill", "masked_fill_", "full", "full_like", "new_full", "where", "scalar_tensor"),
    *("lift_fresh", "copy_", "_to_copy", "index_put", "index_put_", "_index_put_impl_", "index_fill", "index_fill_"),
    *("scatter", "scatter_", "masked_scatter", "masked_scatter_", "constant_pad_nd", "detach", "clone"),
}
CONSTANTS = {"full", "full_like", "new_full", "scalar_tensor", "lift_fresh"}  # of them, those that make a new tensor
#: Operations by which a mask becomes NaN that masks too much. Elsewhere NaN comes of what was written.
OF_MASKS = {
    *("_softmax", "_log_softmax", "_masked_softmax", "logsumexp", "_logcumsumexp", "logaddexp"),
    *("add", "add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "div_"),
}
OVERFLOW = {"exp", "exp_", "exp2", "exp2_", "expm1", "expm1_", "sinh", "cosh"}  # of −∞ they are finite
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"}  # hold anything


class Argument(NamedTuple):
    """What an operation was given."""

    shape: tuple[int, ...]
    dtype: str
    low: float | None  # smallest value, None: it has none
    high: float | None
    least: float | None  # smallest absolute value


@dataclass(frozen=True)
class Origin:
    """Where bad values began.

    Attributes:
        op: "aten.log"; None: not an operation but a tensor that was bad before the step.
        module: whose forward, or in the backward whose forward's counterpart, did it. None: none.
        direction: of the step.
        source: the user's line. In the backward that of the forward operation, or of the user's hook or Function.
        parameter: name of the parameter, buffer or input that is bad itself.
        node: in the backward: autograd's node, such as "SqrtBackward0".
        in_hook: in the backward: the values were made by the user's own code: a hook or a Function's backward.
        in_function: it was a Function's backward.
        of_nothing: a division of 0 by a count of 0.
        written: infinities that were meant.
        nan: there is a NaN among them.
        bad: how many.
        arguments: of the operation, those that are not changed in place.
        after: how many operations of the forward ran before it.
    """

    op: str | None
    module: str | None
    direction: Direction
    source: str | None = None
    parameter: str | None = None
    node: str | None = None
    in_hook: bool = False
    in_function: bool = False
    of_nothing: bool = False
    written: bool = False
    nan: bool = False
    bad: int = 0
    arguments: tuple[Argument, ...] = ()
    after: int = 0

    @property
    def largest(self) -> float:
        """Largest absolute value among its arguments."""
        ends = [abs(end) for given in self.arguments for end in (given.low, given.high) if end is not None]
        return max((end for end in ends if math.isfinite(end)), default=0.0)

    @property
    def cause(self) -> Cause:
        """As an incident tells it: in the backward the node, unless the user's own code did it."""
        op = self.op if self.node is None or self.in_hook else self.node
        return Cause(self.module, self.direction, op, self.source, self.parameter)


class Op(NamedTuple):
    """One operation."""

    op: str
    module: str | None
    line: Line | None
    input_absmax: float | None
    output_absmax: float | None
    direction: Direction = "forward"  # or "loss"


class Leaf(NamedTuple):
    """A tensor that is there before the step."""

    name: str
    module: str | None
    kind: str  # "parameter", "buffer", "attribute", "input"


class _Place(NamedTuple):
    """Where an operation runs."""

    node: Any  # of autograd, None: in a forward
    module: str | None
    line: Line | None


class OpWatch(TorchDispatchMode):
    """Sees every operation while :meth:`watching`.

    Args:
        model: whose modules operations run in.
        inputs: tensors of the batch by name. Bad values that come from nowhere are those of a bad input: a step may
            have made a tensor of an array.
        ranges: whether to keep the ranges of all operations.
        ended: called with the index of a module's call that has ended, and its output.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Sequence[Tensor]],
        *,
        ranges: bool = False,
        ended: Callable[[int, Any], None] | None = None,
    ) -> None:
        super().__init__()
        self.calls = Calls(model, self.quiet, ended=ended)
        self.origins: list[Origin] = []
        self.ops: list[Op] = []
        self.inputs = {name: range_of(tensors) for name, tensors in inputs.items()}
        self.made_by: dict[int, tuple[str | None, Line | None]] = {}  # number of an autograd node → module, line
        self.ran_by_user: dict[Any, Line] = {}  # autograd node → line of a hook or of a Function's backward
        self._model, self._ranges = model, ranges
        self._leaves = leaves_of(model, inputs)
        self._suspect = next((name for name, (_, bad) in self.inputs.items() if bad), None)
        self._names = {id(module): name for name, module in self.calls.names.items()}
        self._bad: dict[int, frozenset[int]] = {}  # storage → origins
        self._kept: list[Tensor] = []  # bad tensors: their storages are not used again
        self._off = 0
        self._until: FrameType | None = None  # frames that were called before it are not the step's

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Everything that runs inside is seen."""
        self._until = sys._getframe(2)  # of the caller; 1 is contextlib's
        with eagerly(self._model), self.calls.watching(), self:
            yield

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Operations inside are not the step's."""
        self._off += 1
        try:
            yield
        finally:
            self._off -= 1

    def origins_of(self, value: Tensor) -> list[Origin]:
        """Where the bad values of a tensor began, the first to be met first; what was meant, last."""
        found = [self.origins[i] for i in sorted(self._bad.get(storage_of(value), ()))]
        return sorted(found, key=lambda origin: origin.written)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._off:
            return func(*args, **kwargs)
        number = torch.autograd._get_sequence_nr() - 1
        node: Any = torch._C._current_autograd_node()
        line = user_line(self._until)
        module = self.calls.current
        if node is not None and torch.is_grad_enabled():  # a checkpointed block runs its forward again
            module, node = module or self.place(node)[0], None
        if node is None:
            self.made_by.setdefault(number, (module, line))
        elif line is not None:
            self.ran_by_user.setdefault(node, line)
        place = _Place(node, module, line)
        name = func._schema.name.split("::")[1]
        if func.is_view or name in EMPTY:
            return func(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if _floating(t)]
        written = _written(func, args, kwargs) if func._schema.is_mutable or "norm" in name else []
        before = {id(t): (bad := _is_bad(t), bad and _has_nan(t)) for t in written}
        absmax = self._largest(inputs) if self._ranges else None
        constants = [value for value in tree_leaves((args, kwargs)) if isinstance(value, float)]
        output = func(*args, **kwargs)
        self._after(func, name, place, args, inputs, before, [*_outputs(output), *written], absmax, constants)
        return output

    def _after(
        self,
        func: Any,
        name: str,
        place: _Place,
        args: Sequence[Any],
        inputs: list[Tensor],
        before: dict[int, tuple[bool, bool]],  # by id of what was changed in place: whether it was bad, and NaN
        outputs: list[Tensor],
        absmax: float | None,
        constants: Sequence[float],
    ) -> None:
        outputs = list({id(t): t for t in outputs if _floating(t)}.values())
        ranges = [tensor_range(t) for t in outputs]
        if self._ranges and place.node is None and outputs:
            finite = [largest for largest, _ in ranges if largest is not None]
            largest = max(finite, default=None)
            direction = self._direction(place.module)
            self.ops.append(Op(_op_name(func), place.module, place.line, absmax, largest, direction))
        bad = [t for t, (_, count) in zip(outputs, ranges, strict=True) if count]
        if not bad:
            return
        bad_inputs = [t for t in inputs if (before[id(t)][0] if id(t) in before else _is_bad(t))]
        sources: set[int] = set()
        for tensor in bad_inputs:
            if tensor.dim() or storage_of(tensor) in self._bad or storage_of(tensor) in self._leaves:
                sources |= self._known(tensor, place)
        nan = any(map(_has_nan, bad))
        made_nan = nan and not any(before[id(t)][1] if id(t) in before else _has_nan(t) for t in bad_inputs)
        meant = all(self.origins[i].written for i in sources)
        overflows = name in OVERFLOW and any(map(_has_infinity, bad)) and not any(map(_has_infinity, bad_inputs))
        if not sources or (meant and (overflows or (made_nan and (name in OF_MASKS or "attention" in name)))):
            count = sum(count for _, count in ranges)
            given = tuple(_argument(t) for t in inputs if id(t) not in before)
            constant = name in WRITERS and (bool(bad_inputs) or math.inf in constants or -math.inf in constants)
            if name not in CONSTANTS:  # masks are −∞; what writes ∞ among other values is a fault
                constant = constant and not any(bool((numbers(t) == math.inf).any()) for t in bad)
            written = not nan and (constant or (name == "log" and _is_mask(inputs)))
            facts = {"written": written, "nan": nan, "bad": count, "arguments": given}
            sources = {self._add(place, _op_name(func), of_nothing=nan and _divides_nothing(name, args), **facts)}
        for tensor in bad:
            self._bad[storage_of(tensor)] = frozenset(sources)
            self._kept.append(tensor)

    def _known(self, tensor: Tensor, place: _Place) -> frozenset[int]:
        """Where an input's bad values began. If it has come from nowhere, this is told from now on."""
        storage = storage_of(tensor)
        if storage not in self._bad:
            values = numbers(tensor)
            nan = _has_nan(tensor)
            count = tensor_range(tensor)[1]
            leaf = self._leaves.get(storage)
            if leaf is None and self._suspect is not None and place.node is None:
                leaf = Leaf(self._suspect, None, "input")
            if leaf is None:
                written = not nan and not bool((values == math.inf).any())
                index = self._add(place, None, written=written, nan=nan, bad=count)
            else:
                direction: Direction = "data" if leaf.kind == "input" else "update"
                meant = leaf.kind != "parameter" and not nan and not bool((values == math.inf).any())
                if leaf.kind == "input" and meant:
                    meant = bool((values.isinf() | (values == 0)).all())
                origin = Origin(None, leaf.module, direction, None, leaf.name, written=meant, nan=nan, bad=count)
                index = self._append(origin)
            self._bad[storage] = frozenset({index})
            self._kept.append(tensor)
        return self._bad[storage]

    def _add(self, place: _Place, op: str | None, **facts: Any) -> int:
        if place.node is None:
            return self._append(
                Origin(op, place.module, self._direction(place.module), told(place.line), after=len(self.ops), **facts)
            )
        module, line = self.place(place.node)
        name, parameter = node_name(place.node), None
        in_hook = place.line is not None  # or in a Function's backward
        direction: Direction = "backward"
        hooked = hooked_module() if in_hook else None
        if hooked is not None:
            module = self._names.get(id(hooked), module)
        elif in_hook and name == "AccumulateGrad":  # what is done to a parameter's gradient alone
            direction, leaf = "after backward", self.leaf(place.node.variable)
            parameter = leaf.name if leaf is not None else None
        source = told(place.line or line)
        in_function = in_hook and hooked is None and isinstance(place.node, BackwardCFunction)
        return self._append(Origin(op, module, direction, source, parameter, name, in_hook, in_function, **facts))

    def _direction(self, name: str | None) -> Direction:
        """Losses are computed outside of modules, by PyTorch's own, and by those that are called so."""
        if name is None:
            return "loss"
        module = self.calls.names[name]
        kind = type(module).__name__.lower()
        return "loss" if isinstance(module, _Loss) or "loss" in kind or "criterion" in kind else "forward"

    def _append(self, origin: Origin) -> int:
        self.origins.append(origin)
        return len(self.origins) - 1

    def place(self, node: Any) -> tuple[str | None, Line | None]:
        """Module and line of the forward operation that made an autograd node."""
        if "AccumulateGrad" in node.name():
            leaf = self._leaves.get(storage_of(node.variable))
            return (leaf.module if leaf is not None else None), None
        number = node._sequence_nr()
        for earlier in range(number, number - 8, -1):  # a Function without an operation in it has none of its own
            if earlier in self.made_by:
                return self.made_by[earlier]
        return None, None

    def leaf(self, tensor: Tensor) -> Leaf | None:
        """What a tensor is, of those that were there before the step."""
        return self._leaves.get(storage_of(tensor))

    def _largest(self, inputs: Sequence[Tensor]) -> float | None:
        found = [tensor_range(t)[0] for t in inputs]
        return max((largest for largest in found if largest is not None), default=None)


def leaves_of(model: nn.Module, inputs: Mapping[str, Sequence[Tensor]]) -> dict[int, Leaf]:
    """What is there before the step, by storage. ``inputs``: of the batch, by name."""
    leaves = {storage_of(tensor): Leaf(name, None, "input") for name, tensors in inputs.items() for tensor in tensors}
    for module_name, module in named_modules(model).items():
        prefix = "" if module_name == ROOT else f"{module_name}."
        for kind, held in (
            ("attribute", vars(module)),
            ("buffer", module._buffers),
            ("parameter", module._parameters),
        ):
            for name, tensor in held.items():
                if isinstance(tensor, Tensor):
                    leaves[storage_of(tensor)] = Leaf(f"{prefix}{name}", module_name, kind)
    return leaves


def inputs_of(batch: Any) -> dict[str, list[Tensor]]:
    """The tensors of a batch as the :class:`~bifusion_diag.replay.watch.vitals.Vitals` name them, and its arrays by
    path."""
    found = {name: list(field.tensors) for name, field in fields_of(batch).items()}
    known = {storage_of(tensor) for tensors in found.values() for tensor in tensors}
    for path, tensor in tensors_of(batch):
        if storage_of(tensor) not in known:
            found.setdefault(path or "batch", []).append(tensor)
    return found


def node_name(node: Any) -> str:
    """Autograd's name of a node, without its namespace."""
    return str(node.name()).split("::")[-1]


def _op_name(func: Any) -> str:
    return str(func._schema.name).replace("::", ".")


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()) and not value.is_meta


def _is_bad(tensor: Tensor) -> bool:
    return tensor_range(tensor)[1] > 0


def _has_nan(tensor: Tensor) -> bool:
    return bool(numbers(tensor).isnan().any())


def _is_mask(inputs: Sequence[Tensor]) -> bool:
    """Whether a logarithm was taken of zeros and ones, which is how some write a mask."""
    return all(bool(((t == 0) | (t == 1)).all()) and bool(t.any()) for t in inputs)


def _outputs(output: Any) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor)]


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Tensors that an operation changes in place."""
    found = []
    for index, argument in enumerate(func._schema.arguments):
        # BatchNorm's operations do not say that they change the averages.
        if argument.name.startswith("running_") or (argument.alias_info is not None and argument.alias_info.is_write):
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += [t for t in tree_leaves(value) if _floating(t)]
    return found


def _divides_nothing(name: str, args: Sequence[Any]) -> bool:
    """Whether 0 is divided by a count of 0, such as the sum over nothing by how many there are."""
    if name != "div" or len(args) < 2 or not all(isinstance(given, Tensor) for given in args[:2]):
        return False
    total, count = (numbers(given.detach()).double() for given in args[:2])
    if not bool(((count >= 0) & (count == count.round())).all()):
        return False
    return bool(((total == 0) & (count == 0)).any())


def _has_infinity(tensor: Tensor) -> bool:
    return bool((numbers(tensor) == math.inf).any())


def _argument(tensor: Tensor) -> Argument:
    x = numbers(tensor.detach())
    low = high = least = None
    if x.numel():
        low, high = (float(v) for v in torch.aminmax(x))
        least = float(x.abs().amin())
    return Argument(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), low, high, least)


def storage_of(tensor: Tensor) -> int:
    """What identifies the memory of a tensor as long as it lives."""
    if tensor.layout == torch.sparse_coo:
        tensor = tensor._values()
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse, functorch's wrappers
        return id(tensor)
