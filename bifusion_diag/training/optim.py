"""The optimiser, its learning rate and the clipping of the gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bifusion_diag.config.settings import OptimSettings


class Clipped(NamedTuple):
    """What clipping did."""

    norm: Tensor  # () total L2 norm of the gradient before clipping
    coefficient: Tensor  # () factor that every gradient was multiplied by, <= 1


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW over every parameter that learns in some stage: call it before the first stage freezes any."""
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.lr,
        weight_decay=settings.weight_decay,
    )


def learning_rate(settings: OptimSettings, step: int, total_steps: int) -> float:
    """The learning rate at a step: constant, or MMEngine's PolyLR ``lr · (1 − step / total)^power``."""
    if settings.schedule == "constant":
        return settings.lr
    return settings.lr * (1 - step / total_steps) ** settings.poly_power


def clip_gradient(parameters: Iterable[Tensor], max_norm: float | None) -> Clipped:
    """Clip the total L2 norm of the gradient as :func:`torch.nn.utils.clip_grad_norm_` does, and say what it did.

    Non-finite norms are let through as users' loops do: a NaN norm makes every gradient NaN, an infinite one makes
    every finite gradient zero. Nothing is copied to the host.

    Args:
        parameters: whose ``.grad`` is scaled in place; those without a gradient are skipped.
        max_norm: None measures the norm and clips nothing.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm is None:
        return Clipped(norm, torch.ones_like(norm))
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, coefficient)
    return Clipped(norm, coefficient)
