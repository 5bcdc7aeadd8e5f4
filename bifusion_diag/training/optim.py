"""The optimiser, its learning rate and the clipping of the gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bifusion_diag.config.settings import OptimSettings

_OTHERS, _CLIP = "others", "encoder.clip."  # names of the groups; CLIP's is what its parameters' names begin with


class Clipped(NamedTuple):
    """What clipping did."""

    norm: Tensor  # () total L2 norm of the gradient before clipping
    coefficient: Tensor  # () factor that every gradient was multiplied by, <= 1


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW over every parameter that learns in some stage: call it before the first stage freezes any.

    What learns of CLIP is a group of its own, the last. AdamW leaves a parameter without a gradient as it is: what a
    stage freezes does not decay either.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"name": _OTHERS, "params": [p for name, p in named if not name.startswith(_CLIP)]},
        {"name": _CLIP, "params": [p for name, p in named if name.startswith(_CLIP)]},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, *, clip_scale: float) -> dict[str, float]:
    """Give every group its learning rate.

    Args:
        optimizer: of :func:`build_optimizer`.
        rate: of everything but CLIP.
        clip_scale: CLIP's rate as a share of it.

    Returns:
        For the record: ``train/lr``, and ``train/lr_clip`` while something of CLIP learns.
    """
    recorded = {"train/lr": rate}
    for group in optimizer.param_groups:
        of_clip = group["name"] == _CLIP
        group["lr"] = rate * clip_scale if of_clip else rate
        if of_clip and any(parameter.requires_grad for parameter in group["params"]):
            recorded["train/lr_clip"] = group["lr"]
    return recorded


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
