"""A loop that is run bare and watched, and what must be the same then."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bifusion_diag.probes import Call, Monitor, Probe, Reading

Rows = list[dict[str, float | None]]


class Counting(Probe):
    """Counts its events."""

    prefix = "count"

    def __init__(self) -> None:
        super().__init__()
        self.events: Counter[str] = Counter()
        self.seen_of: Counter[str] = Counter()
        self.gradients_of: Counter[str] = Counter()

    def watches(self, name: str, module: nn.Module) -> bool:
        return True

    watches_gradient = watches

    def seen(self, call: Call) -> None:
        self.seen_of[call.name] += 1

    def gradient(self, name: str, gradient: Tensor) -> None:
        self.gradients_of[name] += 1

    def backward_began(self) -> None:
        self.events["began"] += 1

    def backward_ended(self) -> None:
        self.events["ended"] += 1

    def before_update(self, optimizer: Any) -> None:
        self.events["before"] += 1

    def after_update(self, optimizer: Any) -> None:
        self.events["after"] += 1

    def collect(self) -> Iterator[Reading]:
        yield Reading((f"{self.name}/x",), torch.ones(1))


class Watch:
    """Runs steps of a loop, bare or measured.

    Args:
        on: with a Monitor.
        probes: its probes.
    """

    def __init__(self, on: bool, probes: Sequence[str | Probe] = ("all",)) -> None:
        self.on, self.probes = on, probes
        self.rows: Rows = []
        self.watched: list[nn.Module] = []

    def __call__(
        self, model: nn.Module, optimizer: Any, body: Callable[[int], Any], steps: int = 2, **options: Any
    ) -> None:
        """Do some steps of a loop, whose body is given the number of the step."""
        self.watched.append(model)
        with Monitor(model, optimizer, probes=self.probes, **options) if self.on else nullcontext() as monitor:
            for step in range(steps):
                with monitor.step(torch.ones(2, 2)) if monitor else nullcontext():
                    body(step)
                if monitor:
                    monitor.end_step()
                    self.rows.append(monitor.latest())


def unchanged(case: Callable[[Watch], Any], probes: Sequence[str | Probe] = ("all",)) -> Rows:
    """Run a case bare and watched; all that it leaves is the same, bit by bit. Returns the rows of the watched run.

    A case returns what is compared: modules, optimisers, tensors.
    """
    states = []
    for on in (False, True):
        random.seed(1)
        np.random.seed(2)
        torch.manual_seed(3)
        watch = Watch(on, probes)
        left = case(watch)
        streams = [random.getstate(), np.random.get_state()[1], torch.get_rng_state()]
        states.append([[state_of(thing) for thing in left], streams])
        for model in watch.watched:
            assert not hooks_of(model)
    assert same(*states)
    assert watch.rows
    return watch.rows


def state_of(thing: Any) -> Any:
    """All that training changes."""
    if isinstance(thing, nn.Module):
        gradients = {name: p.grad for name, p in thing.named_parameters()}
        return {"weights": thing.state_dict(), "gradients": gradients, "buffers": dict(thing.named_buffers())}
    return thing.state_dict() if isinstance(thing, torch.optim.Optimizer) else thing


def same(a: Any, b: Any) -> bool:
    """Bitwise."""
    if isinstance(a, Tensor):
        if a.layout != torch.strided:
            a, b = a.coalesce(), b.coalesce()
            return same(a.indices(), b.indices()) and same(a.values(), b.values())
        return isinstance(b, Tensor) and a.dtype == b.dtype and _bytes(a) == _bytes(b)
    if isinstance(a, np.ndarray):
        return a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _bytes(x: Tensor) -> bytes:
    return x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def hooks_of(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> list[str]:
    """What hangs on a model and its optimisers."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found = [f"{name}.{kind}" for name, module in model.named_modules() for kind in kinds if getattr(module, kind)]
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            found.append(name)
    for optimizer in optimizers:
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            found.append(type(optimizer).__name__)
    return found
