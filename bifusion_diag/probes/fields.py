"""Probes that measure named fields of what a module returns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from bifusion_diag.errors import UserError, near_matches
from bifusion_diag.probes.base import Call, Probe, Reading, Schedule, matches
from bifusion_diag.probes.norms import to_float32


class Key(NamedTuple):
    """A number of a :class:`FieldProbe`."""

    over_calls: str  # how the calls of a step are put together: "sum", "mean", "min" or "max"
    meaning: str


class FieldProbe(Probe):
    """Base of probes that measure named fields of a module's output.

    The first module whose output has the fields, with no None among them, is the one that is watched from then on.

    Args:
        modules: name patterns of the modules that may be watched; "*" is any.
        fields: where another model keeps a field: {"alpha": "gate_weight"}, {"alpha": "aux.weight"} for a field of a
            field, {"alpha": 1} for the second of a tuple, {"alpha": ""} for the output itself.
        name: prefix of its series.
        every: when to measure.

    Raises:
        UserError: `fields` names a field that this probe does not read.
    """

    TABLE: ClassVar[dict[str, Key]] = {}
    NAN_IS_MISSING: ClassVar[bool] = True  # NaN stands for "nothing to measure"; False where it is a true value
    FIELDS: ClassVar[tuple[str, ...]] = ()  # all that may be renamed

    def __init__(
        self,
        *,
        modules: Sequence[str] = ("*",),
        fields: Mapping[str, str | int] | None = None,
        name: str | None = None,
        every: int | Schedule | None = None,
    ) -> None:
        super().__init__(name=name, every=every)
        self.modules = tuple(modules)
        self.places = dict(fields or {})
        for field in self.places:
            if field not in self.FIELDS:
                raise UserError(f"{self.prefix} reads no field {field!r}.{near_matches(field, self.FIELDS)}")
        self._sources: dict[tuple[str, ...], str] = {}
        self._calls: dict[tuple[str, ...], list[Tensor]] = {}

    def __init_subclass__(cls) -> None:
        cls.KEYS = {key: entry.meaning for key, entry in cls.TABLE.items()}

    def watches(self, name: str, module: nn.Module) -> bool:
        """Modules that are told by name together with the places of their fields may return anything."""
        return bool(self.places) and self.modules != ("*",) and matches(name, self.modules)

    def begin(self) -> None:
        self._calls = {}

    def has(self, output: Any, fields: Iterable[str]) -> bool:
        """Whether an output has these fields, wherever they are."""
        return all(get_field(output, self.places.get(field, field), ABSENT) is not ABSENT for field in fields)

    def fields_of(self, call: Call, fields: tuple[str, ...]) -> list[Any] | None:
        """The fields of an output, None unless it has all of them and the module is the one that is watched."""
        values = [get_field(call.output, self.places.get(field, field)) for field in fields]
        if any(value is None for value in values) or not matches(call.name, self.modules):
            return None
        return values if self._sources.setdefault(fields, call.name) == call.name else None

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


ABSENT = object()


def get_field(output: Any, place: str | int, default: Any = None) -> Any:
    """A field of an output: an attribute, the key of a mapping, a position, a dotted path of these, or "" for all of
    it. The default where it has none of that name."""
    if place == "":
        return output
    if isinstance(place, int):
        fits = isinstance(output, (tuple, list)) and -len(output) <= place < len(output)
        return output[place] if fits else default
    if isinstance(output, Mapping) and place in output:
        return output[place]
    first, _, rest = place.partition(".")
    if isinstance(output, Mapping):
        found = output.get(first, default)
    elif first.isdigit():
        found = get_field(output, int(first), default)
    else:
        found = getattr(output, first, default)
    return get_field(found, rest, default) if rest and found is not default else found
