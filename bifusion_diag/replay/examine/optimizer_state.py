"""What is wrong with optimisers: impossible moments, rates that jumped, parameters that nobody holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bifusion_diag.probes.base import ROOT
from bifusion_diag.probes.norms import norm_of
from bifusion_diag.probes.ranks import local_part
from bifusion_diag.replay.step import Training

SLACK = 2.0  # over bounds that hold exactly in real numbers: rounding of low-precision states
FAR = 10.0  # times what the usual gradients allow: single steps may be far above the usual
SMALL = 1e-15  # below it a squared gradient is no normal float32 number


class BadMoment(NamedTuple):
    """An entry of an optimiser's state that the gradients cannot have left there."""

    parameter: str
    state: str  # "exp_avg", "momentum_buffer"
    why: str  # in words, with the number


class RateChange(NamedTuple):
    """A learning rate that is not what it was."""

    group: str
    before: float
    now: float

    @property
    def ratio(self) -> float:
        """Now by before."""
        return self.now / self.before


def bad_moments(training: Training, norms: Mapping[str, float]) -> list[BadMoment]:
    """Entries of the optimisers' states that no gradients can have left: NaN, a negative mean square, or a mean that is
    larger than its mean square or the gradients allow.

    With decay rates b1 and b2 and any gradients, |exp_avg| ≤ (1-b1) / sqrt((1-b2)(1-b1²/b2)) · sqrt(exp_avg_sq), by
    the Cauchy-Schwarz inequality; a momentum buffer is at most the largest gradient / (1 - momentum).

    Args:
        training: what runs.
        norms: usual gradient norm by module, as far as it is known.
    """
    names = {id(parameter): name for name, parameter in training.parameters().items()}
    found: list[BadMoment] = []
    for parameter, group, state in _states(training):
        name = names.get(id(parameter), "?")
        tensors = {key: local_part(x) for key, x in state.items() if isinstance(x, Tensor) and x.is_floating_point()}
        broken = [key for key, x in tensors.items() if not bool(x.isfinite().all())]
        if broken:
            found += [
                BadMoment(name, key, f"{int((~tensors[key].isfinite()).sum())} values not finite") for key in broken
            ]
            continue
        mean, square = tensors.get("exp_avg"), tensors.get("exp_avg_sq")
        if mean is not None and square is not None and mean.shape == square.shape:
            if bool((square < 0).any()):
                found.append(BadMoment(name, "exp_avg_sq", f"a mean square of {float(square.min()):.3g}"))
            elif (excess := _excess(mean, square, group.get("betas", (0.9, 0.999)))) > SLACK:
                found.append(BadMoment(name, "exp_avg", f"{excess:.3g} times what exp_avg_sq allows of any gradients"))
        momentum, usual = tensors.get("momentum_buffer"), norms.get(name.rpartition(".")[0] or ROOT)
        if momentum is not None and usual:
            most = SLACK * usual / (1 - min(float(group.get("momentum", 0.9)), 0.999))
            size = float(norm_of(momentum))
            if size > FAR * most:
                found.append(BadMoment(name, "momentum_buffer", f"norm {size:.3g}, gradients allow {most:.3g}"))
    return found


def rate_changes(now: Mapping[str, float], before: Mapping[str, float]) -> list[RateChange]:
    """Learning rates above three times what they were, the largest change first."""
    changes = [RateChange(group, before[group], rate) for group, rate in now.items() if group in before]
    return sorted((c for c in changes if 0 < 3 * c.before < c.now), key=lambda c: -c.ratio)


def held_by(training: Training) -> dict[str, float]:
    """Learning rate of every parameter that an optimiser holds, by name."""
    names = {id(parameter): name for name, parameter in training.parameters().items()}
    return {
        names[id(parameter)]: float(group["lr"])
        for optimizer in training.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if id(parameter) in names and "lr" in group
    }


def _states(training: Training) -> Iterator[tuple[Tensor, Mapping[str, Any], Mapping[str, Any]]]:
    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter)
                if state:
                    yield parameter, group, state


def _excess(mean: Tensor, square: Tensor, betas: Any) -> float:
    """The largest |mean| as a multiple of what the mean square allows."""
    first, second = float(betas[0]), float(betas[1])
    if not 0 < first * first < second < 1:
        return 0.0
    bound = (1 - first) / math.sqrt((1 - second) * (1 - first * first / second))
    size = mean.abs().float()
    ratio = size / (bound * square.float().sqrt()).clamp_min(SMALL)
    return float(torch.where(size > SMALL, ratio, 0).max()) if ratio.numel() else 0.0
