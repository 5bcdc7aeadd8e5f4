"""The smallest norm that is divided by: the gain of a normalisation's backward is one over it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from bifusion_diag.probes.base import Call, Reading, Schedule, matches
from bifusion_diag.probes.fields import Key
from bifusion_diag.probes.outputs import tensors_of
from bifusion_diag.probes.per_module import ModuleProbe

STATISTICS = ("NativeLayerNorm", "NativeGroupNorm", "NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")
_HOOKS_ON_SAVED = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # no promise of PyTorch's
L2_NAMES = ("L2Normalize", "L2Norm", "Normalize")  # classes that divide by a norm along their attribute `dim`


class NormalizeProbe(ModuleProbe):
    """The smallest statistic by which a normalisation divides; ε is no part of it.

    ===============================  ===================================================================================
    LayerNorm                        standard deviation of a row, over its normalised dimensions
    GroupNorm                        of a group of channels of a sample
    BatchNorm, in training           of a channel over the batch of this process; InstanceNorm: of a sample's channel
    classes named \\*RMSNorm          root mean square of a row
    classes named L2Normalize,       L2 norm of a row of the input along the module's `dim`
    L2Norm, Normalize with a `dim`
    ===============================  ===================================================================================

    Modules through which no gradient can flow (a frozen tower) are left out: nothing is multiplied there. Where
    autograd has saved the statistic it is read there, at no cost. What it saves of all but an L2 norm is 1/√(σ² + ε):
    a σ below √ε / 1000 (√ε / 10 where that is kept in half precision) is lost in its rounding. Where nothing is saved,
    as inside a checkpointed block, the input is read once.

    Args:
        modules: name patterns of the modules above that are watched.
        inputs: name patterns of any other modules whose first input is L2-normalised.
        outputs: name patterns of modules whose output is L2-normalised, as in ``F.normalize(head(x), dim=-1)``.
        dim: along which `inputs` and `outputs` are normalised.
        name, every: as for every Probe.
    """

    prefix = "normalize"
    TABLE: ClassVar[dict[str, Key]] = {
        "smallest": Key("min", "smallest standard deviation, rms or L2 norm that is divided by in this step, without ε")
    }

    def __init__(
        self,
        *,
        modules: Sequence[str] = ("*",),
        inputs: Sequence[str] = (),
        outputs: Sequence[str] = (),
        dim: int = -1,
        name: str | None = None,
        every: int | Schedule | None = None,
    ) -> None:
        super().__init__(name=name, every=every)
        self.modules, self.inputs, self.outputs = tuple(modules), tuple(inputs), tuple(outputs)
        self.dim = dim

    def watches(self, name: str, module: nn.Module) -> bool:
        plain = isinstance(module, (nn.LayerNorm, nn.GroupNorm, _NormBase))
        known = plain or _is_rms(module) or _l2_dim(module) is not None
        return (known and matches(name, self.modules)) or matches(name, (*self.inputs, *self.outputs))

    def begin(self) -> None:
        super().begin()
        self._reciprocals: dict[tuple[float, torch.device], list[tuple[str, Tensor]]] = {}  # by ε: largest 1/√(σ² + ε)

    def seen(self, call: Call) -> None:
        if self.outputs and matches(call.name, self.outputs):
            for tensor in tensors_of(call.output):
                self._smallest(call, _norms(tensor, self.dim))
        elif self.inputs and matches(call.name, self.inputs):
            self._smallest(call, _norms(_first_input(call), self.dim))
        elif isinstance(call.output, Tensor) and _gradient_flows(call):
            self._of_module(call)

    def collect(self) -> Iterator[Reading]:
        for (eps, _), calls in self._reciprocals.items():
            squares = torch.stack([reciprocal for _, reciprocal in calls]).double().square().reciprocal()
            smallest = (squares - eps).clamp_min(0).sqrt().float()
            modules = [module for module, _ in calls]
            if len(set(modules)) == len(modules) and not any((m, tuple(self.TABLE)) in self._calls for m in modules):
                yield Reading(tuple(f"{self.name}/{module}/smallest" for module in modules), smallest)
                continue  # the common case: every module was called once
            for module, value in zip(modules, smallest.view(-1, 1).unbind(), strict=True):
                self.record(module, value)
        yield from super().collect()

    def _of_module(self, call: Call) -> None:
        """Measure a module that this probe knows."""
        module, x = call.module, _first_input(call)
        if x is None or not x.numel() or (isinstance(module, _NormBase) and not _uses_batch(module)):
            return
        # Hooks on saved tensors, as non-re-entrant checkpointing has them, would compute everything again when asked.
        readable = _HOOKS_ON_SAVED is not None and _HOOKS_ON_SAVED(True) is None
        node = call.output.grad_fn if readable else None
        if (dim := _l2_dim(module)) is not None:
            norms = _saved_norms(node)
            self._smallest(call, _norms(x, dim) if norms is None else norms)
        elif (reciprocal := _saved_reciprocal(node)) is not None:
            same = self._reciprocals.setdefault((_eps(module, x), reciprocal.device), [])
            same.append((call.name, reciprocal.detach().amax()))
        else:
            self._smallest(call, _deviations(module, x))

    def _smallest(self, call: Call, values: Tensor | None) -> None:
        if values is not None and values.numel():
            self.record(call.name, values.detach().amin().float().view(1))


def _gradient_flows(call: Call) -> bool:
    """Whether the output has a gradient, or will have one: a re-entrant checkpoint makes the graph later."""
    if call.output.requires_grad or any(p.requires_grad for p in call.module._parameters.values() if p is not None):
        return True
    return any(x.requires_grad for x in tensors_of(call.inputs))


def _deviations(module: nn.Module, x: Tensor) -> Tensor | None:
    """What the module divides by, without ε, of its input. None where a subclass does not take these dimensions."""
    if _is_rms(module) or isinstance(module, nn.LayerNorm):
        shape = tuple(getattr(module, "normalized_shape", x.shape[-1:]))
        dims = tuple(range(-len(shape), 0))
        if tuple(x.shape[-len(shape) :]) != shape:
            return None
        if _is_rms(module):
            return torch.linalg.vector_norm(x, dim=dims, dtype=_wide(x)) / math.prod(shape) ** 0.5
    elif isinstance(module, nn.GroupNorm):
        x, dims = x.reshape(len(x), module.num_groups, -1), (2,)
    elif isinstance(module, _InstanceNorm):
        dims = tuple(range(1 - module._get_no_batch_dim(), 0))
    else:
        dims = (0, *range(2, x.dim()))
        if x.numel() == x.shape[1]:  # one value a channel has no deviation
            return None
    return x.to(_wide(x)).var(dims, correction=0).sqrt()


def _saved_norms(node: Any) -> Tensor | None:
    """The norms in the graph that F.normalize leaves: x / expand(clamp_min(norm, ε))."""
    for name, place in (("DivBackward0", 1), ("ExpandBackward0", 0)):
        if node is None or node.name() != name:
            return None
        node = node.next_functions[place][0]
    return node._saved_self if node is not None and node.name() == "ClampMinBackward0" else None


def _saved_reciprocal(node: Any, depth: int = 3) -> Tensor | None:
    """1/√(σ² + ε) from the graph of a normalisation, below views and casts, or of x · rsqrt(mean x² + ε) · weight."""
    if node is None or depth == 0:
        return None
    kind = node.name().removesuffix("Backward0")
    if kind in STATISTICS:
        return node._saved_result2
    if kind == "FusedRmsNorm":
        return node._saved_result1
    if kind in ("View", "UnsafeView", "Permute", "Transpose", "ToCopy", "Mul"):
        below = [child for child, _ in node.next_functions if child is not None]
        for child in below:
            if kind == "Mul" and child.name() == "RsqrtBackward0":
                return child._saved_result
        for child in below:
            if (found := _saved_reciprocal(child, depth - 1)) is not None:
                return found
    return None


def _norms(x: Tensor | None, dim: int | tuple[int, ...]) -> Tensor | None:
    if x is None or not x.is_floating_point() or not x.dim():
        return None
    return torch.linalg.vector_norm(x, dim=dim, dtype=_wide(x))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _first_input(call: Call) -> Tensor | None:
    if call.inputs and type(call.inputs[0]) is Tensor:
        return call.inputs[0]
    return next(tensors_of((call.inputs, call.keywords)), None)


def _l2_dim(module: nn.Module) -> int | None:
    """The dimension that a module of these names normalises along; None if it is none of them."""
    dim = getattr(module, "dim", None)
    return dim if type(module).__name__ in L2_NAMES and isinstance(dim, int) else None


def _is_rms(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm")


def _uses_batch(module: _NormBase) -> bool:
    """Whether a BatchNorm or InstanceNorm divides by what enters rather than by its running statistics."""
    return module.training or module.running_var is None


def _eps(module: nn.Module, x: Tensor) -> float:
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    return torch.finfo(x.dtype).eps if eps is None else float(eps)
