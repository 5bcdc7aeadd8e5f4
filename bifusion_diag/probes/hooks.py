"""Every hook on a model and its optimisers: turns what PyTorch does in a step into the events of the probes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from bifusion_diag.probes.audience import Audience
from bifusion_diag.probes.base import ROOT, Call, Probe, Subject
from bifusion_diag.probes.outputs import distinct_tensors, numbers


class Hooks:
    """The hooks of a Monitor.

    A backward pass is noticed when its first gradient reaches an output of the model, of one of its parts (its children
    and those of containers without a forward), or of a watched module. Its end is a callback of the autograd engine,
    put behind those by which DistributedDataParallel and FSDP finish their reductions: gradients are complete then, and
    nobody has clipped them yet. Where no pass was noticed by the time an optimiser steps, its end is told then.

    A pass with create_graph=True is part of a forward, as a gradient penalty is: what arrives in it is not told.

    Args:
        audience: the probes.
        before_update: called after the probes when an optimiser is about to step, the first time that it does so in a
            step; what it raises ends the step.
    """

    def __init__(self, audience: Audience, before_update: Callable[[Optimizer], None] | None = None) -> None:
        self.audience = audience
        self._guard = before_update
        self.order: dict[str, int] = {}  # module name → rank by first execution
        self.active = False  # a step is measured, by some probe, and not paused
        self.due: tuple[Probe, ...] = ()  # the same object while the same probes are due
        self._undo: list[Callable[[], None]] = []
        self._undo_order: list[Callable[[], None]] = []
        self._frozen: list[tuple[nn.Parameter, tuple[Probe, ...]]] = []  # can have no hook yet
        self._on_tensors: list[RemovableHandle] = []  # of this step
        self._readers: dict[type, tuple[Probe, ...]] = {}  # by the type of an output
        self._measuring = False
        self._paused = False
        self._step = 0  # counts step blocks: hooks of an older graph that is run again are nobody's
        self._backwards: set[int] = set()  # graph tasks under way; re-entrant checkpoints nest them
        self._unfinished = False  # a backward has begun whose end is not yet told
        self._noticed = False  # a backward of this step
        self._updating: list[int] = []  # ids of optimisers inside step(); a subclass that calls super().step() nests it

    def attach(self, subject: Subject) -> None:
        """Put hooks on modules and optimisers; all or none."""
        parts = _parts(subject.modules)
        some_read = any(type(probe).reads is not Probe.reads for probe in self.audience.probes)
        try:
            for name, module in subject.modules.items():
                watchers = tuple(p for p in self.audience.probes if p.watches(name, module))
                on_gradient = tuple(p for p in self.audience.probes if p.watches_gradient(name, module))
                needed = watchers or on_gradient or name in parts or (some_read and not _returns_a_tensor(module))
                after = _AfterForward(self, name, watchers, on_gradient, name in parts) if needed else None
                self._put(module, _BeforeForward(self, name), after)
            for parameter in subject.model.parameters():
                listeners = tuple(p for p in self.audience.probes if p.watches_local_gradient(parameter))
                if listeners:
                    self._frozen.append((parameter, listeners))
            for optimizer in subject.optimizers:
                self._undo.append(optimizer.register_step_pre_hook(self._before_update).remove)
                self._undo.append(optimizer.register_step_post_hook(self._after_update).remove)
        except BaseException:
            self.remove()
            raise

    def _put(self, module: nn.Module, before: _BeforeForward, after: _AfterForward | None) -> None:
        compiled = module._compiled_call_impl
        if compiled is None:
            self._undo_order.append(module.register_forward_pre_hook(before).remove)
            if after is not None:
                self._undo.append(module.register_forward_hook(after, with_kwargs=True).remove)
            return

        # Compiled in place: its own hooks would be compiled with it.
        def watched(*inputs: Any, **keywords: Any) -> Any:
            before(module, inputs)
            output = compiled(*inputs, **keywords)
            if after is not None:
                after(module, inputs, keywords, output)
            return output

        def undo() -> None:
            if module._compiled_call_impl is watched:
                module._compiled_call_impl = compiled

        module._compiled_call_impl = watched
        self._undo.append(undo)
        self._undo_order.append(lambda: None)

    def remove(self) -> None:
        """Take all hooks off."""
        self._drop_tensor_hooks()
        for undo in self._undo + self._undo_order:
            undo()
        self._undo, self._undo_order, self._frozen = [], [], []

    def remove_order(self) -> None:
        """The modules' order is known: stop looking for it."""
        for undo in self._undo_order:
            undo()
        self._undo_order = []

    @property
    def attached(self) -> bool:
        """Whether there are hooks."""
        return bool(self._undo)

    @property
    def looks_for_order(self) -> bool:
        """Whether the modules' order is still being found out."""
        return bool(self._undo_order)

    def begin(self, due: tuple[Probe, ...]) -> None:
        """A step begins in which these probes are due."""
        if due != self.due:
            self.due = due
        if self._frozen:
            self._watch_parameters()
        self._step += 1
        self._on_tensors.clear()
        self._backwards.clear()
        self._updating.clear()
        self._unfinished = self._noticed = False
        self._measuring = True
        self._set_active()

    def end(self) -> None:
        """The step ends."""
        self._finish_backward()
        self._measuring = False
        self._set_active()

    def abandon(self) -> None:
        """The step ends by an exception."""
        self._drop_tensor_hooks()
        self._measuring = False
        self._set_active()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards and backwards inside are nobody's step."""
        before, self._paused = self._paused, True
        self._set_active()
        try:
            yield
        finally:
            self._paused = before
            self._set_active()

    def tell(self, call: Call) -> None:
        """Show the probes an output that no module returned."""
        if self.active:
            self.audience.tell([p for p in self.readers_of(call.output) if p in self.due], "seen", call)

    def watch_gradients(self, name: str, output: Any, probes: tuple[Probe, ...]) -> None:
        """Measure gradients of an output as they arrive: also of what a checkpointed block returns again, because with
        re-entrant checkpointing they arrive there only."""
        step = self._step

        def measure(gradient: Tensor | None) -> None:
            if step != self._step or not self.active:
                return
            self.backward_runs()
            if gradient is not None and probes and not torch.is_grad_enabled():  # None: of an output that is not used
                self.audience.tell(probes, "gradient", name, numbers(gradient.detach()))

        for tensor in distinct_tensors(output):
            if tensor.requires_grad and not tensor.is_leaf:  # a leaf would keep the hook beyond the step
                self._on_tensors.append(tensor.register_hook(measure))

    def _watch_parameters(self) -> None:
        """Hear of local gradients. Such a hook runs before those by which processes reduce gradients."""
        frozen, self._frozen = self._frozen, []
        for parameter, listeners in frozen:

            def accumulated(parameter: Tensor, listeners: tuple[Probe, ...] = listeners) -> None:
                if self.active:
                    self.backward_runs()
                    self.audience.tell([p for p in listeners if p in self.due], "local_gradient", parameter)

            if parameter.requires_grad:
                self._undo.append(parameter.register_post_accumulate_grad_hook(accumulated).remove)
            else:
                self._frozen.append((parameter, listeners))

    def readers_of(self, output: Any) -> tuple[Probe, ...]:
        """Probes that read outputs like this one. All outputs of a type are alike, but for containers."""
        kind = type(output)
        if kind is Tensor:
            return ()
        if kind in (tuple, list) or isinstance(output, Mapping):
            return self.audience.readers(output)
        if kind not in self._readers:
            self._readers[kind] = self.audience.readers(output)
        return self._readers[kind]

    def backward_runs(self) -> None:
        """A backward pass was met; if it is a new one, tell its beginning and ask for its end."""
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
            self._unfinished = self._noticed = True
            self.audience.tell(self.due, "backward_began")

    def _finish_backward(self) -> None:
        if self._unfinished:
            self._unfinished = False
            if self._measuring:
                self.audience.tell(self.due, "backward_ended")

    def _set_active(self) -> None:
        self.active = self._measuring and not self._paused and bool(self.due)

    def _drop_tensor_hooks(self) -> None:
        for handle in self._on_tensors:
            handle.remove()
        self._on_tensors.clear()

    def _before_update(
        self, optimizer: Optimizer, inputs: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.active:
            self._updating.append(id(optimizer))
            if self._updating.count(id(optimizer)) == 1:
                self._unfinished = self._unfinished or not self._noticed
                self._noticed = True
                self._finish_backward()
                self.audience.tell(self.due, "before_update", optimizer)
                if self._guard is not None:
                    return self._guarded(optimizer, inputs, keywords)
        return None

    def _guarded(
        self, optimizer: Optimizer, inputs: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Call the guard, or have it called once a closure, in which forward and backward are yet to run, has run."""
        guard = self._guard
        assert guard is not None
        closure = keywords.get("closure", inputs[1] if len(inputs) > 1 else None)
        if not callable(closure):
            guard(optimizer)
            return None
        judged = False

        def watched() -> Any:
            nonlocal judged
            loss = closure()
            if not judged:  # some optimisers call it several times
                judged = True
                guard(optimizer)
            return loss

        if "closure" in keywords:
            return inputs, {**keywords, "closure": watched}
        return (inputs[0], watched, *inputs[2:]), keywords

    def _after_update(self, optimizer: Optimizer, *_: Any) -> None:
        if self.active and id(optimizer) in self._updating:
            self._updating.remove(id(optimizer))
            if id(optimizer) not in self._updating:
                self.audience.tell(self.due, "after_update", optimizer)


class _Hook:
    """A hook of a module. Of a copy or a pickle of the model it is a function that does nothing and needs nothing of
    ours: a model can be saved, and copied for an average of weights, while it is measured."""

    def __init__(self, hooks: Hooks, name: str) -> None:
        self.hooks = hooks
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


class _BeforeForward(_Hook):
    """Finds out in which order modules are executed."""

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if not torch.compiler.is_compiling() and self.hooks._measuring:
            self.hooks.order.setdefault(self.name, len(self.hooks.order))


class _AfterForward(_Hook):
    """Shows a module's call to the probes, and watches its output for gradients."""

    def __init__(
        self,
        hooks: Hooks,
        name: str,
        watchers: tuple[Probe, ...],
        on_gradient: tuple[Probe, ...],
        is_part: bool,
    ) -> None:
        super().__init__(hooks, name)
        self.watchers = watchers
        self.on_gradient = on_gradient
        self.notices = is_part or bool(on_gradient)
        self.due: tuple[Probe, ...] | None = None  # for which the next two hold
        self.due_watchers: tuple[Probe, ...] = ()
        self.due_on_gradient: tuple[Probe, ...] = ()

    def __call__(self, module: nn.Module, inputs: Any, keywords: Any, output: Any) -> None:
        # First: inside torch.compile this is all that is left of the hook, so that nothing breaks the graph.
        if torch.compiler.is_compiling():
            return
        hooks = self.hooks
        if not hooks.active or torch._C._functorch.peek_interpreter_stack() is not None:
            return  # under torch.func an output is a transform's, and must not leave it
        if self.due is not hooks.due:
            self.due = hooks.due
            self.due_watchers = tuple(probe for probe in self.watchers if probe in hooks.due)
            self.due_on_gradient = tuple(probe for probe in self.on_gradient if probe in hooks.due)
        in_backward = torch._C._current_graph_task_id() != -1
        if not in_backward:
            hooks._backwards.clear()  # one that has raised never tells its end
        if self.notices and torch.is_grad_enabled():
            if in_backward:  # a re-entrant checkpoint: the pass inside begins and ends before this one does
                hooks.backward_runs()
            hooks.watch_gradients(self.name, output, self.due_on_gradient)
        if in_backward:
            return  # a checkpointed block runs its forward again: its outputs were read already
        tell = self.due_watchers
        if type(output) is not Tensor:
            tell += tuple(p for p in hooks.readers_of(output) if p in hooks.due and p not in self.watchers)
        if tell:
            hooks.audience.tell(tell, "seen", Call(self.name, module, inputs, keywords, output))


def _parts(modules: Mapping[str, nn.Module]) -> set[str]:
    """The model, its children, and the children of a part that has no forward."""
    parts = {ROOT}
    for name in modules:  # parents come first
        above = name.rpartition(".")[0] or ROOT
        if above == ROOT or (above in parts and _has_no_forward(modules[above])):
            parts.add(name)
    return parts


def _has_no_forward(module: nn.Module) -> bool:
    return getattr(type(module), "forward", None) is nn.Module.forward  # a scripted module's class has none to show


def _returns_a_tensor(module: nn.Module) -> bool:
    """Whether a module is a layer of PyTorch's own, all of which return a tensor but those with a state."""
    ours = type(module).__module__.startswith("torch.nn.modules.") and not isinstance(module, nn.RNNBase)
    return ours and not any(True for _ in module.children())
