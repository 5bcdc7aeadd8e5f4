"""Every hook on a model and its optimisers: turns what PyTorch does in a step into the events of the probes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from bifusion_diag.probes.base import ROOT, Call, Probe, Subject
from bifusion_diag.probes.outputs import distinct_tensors


class Hooks:
    """The hooks of a Monitor.

    A backward pass is noticed when its first gradient reaches the model's output or that of a watched module. Its end
    is a callback of the autograd engine, put behind those by which DistributedDataParallel and FSDP finish their
    reductions: gradients are complete then, and nobody has clipped them yet.

    Args:
        probes: all probes.
    """

    def __init__(self, probes: Sequence[Probe]) -> None:
        self.probes = tuple(probes)
        self.order: dict[str, int] = {}  # module name → rank by first execution
        self._handles: list[RemovableHandle] = []
        self._order_handles: list[RemovableHandle] = []
        self._readers: dict[type, tuple[Probe, ...]] = {}  # by the type of an output
        self._due: tuple[Probe, ...] = ()
        self._measuring = False
        self._paused = False
        self._step = 0  # counts step blocks: hooks of an older graph that is run again are nobody's
        self._backwards: set[int] = set()  # graph tasks under way; re-entrant checkpoints nest them
        self._unfinished = False  # a backward has begun whose end is not yet told

    def attach(self, subject: Subject) -> None:
        """Put hooks on every module and optimiser; all or none."""
        try:
            for name, module in subject.modules.items():
                watchers = tuple(probe for probe in self.probes if probe.watches(name, module))
                gradient_watchers = tuple(probe for probe in self.probes if probe.watches_gradient(name, module))
                hook = self._forward_hook(name, watchers, gradient_watchers)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
                self._order_handles.append(module.register_forward_pre_hook(self._order_hook(name)))
            for optimizer in subject.optimizers:
                self._handles.append(optimizer.register_step_pre_hook(self._before_update))
                self._handles.append(optimizer.register_step_post_hook(self._after_update))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles + self._order_handles:
            handle.remove()
        self._handles, self._order_handles = [], []

    def remove_order(self) -> None:
        """The modules' order is known: stop looking for it."""
        for handle in self._order_handles:
            handle.remove()
        self._order_handles = []

    @property
    def attached(self) -> bool:
        """Whether there are hooks."""
        return bool(self._handles)

    @property
    def looks_for_order(self) -> bool:
        """Whether the modules' order is still being found out."""
        return bool(self._order_handles)

    def begin(self, due: Sequence[Probe]) -> None:
        """A step begins in which these probes are due."""
        self._due = tuple(due)
        self._step += 1
        self._backwards.clear()
        self._unfinished = False
        self._measuring = True

    def end(self) -> None:
        """The step ends."""
        self._finish_backward()
        self._measuring = False

    def abandon(self) -> None:
        """The step ends by an exception."""
        self._measuring = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards and backwards inside are nobody's step."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _order_hook(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            if self._measuring:
                self.order.setdefault(name, len(self.order))

        return hook

    def _forward_hook(
        self, name: str, watchers: tuple[Probe, ...], gradient_watchers: tuple[Probe, ...]
    ) -> Callable[[nn.Module, Any, Any, Any], None]:
        is_root = name == ROOT

        def hook(module: nn.Module, inputs: Any, keywords: Any, output: Any) -> None:
            if not self._measuring or self._paused:
                return
            if (gradient_watchers or is_root) and torch.is_grad_enabled():
                self._watch_gradients(name, output, gradient_watchers)
            readers = self._readers_of(output)
            # A checkpointed block runs its forward again inside the backward: its outputs were read already.
            if not (watchers or readers) or torch._C._current_graph_task_id() != -1:
                return
            call = Call(name, module, inputs, keywords, output)
            with torch.no_grad():
                for probe in watchers:
                    if probe in self._due:
                        probe.seen(call)
                for probe in readers:
                    if probe in self._due and probe not in watchers:
                        probe.seen(call)

        return hook

    def tell(self, call: Call) -> None:
        """Show the probes an output that no module returned."""
        if self._measuring and not self._paused:
            with torch.no_grad():
                for probe in self._readers_of(call.output):
                    if probe in self._due:
                        probe.seen(call)

    def _watch_gradients(self, name: str, output: Any, probes: tuple[Probe, ...]) -> None:
        """Measure gradients of an output as they arrive: also of what a checkpointed block returns again, because with
        re-entrant checkpointing they arrive there only."""
        due, step = tuple(probe for probe in probes if probe in self._due), self._step

        def measure(gradient: Tensor) -> None:
            if step != self._step or not self._measuring or self._paused:
                return
            self._backward_runs()
            gradient = gradient.detach()
            with torch.no_grad():
                for probe in due:
                    probe.gradient(name, gradient)

        for tensor in distinct_tensors(output):
            if tensor.requires_grad and not tensor.is_leaf:  # a leaf would keep the hook beyond the step
                tensor.register_hook(measure)

    def _readers_of(self, output: Any) -> tuple[Probe, ...]:
        """Probes that read outputs like this one. All outputs of a type are alike, but for containers."""
        kind = type(output)
        if kind is Tensor:
            return ()
        if kind in (tuple, list) or isinstance(output, dict):
            return tuple(probe for probe in self.probes if probe.reads(output))
        if kind not in self._readers:
            self._readers[kind] = tuple(probe for probe in self.probes if probe.reads(output))
        return self._readers[kind]

    def _backward_runs(self) -> None:
        """A gradient was seen; of a new backward pass, tell its beginning and ask for its end."""
        task = torch._C._current_graph_task_id()
        if task in self._backwards:
            return
        self._backwards.add(task)
        step = self._step

        def ended() -> None:
            self._backwards.discard(task)
            if step == self._step and not self._backwards:
                self._finish_backward()

        engine = Variable._execution_engine
        engine.queue_callback(lambda: engine.queue_callback(ended))
        if not self._unfinished:
            self._unfinished = True
            for probe in self._due:
                probe.backward_began()

    def _finish_backward(self) -> None:
        if self._unfinished:
            self._unfinished = False
            with torch.no_grad():
                for probe in self._due:
                    probe.backward_ended()

    def _before_update(self, optimizer: Optimizer, *_: Any) -> None:
        if self._measuring:
            with torch.no_grad():
                for probe in self._due:
                    probe.before_update(optimizer)

    def _after_update(self, optimizer: Optimizer, *_: Any) -> None:
        if self._measuring:
            with torch.no_grad():
                for probe in self._due:
                    probe.after_update(optimizer)
