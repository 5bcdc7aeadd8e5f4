"""The fusion weight α."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from bifusion_diag.probes.base import Call, Reading
from bifusion_diag.probes.fields import FieldProbe, Key

BINS = 32
EDGES = tuple(i / BINS for i in range(BINS + 1))


class GateProbe(FieldProbe):
    """Reads ``alpha`` of the gate's output: moments, shares, and its histogram in 32 equal bins of [0, 1].

    Non-finite values are counted apart and are in no bin, nor are finite ones outside [0, 1].
    """

    prefix = "gate"
    TABLE: ClassVar[dict[str, Key]] = {
        "mean": Key("mean", "mean of the finite α"),
        "std": Key("mean", "standard deviation (population) of the finite α"),
        "share_lt_0.05": Key("mean", "share of the finite α below 0.05"),
        "share_gt_0.95": Key("mean", "share of the finite α above 0.95"),
        "nonfinite": Key("sum", "number of NaN and infinite α"),
    }
    FIELDS = ("alpha",)
    HISTOGRAM = "alpha"

    def reads(self, output: Any) -> bool:
        return self.has(output, self.FIELDS)

    def begin(self) -> None:
        super().begin()
        self._counts: Tensor | None = None

    def seen(self, call: Call) -> None:
        fields = self.fields_of(call, self.FIELDS)
        if fields is None:
            return
        alpha = fields[0].detach().double().flatten()
        finite = alpha.isfinite()
        count = finite.sum()  # of none, every ratio below is 0/0 = NaN: nothing to measure
        mean = torch.where(finite, alpha, 0.0).sum() / count
        std = (torch.where(finite, alpha - mean, 0.0).square().sum() / count).sqrt()
        low, high = (finite & (alpha < 0.05)).sum() / count, (finite & (alpha > 0.95)).sum() / count
        self.record(tuple(self.TABLE), [mean, std, low, high, (~finite).sum()])
        counts = bin_counts(fields[0].detach().flatten())
        self._counts = counts if self._counts is None else self._counts + counts

    def collect(self) -> Iterator[Reading]:
        yield from super().collect()
        if self._counts is not None:
            yield Reading((f"{self.name}/{self.HISTOGRAM}",), self._counts.float(), edges=EDGES)


def bin_counts(values: Tensor) -> Tensor:
    """Counts (32,) of values (N,) in the bins of EDGES; the last bin holds 1 itself.

    Deterministic on every device and without synchronisation, which torch.histc and bincount are not; NaN fails every
    comparison, and infinite or too large values cancel out, so that neither falls into a bin.
    """
    edges = torch.arange(BINS, dtype=values.dtype, device=values.device) / BINS
    above = (values[None, :] >= edges[:, None]).sum(1)
    return above - torch.cat([above[1:], (values > 1).sum()[None]])
