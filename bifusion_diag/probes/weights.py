"""Norms of the weights by module."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bifusion_diag.probes.base import Probe, Reading, Schedule, Subject, matches
from bifusion_diag.probes.modules import plain_name
from bifusion_diag.probes.norms import Number, as_tensor, count_nonfinite, norms_of, to_float32
from bifusion_diag.probes.owners import Slots, owners_of
from bifusion_diag.probes.ranks import Shards

TURNS = 8
REFRESH = 64  # turns after which a frozen parameter that looks unchanged is measured again


class WeightsProbe(Probe):
    """Weights as they are when the step begins, with which its first forward is computed.

    Reading every weight at every step would be a quarter of what all probes may cost, and norms of weights move slowly
    (``updates`` tells how slowly): modules take turns. All are measured at step 0.

    A frozen parameter is measured again when PyTorch has counted a change of it, or its memory is another one; a change
    that is not counted, such as through ``.data``, shows after 64 of its module's turns at the latest. Of sharded
    parameters (FSDP2) the numbers are of the whole.

    Args:
        modules: name patterns of the modules that are measured.
        turns: steps from one measurement of a module to the next, among those at which the probe is due.
    """

    prefix = "weights"
    KEYS: ClassVar[dict[str, str]] = {
        "<module>/norm": f"L2 norm of its own parameters; at every {TURNS}th step",
        "<module>/nonfinite": f"NaN and infinite elements of its own parameters; at every {TURNS}th step; "
        "on an accelerator, where counting would cost a pass, missing unless there are none",
        "<module>/running_nonfinite": "how many of its running statistics (running_mean and running_var of BatchNorm) "
        f"hold NaN or infinity; at every {TURNS}th step",
    }

    def __init__(
        self,
        *,
        modules: Sequence[str] = ("*",),
        turns: int = TURNS,
        name: str | None = None,
        every: int | Schedule | None = None,
    ) -> None:
        super().__init__(name=name, every=every)
        assert turns >= 1, f"turns={turns}: give a number of steps from 1 on"
        self.modules = tuple(modules)
        self.turns = turns

    def attach(self, subject: Subject) -> None:
        self._owners = owners_of(subject.model, self.modules)
        self._shards = Shards(self._owners.parameters)
        self.shared = self._shards.any
        count = len(self._owners.parameters)
        self._norms: list[Number] = [0.0] * count
        self._nonfinite = [0.0] * count  # where the norm is not finite
        self._versions: list[tuple[int, int] | None] = [None] * count  # None: a lazy one without a shape yet
        self._summing = Slots()
        names = self._owners.names
        self._norm_names = tuple(f"{self.name}/{name}/norm" for name in names)
        self._nonfinite_names = tuple(f"{self.name}/{name}/nonfinite" for name in names)
        self._running = _running_statistics(subject.model, self.modules)
        self._running_norms: dict[int, list[Number]] = {}  # of the modules whose turn it is
        self._running_names = tuple(f"{self.name}/{name}/running_nonfinite" for name, _ in self._running)

    def begin(self) -> None:
        changed: list[int] = []
        for i, (parameter, slot) in enumerate(zip(self._owners.parameters, self._owners.slots, strict=True)):
            if is_lazy(parameter) or not self._in_turn(slot):
                continue
            version = parameter._version, parameter.data_ptr()
            # A fused optimiser changes what learns without counting it.
            if parameter.requires_grad or version != self._versions[i] or (self.turn // self.turns + i) % REFRESH == 0:
                self._versions[i] = version
                changed.append(i)
        measured = [self._owners.parameters[i].detach() for i in changed]
        for i, x, norm in zip(changed, measured, norms_of(measured), strict=True):
            self._norms[i] = norm
            if isinstance(norm, Tensor):
                self._nonfinite[i] = math.nan
            elif not math.isfinite(norm):
                self._nonfinite[i] = count_nonfinite(x).item()
        self._running_norms = {
            slot: norms_of([x.detach() for x in map(module._buffers.get, keys) if x is not None and not is_lazy(x)])
            for slot, (module, keys) in enumerate(found for _, found in self._running)
            if self._in_turn(slot)
        }

    def _in_turn(self, slot: int) -> bool:
        return self.turn == 0 or (self.turn + slot) % self.turns == 0

    def collect(self) -> Iterator[Reading]:
        if self._running:
            yield self._running_reading()
        names, _, slots = self._owners
        if not names:
            return
        norms, everywhere = as_tensor(self._norms), range(len(slots))
        bad = self._summing.constant(self._nonfinite, norms.device, torch.float64)
        counts = torch.where(norms.isfinite(), 0.0, bad)
        norms, roots = self._shards.whole_norms(torch.stack([norms, counts.sqrt()]), everywhere)
        counts = roots.square().round()
        missing = np.array([not self._in_turn(slot) for slot in range(len(names))])
        missing[[slot for slot, version in zip(slots, self._versions, strict=True) if version is None]] = True
        yield Reading(self._norm_names, to_float32(self._summing.root_sum_squares(norms, slots, len(names))), missing)
        nonfinite = to_float32(self._summing.sum(counts, slots, len(names)))
        nonfinite[self._summing.constant(missing.nonzero()[0].tolist(), nonfinite.device)] = torch.nan
        yield Reading(self._nonfinite_names, nonfinite, nan_is_missing=True)

    def _running_reading(self) -> Reading:
        """How many running statistics of each module are not finite."""
        slots = [slot for slot, norms in self._running_norms.items() for _ in norms]
        missing = np.array([slot not in slots for slot in range(len(self._running))])
        values = torch.zeros(len(self._running))
        if slots:
            bad = ~as_tensor([norm for norms in self._running_norms.values() for norm in norms]).isfinite()
            values = to_float32(self._summing.sum(bad.double(), slots, len(self._running)))
        return Reading(self._running_names, values, missing)


def _running_statistics(
    model: nn.Module, patterns: Sequence[str]
) -> list[tuple[str, tuple[nn.Module, tuple[str, ...]]]]:
    """Modules that keep running statistics, with the names of these buffers."""
    found = []
    for path, module in model.named_modules():
        keys = tuple(
            key
            for key, x in module._buffers.items()
            if key.startswith("running_") and x is not None and (is_lazy(x) or x.is_floating_point())
        )
        if keys and matches(plain_name(path), patterns):
            found.append((plain_name(path), (module, keys)))
    return found
