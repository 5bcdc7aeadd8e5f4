"""Faults in a module's output, in the gradient that arrives at it, and in a loss term."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]


def changed(output: Any, change: Change) -> tuple[Any, bool]:
    """The output with its first floating-point tensor changed, in tuples, mappings and dataclasses too; and whether
    there was one."""
    if isinstance(output, Tensor):
        usable = output.is_floating_point() and output.numel() > 0
        return (change(output), True) if usable else (output, False)
    if isinstance(output, Mapping):
        items = dict(output)
        for key, value in items.items():
            items[key], done = changed(value, change)
            if done:
                return items, True
    elif isinstance(output, (tuple, list)):
        values = list(output)
        for place, value in enumerate(values):
            values[place], done = changed(value, change)
            if done:
                named = hasattr(output, "_fields")
                return (type(output)(*values) if named else type(output)(values)), True
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            value, done = changed(getattr(output, field.name), change)
            if done:
                return dataclasses.replace(output, **{field.name: value}), True
    return output, False


def one_nan(x: Tensor) -> Tensor:
    """One element is NaN."""
    return _with_first(x, float("nan"))


def one_inf(x: Tensor) -> Tensor:
    """One element is infinite."""
    return _with_first(x, float("inf"))


def log_of_relu(x: Tensor) -> Tensor:
    """Adds log(relu(x)): −∞ wherever a feature is negative."""
    return x + 0.01 * torch.log(torch.relu(x))


def root_of_zero(x: Tensor) -> Tensor:
    """Adds the distance of x from itself: zero in the forward, 0 · ∞ in the backward."""
    return x + (x - x.detach()).square().sum(-1, keepdim=True).sqrt()


def naive_softplus(x: Tensor) -> Tensor:
    """Adds log(1 + exp(s · x)) / s, s so large that exp overflows at the largest feature."""
    sharpness = 200 / x.detach().abs().max()
    return x + torch.log1p(torch.exp(sharpness * x)) / sharpness


def masked_softmax(x: Tensor) -> Tensor:
    """Weights the first row's features by a softmax whose mask lets none through."""
    rows = x.reshape(-1, x.shape[-1])
    mask = torch.zeros_like(rows, dtype=torch.bool)
    mask[0] = True
    weights = torch.softmax(rows.masked_fill(mask, float("-inf")), dim=-1)
    return (rows * (1 + weights)).reshape(x.shape)


def with_gradient(change: Change) -> Change:
    """A change of the gradient that arrives at the output, which itself stays as it is."""

    def apply(x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(change)
        return x

    return apply


def empty_mean(term: Tensor) -> Tensor:
    """The mean over an empty selection: NaN, with a finite gradient."""
    return term.reshape(1)[:0].mean()


def _with_first(x: Tensor, value: float) -> Tensor:
    result = x.clone()
    result[(0,) * x.dim()] = value
    return result
