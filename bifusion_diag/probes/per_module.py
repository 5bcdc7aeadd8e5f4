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
        self._calls: dict[tuple[str, tuple[str, ...]], list[Tensor]] = {}  # by module and keys: numbers of each call

    def record(self, module: str, values: Tensor, keys: tuple[str, ...] | None = None) -> None:
        """Keep the numbers of one call, (keys,) float32; all keys of TABLE where None are named."""
        self._calls.setdefault((module, keys or tuple(self.TABLE)), []).append(values)

    def collect(self) -> Iterator[Reading]:
        alike: dict[tuple[tuple[str, ...], int, torch.device], list[str]] = {}  # put together at once
        for (module, keys), calls in self._calls.items():
            alike.setdefault((keys, len(calls), calls[0].device), []).append(module)
        for (keys, count, _), modules in alike.items():
            numbers = torch.stack([values for module in modules for values in self._calls[module, keys]])
            numbers = numbers.view(len(modules), count, len(keys))
            for i, key in enumerate(keys):
                missing = key in self.NAN_IS_MISSING
                rule = self.TABLE[key].over_calls
                values = numbers[:, 0, i] if count == 1 else _combined(numbers[:, :, i], rule, missing)
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
