"""Modules and the parameters that they own; numbers of parameters and calls put together by module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bifusion_diag.probes.base import ROOT, Subject, matches
from bifusion_diag.probes.modules import plain_name


class Owners(NamedTuple):
    """Modules that own parameters. Own are those that a module holds itself, not through children; one that two modules
    share is there twice. Integers, as quantised layers pack their weights in, are left out."""

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    slots: tuple[int, ...]  # of each parameter: which of the names owns it


def owners_of(model: nn.Module, patterns: Iterable[str] = ("*",)) -> Owners:
    """The owners among the modules whose names match."""
    names: list[str] = []
    parameters: list[nn.Parameter] = []
    slots: list[int] = []
    for path, module in model.named_modules():
        name = plain_name(path)
        own = [p for p in module._parameters.values() if p is not None and _holds_numbers(p.dtype)]
        if own and matches(name, patterns):
            parameters += own
            slots += [len(names)] * len(own)
            names.append(name)
    return Owners(tuple(names), tuple(parameters), tuple(slots))


def watched_outputs(subject: Subject, patterns: Iterable[str] = ("*",), leaves: bool = False) -> tuple[str, ...]:
    """Modules whose outputs are measured: owners of a matrix (a parameter of two dimensions or more), the model's parts
    (names of at most two components), and with `leaves` every module without children or with parameters."""
    return tuple(
        name
        for name, module in subject.modules.items()
        if matches(name, patterns)
        and (
            _owns(module, dimensions=0 if leaves else 2)
            or (name != ROOT and name.count(".") <= 1)
            or (leaves and not module._modules)
        )
    )


def _owns(module: nn.Module, dimensions: int) -> bool:
    own = (p for p in module._parameters.values() if p is not None)
    return any(is_lazy(p) or p.dim() >= dimensions for p in own)


def _holds_numbers(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


class Slots:
    """Puts numbers together that belong to one slot. Places are the same at most steps, so that they are seldom copied
    to the device."""

    def __init__(self) -> None:
        self._constants: dict[tuple[Sequence[float], torch.dtype, torch.device], Tensor] = {}

    def constant(self, values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
        """Numbers of the host on the device."""
        key = (tuple(values), dtype, device)
        if key not in self._constants:
            if len(self._constants) > 64:
                self._constants.clear()
            self._constants[key] = torch.tensor(values, dtype=dtype, device=device)
        return self._constants[key]

    def sum(self, values: Tensor, slots: Sequence[int], size: int) -> Tensor:
        """Sums by slot: values (n,) → (size,) float64."""
        total = torch.zeros(size, dtype=torch.float64, device=values.device)
        return total.index_add_(0, self.constant(slots, values.device), values.double())

    def root_sum_squares(self, norms: Tensor, slots: Sequence[int], size: int) -> Tensor:
        """Norms of everything in a slot from those of its tensors: norms (n,) → (size,) float64."""
        return self.sum(norms.double().square(), slots, size).sqrt()

    def extreme(self, values: Tensor, slots: Sequence[int], size: int, kind: str) -> Tensor:
        """Smallest ("amin") or largest ("amax") by slot, NaN where one of them is: values (n,) → (size,) float64."""
        start = torch.full((size,), torch.nan, dtype=torch.float64, device=values.device)
        where = self.constant(slots, values.device)
        return start.scatter_reduce_(0, where, values.double(), kind, include_self=False)
