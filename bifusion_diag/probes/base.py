"""What a probe is. A new one states which outputs it reads, its keys, and the few lines that are its idea."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

Schedule = Callable[[int], bool]
ROOT = "(root)"  # stands for the model itself in names


def schedule(every: int | Schedule) -> Schedule:
    """When to measure: at the steps that are a multiple of a number, or those of which a function is true."""
    if callable(every):
        return every
    assert every >= 1, f"every={every}: give a number of steps from 1 on"
    return lambda step: step % every == 0


class Reading(NamedTuple):
    """Numbers of one step, on the model's device.

    A scalar reading has n names and values (n,). A histogram has one name, values (B,) that are its counts, and edges.
    """

    names: tuple[str, ...]
    values: Tensor
    missing: NDArray[np.bool_] | None = None  # (n,) known on the host: frozen, no gradient
    nan_is_missing: bool = False  # NaN stands for "nothing to measure", decided on the device
    edges: tuple[float, ...] | None = None


class Call(NamedTuple):
    """One call of a module, as its forward ended."""

    name: str
    module: nn.Module
    inputs: tuple[Any, ...]
    keywords: Mapping[str, Any]
    output: Any


@dataclass(frozen=True)
class Subject:
    """What is measured."""

    model: nn.Module  # without DistributedDataParallel around it
    modules: Mapping[str, nn.Module]  # those that have hooks, by name; ROOT is the model
    optimizers: tuple[Optimizer, ...]
    inverse_scale: Callable[[], Tensor | None]  # () what turns a scaled gradient into the true one; None: not scaled
    paused: Callable[[], AbstractContextManager[None]]  # inside, forwards and backwards are nobody's step
    probes: tuple[Probe, ...] = ()  # all that measure it, in the order in which they are told


class Probe:
    """Base of all probes. A step calls, in this order::

        begin()               the step begins, and the probe is due
        batch(batch)          if the step was given its batch
        seen(call)            each time that a watched module's forward ends, or an output is one that the probe reads
        backward_began()      the first gradient reaches an output of the model, of a part of it, or a watched module's
        gradient(name, g)     each time that a gradient reaches an output of a module with watches_gradient
        local_gradient(p)     the gradient of a parameter with watches_local_gradient is complete in this process, and
                              not yet reduced over processes
        backward_ended()      gradients are complete, reduced over processes, not yet clipped. With gradient
                              accumulation, after every backward of the step
        before_update()       an optimiser is about to step
        after_update()        it has stepped
        collect()             the step block ends

    No event is called under autocast, inference mode or a gradient. A probe that raises in one is switched off.

    Args:
        name: prefix of its series, where two probes of one kind watch different modules.
        every: steps from one measurement to the next, or a function step → bool. None: :attr:`period`.
    """

    KEYS: ClassVar[dict[str, str]] = {}  # key → meaning; <module> and <term> stand for any
    prefix: ClassVar[str]
    period: ClassVar[int] = 1  # steps from one measurement to the next, unless told otherwise
    shared: bool = False  # its numbers are put together with those of other processes, which wait for them

    turn: int = -1  # which of the steps at which the probe is due this one is; the same in a run that was resumed

    def __init__(self, *, name: str | None = None, every: int | Schedule | None = None) -> None:
        self.name = name or self.prefix
        self._every = self.period if every is None else every
        self.every = schedule(self._every)

    def count_turn(self, step: int) -> None:
        """A step begins at which the probe is due."""
        self.turn = self.turn + 1 if callable(self._every) else step // self._every

    def attach(self, subject: Subject) -> None:
        """Learn what is measured. Called once, when the Monitor opens."""

    def watches(self, name: str, module: nn.Module) -> bool:
        """Whether :meth:`seen` gets every call of this module."""
        return False

    def watches_gradient(self, name: str, module: nn.Module) -> bool:
        """Whether :meth:`gradient` gets the gradients of this module's outputs."""
        return False

    def reads(self, output: Any) -> bool:
        """Whether :meth:`seen` gets outputs like this one, of any module. May look at the output's type and keys."""
        return False

    def begin(self) -> None:
        """A step that is due begins: forget the last one."""

    def batch(self, batch: Any) -> None:
        """The batch of the step, as the loop gave it."""

    def seen(self, call: Call) -> None:
        """A module's forward ended. Must detach what it reads, and keep neither the output nor a part of it."""

    def backward_began(self) -> None:
        """A backward pass began."""

    def gradient(self, name: str, gradient: Tensor) -> None:
        """A gradient arrived at an output of a module. Must not be kept nor changed."""

    def watches_local_gradient(self, parameter: nn.Parameter) -> bool:
        """Whether :meth:`local_gradient` gets this parameter."""
        return False

    def local_gradient(self, parameter: nn.Parameter) -> None:
        """A parameter's ``grad`` holds what this process alone has accumulated. Must not be kept nor changed."""

    def backward_ended(self) -> None:
        """A backward pass ended."""

    def before_update(self, optimizer: Optimizer) -> None:
        """An optimiser is about to step."""

    def after_update(self, optimizer: Optimizer) -> None:
        """An optimiser has stepped."""

    def collect(self) -> Iterable[Reading]:
        """The step's readings. Must not synchronise with the device."""
        raise NotImplementedError

    def loop_numbers(self) -> Mapping[str, float | Tensor]:
        """After collect: numbers of the training loop that this probe knows. They are recorded where the loop logs none
        of that name."""
        return {}

    def describe(self) -> str | None:
        """What the probe has chosen to measure by itself; recorded as an event whenever it changes."""
        return None


class Recorder(Protocol):
    """What judges a step before its update: :class:`~bifusion_diag.replay.FlightRecorder`. A step calls begin with its
    batch, before_update, and end or failed. Whatever it runs again is run while the Monitor is paused."""

    @property
    def sentinel(self) -> Probe:
        """Measures what the step is judged by."""

    @property
    def policy(self) -> str:
        """What it does about a bad step."""

    def open(
        self,
        model: nn.Module,
        optimizers: tuple[Optimizer, ...],
        scaler: GradScaler | None,
        paused: Callable[[], AbstractContextManager[None]],
        folder: Path | None,
        event: Callable[[int, str, str, dict[str, Any]], None],
    ) -> None:
        """The Monitor opens."""

    def begin(self, number: int, batch: Any) -> None:
        """A step begins."""

    def before_update(self, optimizer: Optimizer) -> None:
        """An optimiser is about to step."""

    def end(self) -> None:
        """The step block ends."""

    def failed(self, error: BaseException) -> None:
        """The step block has raised."""


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module's name matches one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
