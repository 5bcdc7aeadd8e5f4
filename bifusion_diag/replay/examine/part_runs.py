"""Runs of a noted step with other samples: some of its batch, all but some, or those of a healthy batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bifusion_diag.probes.norms import norms_of
from bifusion_diag.replay.examine.batches import Split, cut, tensors_of
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Training

SETTLED = 10  # batches, from which on running statistics are used where no healthy batch is there


@dataclass(frozen=True)
class PartRun:
    """A forward, and perhaps a backward, of some samples.

    Attributes:
        total: the loss.
        terms: raw loss terms.
        gradient: L2 norm on all parameters; None: no backward was run.
        bad_buffers: buffers have become NaN or infinite.
        error: type and first line of the error that it raised; "" if none.
    """

    total: float = math.nan
    terms: Mapping[str, float] = field(default_factory=dict)
    gradient: float | None = None
    bad_buffers: bool = False
    error: str = ""

    @property
    def bad(self) -> bool:
        """Something is not finite."""
        return not self.error and bool(self.badness)

    @property
    def badness(self) -> str:
        """What is not finite, in words, or what was raised; "" where all is well."""
        if self.error:
            return f"the step raises {self.error}"
        for name, value in self.terms.items():
            if not math.isfinite(value):
                return f"loss term {name} is {value}"
        if not math.isfinite(self.total):
            return f"the loss is {self.total}"
        if self.gradient is not None and not math.isfinite(self.gradient):
            return "the gradient is not finite"
        return "a buffer is not finite" if self.bad_buffers else ""


@dataclass(frozen=True)
class InputFacts:
    """One floating-point tensor of one sample."""

    absmax: float  # of the finite values
    bad: int  # NaN and infinite ones
    rows: int = 1  # entries along the first dimension


class PartRuns:
    """Runs a step with other samples, always from the state in which it began and at the weights of now.

    Args:
        training: what runs.
        notes: of the bad step.
        contrast: of the last healthy step.
        split: as for :func:`~bifusion_diag.replay.examine.batches.cut`.
        backward: run the backward too.
        steady: in :meth:`alone`, BatchNorm does not take its statistics of the sample.

    Attributes:
        size: samples in the batch.
        healthy_size: in the healthy one; 0: there is none.
        steadies: BatchNorm is held in :meth:`alone`.
        count: runs so far.

    Raises:
        UserError: the batch cannot be cut.
    """

    def __init__(
        self,
        training: Training,
        notes: StepNotes,
        contrast: StepNotes | None,
        split: Split | None,
        *,
        backward: bool,
        steady: bool,
    ) -> None:
        self._training, self._notes, self._contrast, self._split = training, notes, contrast, split
        self._backward = backward
        self._statistics: dict[str, tuple[Tensor, Tensor]] = {}
        self._alone: dict[tuple[tuple[int, ...], bool], PartRun] = {}
        self.size = cut(notes.batch(), split).size
        self.healthy_size = 0 if contrast is None or not contrast.has_batch else cut(contrast.batch(), split).size
        self.steadies = steady and bool(_training_norms(training.model))
        self.count = 0

    def whole(self) -> PartRun:
        """The step itself."""
        return self._run(self._notes, None)

    def healthy(self) -> PartRun | None:
        """The step with the last healthy batch in place of its own; None where there is none."""
        if self._contrast is None or not self._contrast.has_batch:
            return None
        with self._collected():
            return self._run(self._contrast, None)

    def alone(self, samples: Sequence[int], *, of_healthy: bool = False) -> PartRun:
        """A sample, or a few, apart from the others. Run once: of two, leaving one out is the other one alone."""
        notes, key = self._contrast if of_healthy else self._notes, (tuple(samples), of_healthy)
        assert notes is not None
        if key not in self._alone:
            self._alone[key] = self._run(notes, samples, steady=self.steadies)
        return self._alone[key]

    def only(self, samples: Sequence[int]) -> PartRun:
        """The step with some of its samples; where their number does not suit it, with some of them twice."""
        found = self._run(self._notes, samples)
        if found.error and len(samples) < self.size:
            filled = [samples[i % len(samples)] for i in range(self.size)]
            again = self._run(self._notes, filled)
            return found if again.error else again
        return found

    def without(self, samples: Sequence[int]) -> PartRun:
        """The step without some of its samples."""
        return self.only([i for i in range(self.size) if i not in samples])

    def inputs(self, *, of_healthy: bool = False) -> list[dict[str, InputFacts]]:
        """Of each sample its floating-point inputs, by their path in the batch."""
        notes = self._contrast if of_healthy else self._notes
        if notes is None or not notes.has_batch:
            return []
        parts = cut(notes.batch(), self._split)
        return [
            {path: _facts(x) for path, x in tensors_of(parts.pick([i])) if x.is_floating_point() and x.numel()}
            for i in range(parts.size)
        ]

    def lengths(self) -> list[frozenset[int]]:
        """Of each sample how many rows it has in some tensor, or says that it has."""
        parts = cut(self._notes.batch(), self._split)
        return [frozenset(_lengths(parts.pick([i]))) for i in range(parts.size)]

    def _run(self, notes: StepNotes, samples: Sequence[int] | None, *, steady: bool = False) -> PartRun:
        self.count += 1
        training = self._training
        with self._notes.again() as batch:
            terms: dict[str, float] = {}
            total, gradient = math.nan, None
            try:
                batch = batch if notes is self._notes else notes.batch()
                batch = batch if samples is None else cut(batch, self._split).pick(samples)
                if steady:
                    self._hold_norms(training.model)
                loss = training.loss(batch)
                assert loss.total is not None
                terms = {name: float(term.detach()) for name, term in loss.terms.items()}
                total = float(loss.total.detach())
                if self._backward and loss.total.requires_grad:
                    training.backward(loss)
                    norms = norms_of(list(training.gradients().values()))
                    gradient = math.hypot(*map(float, norms)) if norms else 0.0
            except Exception as error:
                return PartRun(total, terms, error=f"{type(error).__name__}: {error}".splitlines()[0])
            return PartRun(total, terms, gradient, self._has_bad_buffers())

    def _has_bad_buffers(self) -> bool:
        before = self._notes.start.buffers
        return any(
            buffer.is_floating_point() and not buffer.isfinite().all() and bool(before[name].isfinite().all())
            for name, buffer in self._training.model.named_buffers()
            if name in before
        )

    @contextmanager
    def _collected(self) -> Iterator[None]:
        """Inside, a forward leaves the statistics that BatchNorm takes of its batch."""
        sums: dict[str, list[tuple[Tensor, Tensor]]] = {}

        def note(name: str, x: Any) -> None:
            if isinstance(x, Tensor) and x.dim() > 1 and x.numel() > x.shape[1]:
                columns = x.detach().float().transpose(0, 1).flatten(1)
                sums.setdefault(name, []).append((columns.mean(1), columns.var(1, correction=0)))

        handles = [
            norm.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0] if args else None))
            for name, norm in _training_norms(self._training.model)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for name, calls in sums.items():
            mean, var = (torch.stack(values).mean(0) for values in zip(*calls, strict=True))
            if mean.isfinite().all() and var.isfinite().all():
                self._statistics[name] = mean, var

    def _hold_norms(self, model: nn.Module) -> None:
        """Put BatchNorm into evaluation, with the healthy batch's statistics; notes.again() undoes it."""
        for name, norm in _training_norms(model):
            if name in self._statistics:
                for buffer, value in zip((norm.running_mean, norm.running_var), self._statistics[name], strict=True):
                    assert buffer is not None
                    buffer.copy_(value)
            elif norm.num_batches_tracked is None or int(norm.num_batches_tracked) < SETTLED:
                continue
            norm.training = False


def _training_norms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.training and module.running_mean is not None
    ]


def _facts(x: Tensor) -> InputFacts:
    size = x.detach().abs()
    fine = size.isfinite()
    bad = int((~fine).sum())
    kept = size[fine] if bad else size
    return InputFacts(float(kept.max()) if kept.numel() else 0.0, bad, len(x) if x.dim() else 1)


def _lengths(sample: Any) -> Iterator[int]:
    """Rows of a sample's tensors, and counts that it states of itself."""
    yield from (len(x) for _, x in tensors_of(sample) if x.dim())
    fields = sample if isinstance(sample, Mapping) else getattr(sample, "__dict__", {})
    for value in fields.values():
        if isinstance(value, (tuple, list)) and len(value) == 1 and isinstance(value[0], int):
            yield value[0]
