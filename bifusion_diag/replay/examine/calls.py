"""Which module's forward is running, and what goes in and comes out of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bifusion_diag.probes.modules import is_compiled, plain_name
from bifusion_diag.probes.outputs import numbers, raw_tensors
from bifusion_diag.replay.examine.frames import line_of, told
from bifusion_diag.replay.incident import ModuleTrace

LARGER = 4.0  # times: what a hook must have done to an output to be told

Range = tuple[float | None, int]  # largest absolute value that is finite, NaN and infinite values


class Calls:
    """Follows the calls of a model's modules while :meth:`watching`.

    What users' hooks do is the module's that they sit on: inputs are taken before users' hooks, outputs after them.

    Args:
        quiet: context in which measuring is nobody's operation.
        measured: whether to take the ranges of inputs and outputs.
        ended: called with the index of a call and its output.
    """

    def __init__(
        self,
        model: nn.Module,
        quiet: Callable[[], Any],
        *,
        measured: bool = True,
        ended: Callable[[int, Any], None] | None = None,
    ) -> None:
        self.names = named_modules(model)
        self.stack: list[int] = []  # calls that have begun and not ended
        self.calls: list[ModuleTrace] = []  # as they ended: inner ones before outer ones
        self.modules: list[nn.Module] = []  # of the calls
        self.hooks: dict[int, str] = {}  # call → the user's hook that made its output bad or several times larger
        self._inputs: list[Range] = []
        self._bare: dict[nn.Module, Range] = {}  # of the output before the user's hooks
        self._quiet, self._measured, self._ended = quiet, measured, ended

    @property
    def current(self) -> str | None:
        """The module whose forward is running; None: none is."""
        return self._running[-1] if self._running else None

    @contextmanager
    def watching(self) -> Iterator[Calls]:
        """Hooks are on inside."""
        handles: list[RemovableHandle] = []
        self._running: list[str] = []
        try:
            for name, module in self.names.items():
                users = list(module._forward_hooks.values())
                handles.append(module.register_forward_pre_hook(self._began(name), with_kwargs=True, prepend=True))
                if users and self._measured:
                    handles.append(module.register_forward_hook(self._before_hooks, prepend=True))
                handles.append(module.register_forward_hook(self._ends(name, users)))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _began(self, name: str) -> Callable[..., None]:
        def began(module: nn.Module, inputs: Any, keywords: Any) -> None:
            self._running.append(name)
            self._inputs.append(self._range((inputs, keywords)))

        return began

    def _before_hooks(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._bare[module] = self._range(output)

    def _ends(self, name: str, users: Sequence[Callable[..., Any]]) -> Callable[..., None]:
        def ends(module: nn.Module, inputs: Any, output: Any) -> None:
            while self._running and self._running.pop() != name:
                self._inputs.pop()  # of a call that raised, which the user's code has caught
            absmax, bad = self._inputs.pop() if self._inputs else (None, 0)
            out, out_bad = self._range(output)
            index = len(self.calls)
            self.calls.append(ModuleTrace(name, type(module).__name__, absmax, bad, out, out_bad))
            self.modules.append(module)
            before, before_bad = self._bare.pop(module, (None, 0))
            if users and (out_bad > before_bad or (out and before and out > LARGER * before)):
                self.hooks[index] = next((text for hook in users if (text := told(line_of(hook)))), "")
            if self._ended is not None:
                self._ended(index, output)

        return ends

    def _range(self, values: Any) -> Range:
        if not self._measured:
            return None, 0
        with self._quiet():
            return range_of(values)


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules that take hooks by name; of a wrapper and what it wraps, the inner one."""
    return {
        plain_name(path): module
        for path, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
    }


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """What torch.compile has compiled runs as it was written inside."""
    if any(is_compiled(module) for module in model.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


@torch.no_grad()
def range_of(values: Any) -> Range:
    """Of all floating-point tensors in a value: the largest absolute value that is finite, and how many are not."""
    absmax: float | None = None
    bad = 0
    for tensor in raw_tensors(values):
        if tensor.is_floating_point() or tensor.is_complex():
            largest, more = tensor_range(tensor)
            bad += more
            if largest is not None:
                absmax = largest if absmax is None else max(absmax, largest)
    return absmax, bad


@torch.no_grad()
def tensor_range(tensor: Tensor) -> Range:
    """:func:`range_of` one tensor. One pass over its memory where all is finite. What has no numbers of its own, such
    as a tensor on the meta device, or none that can be compared, has no range."""
    if tensor.is_meta or tensor._is_zerotensor():
        return None, 0
    try:
        x = numbers(tensor.detach())
        if x.numel() == 0:
            return None, 0
        low, high = map(float, torch.aminmax(x)) if x.is_cpu else torch.stack(torch.aminmax(x)).double().tolist()
    except RuntimeError:  # subclasses and types without that operation
        return None, 0
    if math.isfinite(low) and math.isfinite(high):
        return max(abs(low), abs(high)), 0
    finite = x.isfinite()
    good = x[finite]
    largest = float(good.abs().amax()) if good.numel() else None
    return largest, x.numel() - good.numel()
