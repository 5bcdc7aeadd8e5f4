"""What is noted when a step begins, so that the very same step can run again.

Noted are the random generators (Python's, numpy's, PyTorch's), the buffers, plain attributes of the user's own modules
(counters, schedules), which modules are in training mode, and a copy of the batch, because a criterion may edit it in
place. Weights and optimiser state are not copied: nothing changes them before the optimiser's step.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, str, type(None))
_SMALL = 1 << 16  # elements
OF_ANY_MODULE = frozenset(vars(nn.Module()))  # the mode, and whether hooks see whole gradients, which hooks change


class State:
    """Everything but weights, optimisers and batch that decides how a step goes, at one moment."""

    def __init__(self, model: nn.Module, recycled: State | None = None) -> None:
        """``recycled``: one that is needed no more, whose memory is used again."""
        self.python = random.getstate()
        self.numpy = np.random.get_state()
        self.torch = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self.training = {name: module.training for name, module in model.named_modules()}
        self.attributes = _plain_attributes(model)
        live = dict(model.named_buffers())
        reuse = recycled.buffers if recycled is not None else {}
        self.buffers: dict[str, Tensor] = {}
        sources: list[Tensor] = []
        targets: list[Tensor] = []
        for name, buffer in live.items():
            old = reuse.get(name)
            if old is not None and old.shape == buffer.shape and old.dtype == buffer.dtype and _plain(buffer):
                self.buffers[name] = old
                sources.append(buffer.detach())
                targets.append(old)
            else:
                self.buffers[name] = buffer.detach().clone()
        if targets:
            torch._foreach_copy_(targets, sources)

    def restore(self, model: nn.Module) -> None:
        """Put it back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        for device, state in enumerate(self.cuda):
            torch.cuda.set_rng_state(state, device)
        for name, module in model.named_modules():
            module.training = self.training.get(name, module.training)
            for attribute, value in self.attributes.get(name, {}).items():
                module.__dict__[attribute] = value
        self.restore_buffers(model)

    def restore_buffers(self, model: nn.Module) -> None:
        """Put the buffers alone back, as they are when an update is skipped."""
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                noted = self.buffers.get(name)
                if noted is None:
                    continue
                if (noted.shape, noted.dtype) == (buffer.shape, buffer.dtype):
                    buffer.copy_(noted)
                else:  # one that grows, such as a memory of features
                    owner, _, own = name.rpartition(".")
                    model.get_submodule(owner)._buffers[own] = noted.clone()


class StepNotes:
    """The notes of one step.

    Args:
        model: what is trained.
        number: of the step.
        batch: as the loop is about to use it. None: the step cannot run again.
        recycled: notes that are needed no more, whose memory is used again.
    """

    def __init__(self, model: nn.Module, number: int, batch: Any, recycled: StepNotes | None = None) -> None:
        self.model = model
        self.number = number
        self.start: State = State(model, None if recycled is None else recycled.start)
        self._batch = copy_batch(batch)

    @property
    def has_batch(self) -> bool:
        """Whether the step can run again."""
        return self._batch is not None

    def batch(self) -> Any:
        """A fresh copy of the batch as it was when the step began."""
        return copy_batch(self._batch)

    @contextmanager
    def again(self) -> Iterator[Any]:
        """Inside, everything is as it was when the step began, and no parameter has a gradient; yields a fresh copy of
        the batch. Afterwards everything is as it was before, gradients included."""
        now = State(self.model)
        gradients = [(parameter, parameter.grad) for parameter in self.model.parameters()]
        try:
            self.start.restore(self.model)
            for parameter, _ in gradients:
                parameter.grad = None
            yield self.batch()
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            now.restore(self.model)


def copy_batch(batch: Any) -> Any:
    """A copy that shares no tensor and no array with the original. What cannot be copied is handed through."""
    try:
        return copy.deepcopy(batch)
    except Exception:  # a tensor inside a graph, a generator, a lock
        return _copy(batch)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, Mapping):
        return {key: _copy(entry) for key, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_copy, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copy, value))
    try:
        return copy.deepcopy(value)
    except Exception:
        return value


def _plain(buffer: Tensor) -> bool:
    return type(buffer) is Tensor and buffer.layout == torch.strided


def _plain_attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Numbers, words, flags and small tensors that users' own modules hold; those of PyTorch's layers do not change.
    Of a tensor the reference is kept: a forward that averages over steps puts another one in its place."""
    return {
        name: {
            attribute: value
            for attribute, value in module.__dict__.items()
            if attribute not in OF_ANY_MODULE and (isinstance(value, _PLAIN) or _small(value))
        }
        for name, module in model.named_modules()
        if not type(module).__module__.startswith("torch.")
    }


def _small(value: Any) -> bool:
    """A tensor that costs nothing to keep: it holds no graph and little memory."""
    return type(value) is Tensor and not value.requires_grad and value.numel() <= _SMALL
