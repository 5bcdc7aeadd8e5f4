"""One plain pass through a noted step, in plain numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bifusion_diag.probes.norms import norms_of
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Fingerprint, Training, fingerprint


@dataclass(frozen=True)
class Pass:
    """What a forward and backward of a noted step gave.

    Attributes:
        terms: raw loss terms.
        total: the loss that was differentiated.
        norms: L2 norm of the gradient by parameter; NaN or infinite where an element is.
        bad_buffers: names of buffers that are NaN or infinite after the forward and were not before it.
        bad_at_start: names of buffers that were when the step began.
        error: that it raised; what was measured before it stands.
        seconds: that it took.
        bits: losses and gradients, to the bit.
    """

    terms: Mapping[str, float] = field(default_factory=dict)
    total: float | None = None
    norms: Mapping[str, float] = field(default_factory=dict)
    bad_buffers: tuple[str, ...] = ()
    bad_at_start: tuple[str, ...] = ()
    error: Exception | None = None
    seconds: float = 0.0
    bits: Fingerprint | None = None

    @property
    def grad_norm(self) -> float:
        """L2 norm of all gradients, in float64."""
        return math.sqrt(sum(norm * norm for norm in self.norms.values()))

    @property
    def bad_parameters(self) -> tuple[str, ...]:
        """Parameters whose gradient is NaN or infinite."""
        return tuple(name for name, norm in self.norms.items() if not math.isfinite(norm))

    @property
    def bad_terms(self) -> tuple[str, ...]:
        """Loss terms that are NaN or infinite."""
        return tuple(name for name, value in self.terms.items() if not math.isfinite(value))

    @property
    def finite(self) -> bool:
        """Losses, gradients and buffers are all finite."""
        sound = self.total is None or math.isfinite(self.total)
        return sound and not (self.bad_terms or self.bad_parameters or self.bad_buffers)


def run_pass(training: Training, notes: StepNotes, *, bits: bool = False, hold_norms: bool = False) -> Pass:
    """Run a noted step again, forward and backward. Never raises what the step raises.

    Args:
        training: what runs, with the weights as they are now.
        notes: of the step.
        bits: take the digests too.
        hold_norms: BatchNorm normalises with its running statistics, as in evaluation.
    """
    began = time.perf_counter()
    with notes.again() as batch:
        for module in training.model.modules() if hold_norms else ():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                module.training = False
        loss = None
        try:
            loss = training.loss(batch)
            training.backward(loss)
            error = None
        except Exception as raised:
            error = raised
        gradients = training.gradients()
        norms = dict(zip(gradients, map(float, norms_of(list(gradients.values()))), strict=True))
        before = tuple(name for name, buffer in notes.start.buffers.items() if _bad(buffer))
        bad = tuple(n for n, b in training.model.named_buffers() if n not in before and _bad(b))
        return Pass(
            terms={} if loss is None else {name: float(term.detach()) for name, term in loss.terms.items()},
            total=None if loss is None or loss.total is None else float(loss.total.detach()),
            norms=norms,
            bad_buffers=bad,
            bad_at_start=before,
            error=error,
            seconds=time.perf_counter() - began,
            bits=fingerprint(loss, gradients) if bits and error is None else None,
        )


def _bad(buffer: Tensor) -> bool:
    return buffer.is_floating_point() and not bool(buffer.isfinite().all())
