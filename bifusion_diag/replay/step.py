"""The step that can run again: a user's function from a batch to its loss, and what it trains."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from bifusion_diag.errors import UserError
from bifusion_diag.probes.loss_terms import LossTerms
from bifusion_diag.probes.modules import plain_name
from bifusion_diag.probes.ranks import local_part

#: batch → the loss: () tensor; terms by name, which are summed; (total, terms); or an object with `total`, `terms` and
#: `weights` or with `loss`. Forward and loss only: the backward is done by the caller.
StepFunction = Callable[[Any], Any]
TOTAL = "loss"  # the term's name where the step gives the total alone


@dataclass(frozen=True)
class Training:
    """What a step needs to run.

    Attributes:
        model: without DistributedDataParallel around it.
        step: what computes the loss; it must reach the model's own weights.
        optimizers: that train it.
        scaler: of mixed precision.
    """

    model: nn.Module
    step: StepFunction
    optimizers: tuple[Optimizer, ...] = ()
    scaler: GradScaler | None = None

    def loss(self, batch: Any) -> LossTerms:
        """Forward and loss. The total is set.

        Raises:
            UserError: the step function returned no loss.
        """
        with torch.enable_grad():
            return losses_of(self.step(batch))

    def backward(self, loss: LossTerms) -> None:
        """Backward of the total, scaled and unscaled as mixed precision does. Adds to ``.grad``."""
        assert loss.total is not None
        scaler = self.scaler
        scale = scaler._scale if scaler is not None and scaler.is_enabled() else None
        if scale is None:
            loss.total.backward()
            return
        (loss.total * scale).backward()
        inverse = scale.double().reciprocal().to(torch.float32)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(inverse)

    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters by name, wrappers left out of it; a shared one once."""
        return {plain_name(path): parameter for path, parameter in self.model.named_parameters()}

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that are there, by the parameter's name."""
        return {name: p.grad for name, p in self.parameters().items() if p.grad is not None}


@dataclass(frozen=True)
class Fingerprint:
    """A step's losses and gradients, to the bit.

    Attributes:
        losses: digest by term; "(total)" is the total.
        gradients: digest by parameter. Before clipping, unscaled.
    """

    losses: Mapping[str, str]
    gradients: Mapping[str, str]

    def difference(self, other: Fingerprint) -> str:
        """The first that differs in another one, in words; "" where all is the same."""
        for name in self.losses:  # a loop and its step function may name their terms differently
            if self.losses[name] != other.losses.get(name, self.losses[name]):
                return f"loss {name}"
        if self.gradients and other.gradients:  # else one of them did not measure them
            for name in dict.fromkeys([*self.gradients, *other.gradients]):
                if self.gradients.get(name) != other.gradients.get(name):
                    there = name in self.gradients and name in other.gradients
                    return f"gradient of {name}" + ("" if there else ", which is there only once")
        return ""


def losses_of(result: Any) -> LossTerms:
    """What a step function returned, as terms, weights and total.

    Raises:
        UserError: it is no loss.
    """
    if isinstance(result, Tensor):
        return LossTerms.of({TOTAL: result}, None, None)._replace(total=_scalar(result))
    if isinstance(result, tuple) and len(result) == 2 and not hasattr(result, "_fields"):
        total, terms = result
        if isinstance(total, Tensor) and isinstance(terms, Mapping):
            return LossTerms.of(terms or {TOTAL: total}, None, total)
    terms, weights, total = (getattr(result, name, None) for name in ("terms", "weights", "total"))
    if isinstance(terms, Mapping) and isinstance(total, Tensor):
        return LossTerms.of(terms, weights if isinstance(weights, Mapping) else None, total)
    if isinstance(result, Mapping) and result and all(isinstance(value, Tensor) for value in result.values()):
        terms = {str(name): value for name, value in result.items() if value.numel() == 1}
        whole = next((name for name in ("loss", "total_loss", "total") if name in terms and len(terms) > 1), None)
        total = terms.pop(whole) if whole is not None else torch.stack([t.reshape(()) for t in terms.values()]).sum()
        return LossTerms.of(terms, None, total)
    if isinstance(getattr(result, "loss", None), Tensor):
        return losses_of(result.loss)
    raise UserError(
        f"the step function returned a {type(result).__name__}; it must return the loss: a tensor of one element, a "
        "dict of terms, a pair (total, terms), or an object with total, terms and weights"
    )


def fingerprint(loss: LossTerms | None, gradients: Mapping[str, Tensor]) -> Fingerprint:
    """Digests of a step's losses and gradients."""
    losses = {}
    if loss is not None:
        losses = {name: digest(value) for name, value in loss.terms.items()}
        if loss.total is not None:
            losses["(total)"] = digest(loss.total)
    return Fingerprint(losses, {name: digest(gradient) for name, gradient in gradients.items()})


def digest(tensor: Tensor) -> str:
    """A digest of a tensor's type, shape and bits. Equal for two NaNs only if their bits are equal."""
    x = local_part(tensor.detach()).contiguous().cpu()
    sha = hashlib.blake2b(f"{x.dtype}{tuple(x.shape)}".encode(), digest_size=16)
    if x.numel():
        sha.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _scalar(value: Tensor) -> Tensor:
    return value.reshape(()) if value.dim() else value
