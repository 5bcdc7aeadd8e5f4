"""What a probe is. A new one states which outputs it reads, its keys, and the few lines that are its idea."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bifusion_diag.probes.norms import to_float32

Schedule = Callable[[int], bool]
ROOT = "(root)"  # stands for the model itself in names


def always(step: int) -> bool:
    """Measure at every step."""
    return True


class Reading(NamedTuple):
    """Numbers of one step, on the model's device.

    A scalar reading has n names and values (n,). A histogram has one name, values (B,) that are its counts, and edges.
    """

    names: tuple[str, ...]
    values: Tensor
    missing: NDArray[np.bool_] | None = None  # (n,) known on the host: frozen, no gradient
    nan_is_missing: bool = False  # NaN stands for "nothing to measure", decided on the device
    edges: tuple[float, ...] | None = None


class Probe:
    """Base of all probes.

    Args:
        name: prefix of its series, where two probes of one kind watch different modules.
        every: function step → bool that says when to measure.
    """

    KEYS: ClassVar[dict[str, str]] = {}  # key → meaning; <module> and <term> stand for any
    prefix: ClassVar[str]
    sees_repeats: ClassVar[bool] = False  # whether seen() also gets what activation checkpointing runs again

    def __init__(self, *, name: str | None = None, every: Schedule = always) -> None:
        self.name = name or self.prefix
        self.every = every

    def attach(self, model: nn.Module) -> None:
        """Learn the model's modules. Called once, when the Monitor opens."""

    def watches(self, name: str, module: nn.Module) -> bool:
        """Whether :meth:`seen` gets every output of this module."""
        return False

    def reads(self, output: Any) -> bool:
        """Whether :meth:`seen` gets outputs like this one, of any module. May look at the output's type and keys."""
        return False

    def begin(self) -> None:
        """A step that is due begins: forget the last one."""

    def seen(self, name: str, output: Any) -> None:
        """A module's forward ended. Must detach what it reads, and keep neither the output nor a part of it."""

    def collect(self) -> Iterable[Reading]:
        """The step's readings, after its backward. Must not synchronise with the device."""
        raise NotImplementedError


class Key(NamedTuple):
    """A number of a :class:`FieldProbe`."""

    over_calls: str  # how the calls of a step are put together: "sum", "mean", "min" or "max"
    meaning: str


class FieldProbe(Probe):
    """Base of probes that measure named fields of a module's output.

    The first module whose output has the fields, with no None among them, is the one that is watched from then on.

    Args:
        modules: name patterns of the modules that may be watched; "*" is any.
    """

    TABLE: ClassVar[dict[str, Key]] = {}
    NAN_IS_MISSING: ClassVar[bool] = True  # NaN stands for "nothing to measure"; False where it is a true value

    def __init__(self, *, modules: Sequence[str] = ("*",), name: str | None = None, every: Schedule = always) -> None:
        super().__init__(name=name, every=every)
        self.modules = tuple(modules)
        self._sources: dict[tuple[str, ...], str] = {}
        self._calls: dict[tuple[str, ...], list[Tensor]] = {}

    def __init_subclass__(cls) -> None:
        cls.KEYS = {key: entry.meaning for key, entry in cls.TABLE.items()}

    def begin(self) -> None:
        self._calls = {}

    def fields_of(self, name: str, output: Any, fields: tuple[str, ...]) -> list[Any] | None:
        """The fields of an output, None unless it has all of them and the module is the one that is watched."""
        values = [get_field(output, field) for field in fields]
        if any(value is None for value in values) or not matches(name, self.modules):
            return None
        return values if self._sources.setdefault(fields, name) == name else None

    def record(self, keys: tuple[str, ...], values: Sequence[Tensor]) -> None:
        """Keep the numbers of one call: one () tensor a key, NaN where there is nothing to measure."""
        packed = torch.stack([value.double() for value in values])
        self._calls.setdefault(keys, []).append(packed)

    def collect(self) -> Iterator[Reading]:
        for keys, calls in self._calls.items():
            values = calls[0] if len(calls) == 1 else self._combined(keys, torch.stack(calls))
            names = tuple(f"{self.name}/{key}" for key in keys)
            yield Reading(names, to_float32(values), nan_is_missing=self.NAN_IS_MISSING)

    def over_calls(self, key: str) -> str:
        """How the calls of a step are put together."""
        return self.TABLE[key].over_calls

    def _combined(self, keys: tuple[str, ...], calls: Tensor) -> Tensor:
        """Put calls (calls, keys) together. What was not measured in one call is taken from the others."""
        gone = calls.isnan() if self.NAN_IS_MISSING else torch.zeros_like(calls, dtype=torch.bool)
        total = calls.masked_fill(gone, 0.0).sum(0)
        by_rule = {
            "sum": total,
            "mean": total / (~gone).sum(0),
            "min": calls.masked_fill(gone, torch.inf).amin(0),
            "max": calls.masked_fill(gone, -torch.inf).amax(0),
        }
        chosen = torch.stack([by_rule[self.over_calls(key)][i] for i, key in enumerate(keys)])
        return chosen.masked_fill(gone.all(0), torch.nan)


def has_fields(output: Any, fields: Iterable[str]) -> bool:
    """Whether an output has these attributes or, being a dict, these keys."""
    if isinstance(output, dict):
        return all(field in output for field in fields)
    return all(hasattr(output, field) for field in fields)


def get_field(output: Any, field: str) -> Any:
    """A field of an output, None where it has none of that name."""
    return output.get(field) if isinstance(output, dict) else getattr(output, field, None)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module's name matches one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
