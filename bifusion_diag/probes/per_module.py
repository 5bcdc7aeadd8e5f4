"""Probes that give every module its own series."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from bifusion_diag.probes.base import Probe, Reading
from bifusion_diag.probes.fields import Key


class ModuleProbe(Probe):
    """Base of probes that measure the calls of many modules: series ``<prefix>/<module>/<key>``."""

    TABLE: ClassVar[dict[str, Key]] = {}
    NAN_IS_MISSING: ClassVar[frozenset[str]] = frozenset()  # keys where NaN stands for "nothing to measure"

    def __init_subclass__(cls) -> None:
        cls.KEYS = {f"<module>/{key}": entry.meaning for key, entry in cls.TABLE.items()}

    def begin(self) -> None:
        self._calls: dict[str, list[Tensor]] = {}  # by module: numbers (keys,) of each call

    def record(self, module: str, values: Tensor) -> None:
        """Keep the numbers of one call, (keys,) float32 in the order of TABLE."""
        self._calls.setdefault(module, []).append(values)

    def collect(self) -> Iterator[Reading]:
        alike: dict[tuple[int, torch.device], list[str]] = {}  # modules called equally often are put together at once
        for module, calls in self._calls.items():
            alike.setdefault((len(calls), calls[0].device), []).append(module)
        for (count, _), modules in alike.items():
            numbers = torch.stack([values for module in modules for values in self._calls[module]])
            numbers = numbers.view(len(modules), count, len(self.TABLE))
            for i, (key, entry) in enumerate(self.TABLE.items()):
                missing = key in self.NAN_IS_MISSING
                values = numbers[:, 0, i] if count == 1 else _combined(numbers[:, :, i], entry.over_calls, missing)
                yield Reading(
                    tuple(f"{self.name}/{module}/{key}" for module in modules), values, nan_is_missing=missing
                )


def _combined(calls: Tensor, rule: str, nan_is_missing: bool) -> Tensor:
    """Put calls (modules, calls) together; NaN stays NaN unless it stands for "nothing to measure"."""
    if rule == "min":
        return calls.amin(1)
    if rule == "max":
        return calls.amax(1)
    if rule == "sum":
        return calls.sum(1)
    return calls.nanmean(1) if nan_is_missing else calls.mean(1)
