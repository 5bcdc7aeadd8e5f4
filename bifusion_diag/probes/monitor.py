"""The Monitor: owns all hooks, and gathers what the probes measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bifusion_diag.errors import UserError
from bifusion_diag.probes.base import ROOT, Probe, Reading
from bifusion_diag.probes.catalogue import make_probes
from bifusion_diag.probes.rows import RowBlock, pack
from bifusion_diag.record import ModuleInfo, RunWriter


class Monitor:
    """Measures a model while it trains. It changes no value, no gradient and no random number.

    The order of events, to which a test holds this class::

        with Monitor(model, probes, writer) as monitor:    # attach: every module gets a hook
            for step in range(steps):
                with monitor.step(step):                   # begin: probes that are due forget the last step
                    loss = model(batch)                    # seen: at the end of each module's forward
                    loss.backward()                        #       gradients of outputs are measured as they arrive
                                                           # collect: parameter gradients, still unclipped
                norm = clip_grad_norm_(...)
                monitor.log("train/grad_norm", norm)       # log: joins the row of the step
                optimizer.step()
                monitor.end_step()                         # close: the row is complete. Also done by the next step()
                                                           # write: a full block goes to the writer
                                                           # and by leaving; what remains is written, hooks removed

    An exception inside the step block leaves that step without a row; all earlier rows are written. Forwards outside a
    step block, such as evaluation, are not measured. What activation checkpointing runs again is not counted again.

    Args:
        model: any module.
        probes: names of the catalogue, "all", or probes.
        writer: where rows go. None: nothing is kept but the latest row.
        block: rows a block. One copy from the device to the host is made for each block.

    Raises:
        UserError: unknown probe, or two probes of one name.
    """

    def __init__(
        self, model: nn.Module, probes: Sequence[str | Probe], writer: RunWriter | None = None, *, block: int = 32
    ) -> None:
        self.model = model
        self.probes = make_probes(probes)
        self._writer = writer
        self._rows = RowBlock(writer, block)
        self._handles: list[RemovableHandle] = []
        self._order_handles: list[RemovableHandle] = []
        self._order: dict[str, int] = {}  # module name → rank by execution
        self._trainable: dict[str, int] = {}  # module name → its own trainable parameters when the Monitor opened
        self._readers: dict[type, tuple[Probe, ...]] = {}  # by the type of an output
        self._due: list[Probe] = []
        self._measuring = False
        self._open_step: int | None = None
        self._readings: list[Reading] = []
        self._logs: dict[str, float | Tensor] = {}

    def __enter__(self) -> Monitor:
        assert not self._handles, "this Monitor is already open"
        try:
            for probe in self.probes:
                probe.attach(self.model)
            for path, module in self.model.named_modules():
                name = path or ROOT
                self._trainable[name] = sum(p.numel() for p in module._parameters.values() if _learns(p))
                watchers = tuple(probe for probe in self.probes if probe.watches(name, module))
                self._handles.append(module.register_forward_hook(self._forward_hook(name, watchers)))
                self._order_handles.append(module.register_forward_pre_hook(self._order_hook(name)))
        except BaseException:
            self._remove_hooks()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.end_step()
            self._rows.flush()
        finally:
            self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._handles + self._order_handles:
            handle.remove()
        self._handles, self._order_handles = [], []

    def _order_hook(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            if self._measuring:
                self._order.setdefault(name, len(self._order))

        return hook

    def _forward_hook(self, name: str, watchers: tuple[Probe, ...]) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not self._measuring:
                return
            readers = self._readers_of(output)
            if not watchers and not readers:
                return
            # A checkpointed block runs its forward again inside the backward: its outputs were read already.
            again = torch._C._current_graph_task_id() != -1
            for probe in watchers + tuple(probe for probe in readers if probe not in watchers):
                if probe in self._due and (probe.sees_repeats or not again):
                    probe.seen(name, output)

        return hook

    def _readers_of(self, output: Any) -> tuple[Probe, ...]:
        """Probes that read outputs like this one. All outputs of a type are alike, but for dicts."""
        kind = type(output)
        if kind is Tensor:
            return ()
        if isinstance(output, dict):
            return tuple(probe for probe in self.probes if probe.reads(output))
        if kind not in self._readers:
            self._readers[kind] = tuple(probe for probe in self.probes if probe.reads(output))
        return self._readers[kind]

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Measure the forward and backward inside. Ends before gradients are clipped and the optimiser steps."""
        assert self._handles, "open the Monitor first: with Monitor(...) as monitor"
        assert not self._measuring, "a step block inside a step block"
        self.end_step()
        self._due = [probe for probe in self.probes if probe.every(step)]
        for probe in self._due:
            probe.begin()
        self._measuring = True
        try:
            yield
        finally:
            self._measuring = False
        with torch.no_grad():
            self._readings = [reading for probe in self._due for reading in probe.collect()]
        self._open_step = step
        self._end_first_step()

    def _end_first_step(self) -> None:
        """The modules' order is known: stop looking for it."""
        if self._order_handles and self._order:
            for handle in self._order_handles:
                handle.remove()
            self._order_handles = []
            if self._writer is not None:
                self._writer.set_modules(self.module_table())

    def log(self, name: str, value: float | Tensor) -> None:
        """Add a number of the training loop to the row of the step that has just been measured.

        Args:
            name: series name, such as "train/lr".
            value: a number, or a tensor of one element, which is not copied from the device here.

        Raises:
            UserError: there is no such step: before the first, inside a step block, or after end_step().
        """
        if self._open_step is None:
            raise UserError(f"log({name!r}): no step is open. Call it after a step block, before end_step().")
        self._logs[name] = value

    def end_step(self) -> None:
        """Close the row of the step that was measured. Does nothing where none is open."""
        if self._open_step is not None:
            row = pack(self._open_step, self._readings, self._logs)
            self._open_step, self._readings, self._logs = None, [], {}
            self._rows.add(row)

    def flush(self) -> None:
        """Hand all complete rows to the writer now, as before a checkpoint or before reading the record."""
        self._rows.flush()

    def latest(self) -> dict[str, float | None]:
        """The scalars of the last complete row, None where missing. Waits for the device: for a live display."""
        return self._rows.latest()

    def module_table(self) -> list[ModuleInfo]:
        """The model's modules: first those executed, in order of their first forward, then the others.

        Trainable is what required a gradient when the Monitor opened, before training stages froze any of it.
        A module's part is the longest key of the record's `parameters` that its name begins with, else the first
        component of its name.
        """
        parts = sorted(self._writer.header.parameters, key=len, reverse=True) if self._writer is not None else []
        table: list[ModuleInfo] = []
        modules = [(path or ROOT, module) for path, module in self.model.named_modules()]
        last = len(modules)
        modules.sort(key=lambda item: self._order.get(item[0], last))  # stable: the others keep their order
        for rank, (name, module) in enumerate(modules):
            own = [p for p in module._parameters.values() if p is not None]
            part = next((p for p in parts if name == p or name.startswith(p + ".")), name.split(".")[0])
            total, trainable = sum(p.numel() for p in own), self._trainable.get(name, 0)
            table.append(ModuleInfo(name, type(module).__name__, rank, part, total, trainable))
        return table


def _learns(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad
