"""Faults in weights, buffers, gradients and the optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Group = dict[str, Any]


def scale_weights(module: nn.Module, optimizer: Optimizer | None) -> None:
    """The module's largest weight × 100, outside any update."""
    weight = max(module.parameters(), key=lambda p: p.numel())
    with torch.no_grad():
        weight.mul_(100)


def desynchronise(module: nn.Module, optimizer: Optimizer | None) -> None:
    """Every weight of the module × 1.01: as if this process had missed an update."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.01)


def nan_weight(module: nn.Module, optimizer: Optimizer | None) -> None:
    """One element of a weight is NaN."""
    _set_first(next(module.parameters()), float("nan"))


def nan_buffer(module: nn.Module, optimizer: Optimizer | None) -> None:
    """One element of a buffer, such as BatchNorm's running mean, is NaN."""
    _set_first(next(b for b in module.buffers() if b.is_floating_point()), float("nan"))


def freeze(module: nn.Module, optimizer: Optimizer | None) -> None:
    """The module requires no gradient."""
    module.requires_grad_(False)


def leave_out(module: nn.Module, optimizer: Optimizer | None) -> None:
    """The optimiser does not hold the module's parameters."""
    if optimizer is not None:
        take_out(optimizer, list(module.parameters()))


def nan_moment(module: nn.Module, optimizer: Optimizer | None) -> None:
    """One element of a first moment of the module's parameters is NaN."""
    _set_first(_moments(module, optimizer, "exp_avg")[0], float("nan"))


def zero_second_moment(module: nn.Module, optimizer: Optimizer | None) -> None:
    """The second moments of the module's parameters are 0: an update divides by ε."""
    for moment in _moments(module, optimizer, "exp_avg_sq"):
        moment.zero_()


def take_out(optimizer: Optimizer, parameters: Sequence[Tensor]) -> Group:
    """Remove parameters from their groups; returns the options of the group that held the first of them."""
    gone = {id(parameter) for parameter in parameters}
    options: Group = {}
    for group in optimizer.param_groups:
        kept = [p for p in group["params"] if id(p) not in gone]
        if len(kept) < len(group["params"]):
            options = options or {key: value for key, value in group.items() if key != "params"}
            group["params"] = kept
    return options


def split_off(optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
    """Put parameters into a group of their own, with the options that they had."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = [parameter for parameter in parameters if id(parameter) in held]
    if own:
        options = take_out(optimizer, own)
        optimizer.param_groups.append({"params": own, **options})


def _moments(module: nn.Module, optimizer: Optimizer | None, name: str) -> list[Tensor]:
    states = [] if optimizer is None else [optimizer.state.get(p, {}) for p in module.parameters()]
    return [state[name] for state in states if name in state]


def one_gradient(parameters: Sequence[Tensor], value: float) -> None:
    """One element of the first gradient that is there gets a value."""
    for parameter in parameters:
        if parameter.grad is not None:
            _set_first(parameter.grad, value)
            return


def scale_gradients(parameters: Sequence[Tensor], factor: float) -> None:
    """Every gradient × a factor."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def _set_first(tensor: Tensor, value: float) -> None:
    with torch.no_grad():
        tensor[(0,) * tensor.dim()] = value
