"""Hooks and patched forwards that somebody hung into a model: what they are, and the step without them."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from bifusion_diag.probes.modules import plain_name
from bifusion_diag.replay.step import Training

#: Where hooks are kept, with the part of the step that they can change.
PLACES = {
    "_forward_hooks": "forward",
    "_forward_pre_hooks": "forward",
    "_backward_hooks": "backward",
    "_backward_pre_hooks": "backward",
}
OURS = ("torch.", "bifusion_diag.")


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
    """

    owner: str
    parameter: bool
    place: str
    direction: str
    source: str
    holder: Any
    key: int | None


def user_hooks(training: Training) -> list[UserHook]:
    """All of them, in the order of the modules."""
    found: list[UserHook] = []
    for path, module in training.model.named_modules():
        name = plain_name(path)
        patched = module.__dict__.get("forward")
        if patched is not None and not _known(patched):
            found.append(UserHook(name, False, "forward", "forward", _source(patched), module, None))
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
            yield UserHook(name, parameter, place, direction, _source(function), holder, key)


def _known(function: Any) -> bool:
    return str(_bare(function).__module__ or "").startswith(OURS)


def _bare(function: Any) -> Any:
    """The function inside partials and methods; of an object its class."""
    while hasattr(function, "func"):
        function = function.func
    function = getattr(function, "__func__", function)
    return function if hasattr(function, "__module__") and hasattr(function, "__name__") else type(function)


def _source(function: Callable[..., Any]) -> str:
    bare = _bare(function)
    code = getattr(bare, "__code__", None)
    if code is None:
        return str(getattr(bare, "__qualname__", bare))
    line = linecache.getline(code.co_filename, code.co_firstlineno).strip()
    return f"{code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno}: {line or bare.__name__}"
