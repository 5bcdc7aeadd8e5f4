"""Ranges and norms of the 2D features, from the tower to the points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bifusion_diag.probes.base import Call, Schedule, matches
from bifusion_diag.probes.fields import FieldProbe, Key
from bifusion_diag.probes.outputs import tensors_of

SAMPLE_ELEMENTS = 1 << 18
_SAMPLE = f"of {SAMPLE_ELEMENTS} elements, in evenly spaced rows"

RANGES = {
    "min": Key("min", "smallest finite value"),
    "max": Key("max", "largest finite value"),
    "absmax": Key("max", "largest finite magnitude"),
    "p99.9": Key("max", f"99.9 % of magnitudes are at most this; {_SAMPLE}"),
    "share_gt_10": Key("mean", f"share of finite elements with |x| > 10; {_SAMPLE}"),
    "norm_mean": Key("mean", f"mean L2 norm of a feature vector, over its finite elements; {_SAMPLE}"),
    "nonfinite": Key("sum", "number of NaN and infinite elements"),
}
WHERE = ("tokens", "head", "points")
PAIRED_ROWS = 1024
_PAIRS = f"of {PAIRED_ROWS} evenly spaced points of the batch, those that are valid"


class ClipProbe(FieldProbe):
    """Reads the field ``tokens`` of the CLIP tower's output (tokens), the output of the projection head (head), and
    ``f2d``, ``f3d``, ``valid`` of the encoder's output (points, ratio_2d_3d, alike, aligned; only points that are
    valid, but `nonfinite` counts all). A 4-D tensor has its channels in dimension 1, any other in its last.

    Features that are all alike have collapsed: an alignment loss without negatives has its minimum there.

    Args:
        head: name patterns of the projection head.
        modules, fields, name, every: as for every FieldProbe.
    """

    prefix = "clip"
    TABLE: ClassVar[dict[str, Key]] = {f"{where}/{key}": entry for where in WHERE for key, entry in RANGES.items()} | {
        "ratio_2d_3d": Key("mean", "mean norm of f2d ÷ mean norm of f3d, over valid points"),
        "alike_2d": Key("mean", f"mean cosine between f2d of two points: 1 where all are alike; {_PAIRS}"),
        "alike_3d": Key("mean", f"mean cosine between f3d of two points; {_PAIRS}"),
        "aligned": Key("mean", f"mean cosine between f2d and f3d of a point; {_PAIRS}"),
    }

    FIELDS = ("tokens", "f2d", "f3d", "valid")

    def __init__(
        self,
        *,
        head: Sequence[str] = ("spatial_head", "*.spatial_head"),
        modules: Sequence[str] = ("*",),
        fields: Mapping[str, str | int] | None = None,
        name: str | None = None,
        every: int | Schedule | None = None,
    ) -> None:
        super().__init__(modules=modules, fields=fields, name=name, every=every)
        self.head = tuple(head)

    def watches(self, name: str, module: nn.Module) -> bool:
        return matches(name, self.head) or super().watches(name, module)

    def reads(self, output: Any) -> bool:
        return self.has(output, ("tokens",)) or self.has(output, ("f2d", "f3d", "valid"))

    def seen(self, call: Call) -> None:
        if matches(call.name, self.head):
            for tensor in tensors_of(call.output):
                self._ranges("head", tensor.detach())
                break
        if fields := self.fields_of(call, ("tokens",)):
            self._ranges("tokens", fields[0].detach())
        if fields := self.fields_of(call, ("f2d", "f3d", "valid")):
            f2d, f3d, valid = (field.detach() for field in fields)
            norm2d = self._ranges("points", f2d, valid)
            self.record(("ratio_2d_3d",), [norm2d / _norm_mean(f3d.float(), valid)])
            self.record(("alike_2d", "alike_3d", "aligned"), likeness(f2d, f3d, valid))

    def _ranges(self, where: str, features: Tensor, rows: Tensor | None = None) -> Tensor:
        """Record the ranges of a tensor; returns the mean norm."""
        features = features.movedim(1, -1) if features.dim() == 4 else features
        values = feature_ranges(features.reshape(-1, features.shape[-1]).float(), rows)
        self.record(tuple(f"{where}/{key}" for key in RANGES), values)
        return values[list(RANGES).index("norm_mean")]


def feature_ranges(x: Tensor, rows: Tensor | None) -> list[Tensor]:
    """The numbers of RANGES, in their order, of feature vectors x (R, C).

    Args:
        x: float32 features.
        rows: (R,) bool, the rows that count (all where None); `nonfinite` always counts in all rows.

    Returns:
        () tensors; NaN where no element counts.
    """
    nothing = torch.full((), torch.nan, dtype=torch.float64, device=x.device)
    if not x.numel():
        return [*[nothing] * 6, torch.zeros((), device=x.device)]
    low, high, nonfinite = _extremes(x, rows)
    few, counted = _sample(x, rows)
    keep = few.isfinite() & counted[:, None]
    clean = few.masked_fill(~keep, 0.0)
    values = [low, high, torch.maximum(-low, high), _quantile(clean.abs(), keep), (clean.abs() > 10).sum() / keep.sum()]
    there = low <= high  # else no element counts
    return [*[torch.where(there, value.double(), nothing) for value in [*values, _norm_mean(x, rows)]], nonfinite]


def likeness(f2d: Tensor, f3d: Tensor, valid: Tensor) -> list[Tensor]:
    """Mean cosine between two different points' f2d, between their f3d, and between f2d and f3d of one point.

    Args:
        f2d: (N, C) features of one side.
        f3d: (N, C) of the other.
        valid: (N,) bool, the points that count, if their features are finite and not zero.

    Returns:
        () tensors; NaN where too few points count.
    """
    stride = max(-(-len(valid) // PAIRED_ROWS), 1)
    sides = [side[::stride].double() for side in (f2d, f3d)]
    norms = [torch.linalg.vector_norm(side, dim=1) for side in sides]
    counted = valid[::stride].clone()
    for norm in norms:
        counted &= norm.isfinite() & (norm > 0)
    units = [torch.where(counted[:, None], side / norm[:, None], 0.0) for side, norm in zip(sides, norms, strict=True)]
    count = counted.sum()
    # the sum over all pairs of the dot products is the square of the sum, without the points' own
    alike = [(unit.sum(0).square().sum() - count) / (count * (count - 1)) for unit in units]
    return [*alike, (units[0] * units[1]).sum() / count]


def _extremes(x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest and largest finite element of the rows that count, and the number of non-finite ones of all rows."""
    low, high = x.aminmax(dim=1)
    if x.device.type == "cpu" and bool((low.isfinite() & high.isfinite()).all()):  # no synchronisation on the CPU
        nonfinite = torch.zeros(())
    else:
        finite = x.isfinite()
        nonfinite = (~finite).sum()
        low, high = torch.where(finite, x, torch.inf).amin(1), torch.where(finite, x, -torch.inf).amax(1)
    if rows is not None:
        low, high = low.masked_fill(~rows, torch.inf), high.masked_fill(~rows, -torch.inf)
    return low.amin(), high.amax(), nonfinite


def _sample(x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Evenly spaced rows of x, and which of them count."""
    stride = -(-x.numel() // SAMPLE_ELEMENTS)
    few = x[::stride]
    return few, torch.ones(len(few), dtype=torch.bool, device=x.device) if rows is None else rows[::stride]


def _norm_mean(x: Tensor, rows: Tensor | None) -> Tensor:
    """Mean L2 norm of the sampled rows that count, over finite elements; NaN where there is none."""
    few, counted = _sample(x, rows)
    norms = torch.linalg.vector_norm(few.masked_fill(~few.isfinite(), 0.0), dim=1, dtype=torch.float64)
    return torch.where(counted, norms, 0.0).sum() / counted.sum()


def _quantile(magnitudes: Tensor, keep: Tensor) -> Tensor:
    """The magnitude that floor(n/1000) of the n that count exceed, from the largest thousandth alone, as torch.quantile
    sorts everything. Magnitudes (R, C) are 0 where they do not count; NaN where none does."""
    largest = torch.topk(magnitudes.reshape(-1), magnitudes.numel() // 1000 + 1).values
    count = keep.sum()
    return largest.gather(0, (count // 1000)[None])[0].where(count > 0, torch.nan)
