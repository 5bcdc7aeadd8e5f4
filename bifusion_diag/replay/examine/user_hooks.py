"""Hooks and patched forwards that somebody hung into a model: what they are, and the step without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.loss import _Loss

from bifusion_diag.probes.modules import plain_name
from bifusion_diag.replay.examine.frames import line_of, told
from bifusion_diag.replay.step import Training

#: Where hooks are kept, with the part of the step that they can change.
PLACES = {
    "_forward_hooks": "forward",
    "_forward_pre_hooks": "forward",
    "_backward_hooks": "backward",
    "_backward_pre_hooks": "backward",
}


class UserHook(NamedTuple):
    """Something that was hung into the model by neither PyTorch nor this package.

    Attributes:
        owner: the module or parameter that holds it, by name.
        parameter: whether it is a parameter.
        place: attribute of the owner that holds it.
        direction: "forward", "backward" or "after backward".
        source: "file.py:12: name".
        holder: the object.
        key: its key in the place; None for a patched forward.
        in_loss: whether the module computes losses.
    """

    owner: str
    parameter: bool
    place: str
    direction: str
    source: str
    holder: Any
    key: int | None
    in_loss: bool = False


def user_hooks(training: Training) -> list[UserHook]:
    """All of them, in the order of the modules."""
    found: list[UserHook] = []
    for path, module in training.model.named_modules():
        name = plain_name(path)
        patched = module.__dict__.get("forward")
        if patched is not None and not _known(patched):
            source = _source(patched)
            found.append(UserHook(name, False, "forward", "forward", source, module, None, _is_loss(module)))
        for place, direction in PLACES.items():
            found += _hooks(name, False, module, place, direction)
    for name, parameter in training.parameters().items():
        found += _hooks(name, True, parameter, "_backward_hooks", "after backward")
        found += _hooks(name, True, parameter, "_post_accumulate_grad_hooks", "after backward")
    return found


@contextmanager
def without(hook: UserHook) -> Iterator[None]:
    """Inside, this hook does not run."""
    if hook.key is None:
        kept = hook.holder.__dict__.pop(hook.place)
        try:
            yield
        finally:
            hook.holder.__dict__[hook.place] = kept
        return
    hooks = getattr(hook.holder, hook.place)
    order = list(hooks.items())
    del hooks[hook.key]
    try:
        yield
    finally:
        hooks.clear()
        hooks.update(order)


def _hooks(name: str, parameter: bool, holder: Any, place: str, direction: str) -> Iterator[UserHook]:
    for key, function in (getattr(holder, place, None) or {}).items():
        if not _known(function):
            in_loss = not parameter and _is_loss(holder)
            yield UserHook(name, parameter, place, direction, _source(function), holder, key, in_loss)


def _known(function: Any) -> bool:
    return line_of(function) is None


def _is_loss(module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    return isinstance(module, _Loss) or "loss" in kind or "criterion" in kind


def _source(function: Any) -> str:
    return told(line_of(function)) or ""
