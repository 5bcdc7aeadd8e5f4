"""Who is told what happens in a step: the probes, without those that have failed."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bifusion_diag.errors import UserError
from bifusion_diag.probes.base import Call, Probe, Reading


class Quiet:
    """Inside, nothing is differentiated, autocast, inferred, or seen by a torch function: a probe's numbers do not
    depend on how the loop calls the model. A context manager that costs less than torch.no_grad() alone."""

    __slots__ = ("_function", "_graph", "_rare")

    def __enter__(self) -> None:
        self._graph = torch.is_grad_enabled()
        self._rare: ExitStack | None = None
        if torch.is_inference_mode_enabled() or torch._C._is_any_autocast_enabled():
            self._rare = ExitStack()
            self._rare.enter_context(torch.inference_mode(False))
            self._rare.enter_context(torch._C._DisableAutocast())
        torch._C._set_grad_enabled(False)
        self._function = torch._C.DisableTorchFunction()
        self._function.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._function.__exit__(*error)
        if self._rare is not None:
            self._rare.close()
        torch._C._set_grad_enabled(self._graph)


class Audience:
    """The probes, told of events. One that raises is told nothing more: its numbers end, the training goes on. Only a
    UserError of the first step is passed on: what a probe was told to read is not there, and nothing is lost yet. So is
    the error of a probe whose numbers other processes wait for: they would wait forever.

    Args:
        probes: all of them.
        failed: called with a probe that has raised, and a line that says where.
    """

    def __init__(self, probes: Sequence[Probe], failed: Callable[[Probe, str], None]) -> None:
        self.probes = tuple(probes)
        self._off: set[int] = set()  # ids of probes that have raised
        self._failed = failed
        self._steps = 0
        self.loop_numbers: dict[str, float | Tensor] = {}  # of the step that was collected last

    def due(self, step: int) -> tuple[Probe, ...]:
        """A step begins: the probes that measure at it."""
        self._steps += 1
        due = self._which("every", step)
        for probe in due:
            probe.count_turn(step)
        return due

    def readers(self, output: Any) -> tuple[Probe, ...]:
        """The probes that read outputs like this one."""
        return self._which("reads", output)

    def tell(self, probes: Sequence[Probe], event: str, *arguments: Any) -> None:
        """Call a method of these probes."""
        with Quiet():
            for probe in probes:
                if self._off and id(probe) in self._off:
                    continue
                try:
                    getattr(probe, event)(*arguments)
                except Exception as error:
                    self._switch_off(probe, event, arguments, error)

    def collect(self, probes: Sequence[Probe]) -> list[Reading]:
        """The readings of these probes."""
        collected: list[Reading] = []
        self.loop_numbers = {}
        with Quiet():
            for probe in probes:
                if id(probe) in self._off:
                    continue
                try:
                    readings = list(probe.collect())
                    for reading in readings:
                        _check(reading)
                    collected += readings
                    self.loop_numbers |= probe.loop_numbers()
                except Exception as error:
                    self._switch_off(probe, "collect", (), error)
        return collected

    def _which(self, question: str, argument: Any) -> tuple[Probe, ...]:
        found: list[Probe] = []
        for probe in self.probes:
            try:
                if id(probe) not in self._off and getattr(probe, question)(argument):
                    found.append(probe)
            except Exception as error:
                self._switch_off(probe, question, (), error)
        return tuple(found)

    def _switch_off(self, probe: Probe, event: str, arguments: tuple[Any, ...], error: Exception) -> None:
        if probe.shared or (isinstance(error, UserError) and self._steps == 1):
            raise error
        self._off.add(id(probe))
        of = arguments[0] if arguments else None
        module = of.name if isinstance(of, Call) else of if isinstance(of, str) else None
        place = event if module is None else f"{event} of {module}"
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        self._failed(probe, f"probe {probe.name!r} is off: {place}: {type(error).__name__}: {error} ({where})")


def _check(reading: Reading) -> None:
    names, shape = reading.names, tuple(reading.values.shape)
    fits = len(names) == 1 and len(shape) == 1 if reading.edges is not None else shape == (len(names),)
    if not fits:
        raise ValueError(f"values of shape {shape} for {len(names)} names, the first {names[:1]}")
