"""Ranges and norms of the 2D features, from the tower to the points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bifusion_diag.probes.base import Call, Schedule, matches
from bifusion_diag.probes.fields import FieldProbe, Key
from bifusion_diag.probes.outputs import tensors_of

QUANTILE_ELEMENTS = 1 << 20  # at most so many elements enter the quantile

RANGES = {
    "min": Key("min", "smallest finite value"),
    "max": Key("max", "largest finite value"),
    "absmax": Key("max", "largest finite magnitude"),
    "p99.9": Key(
        "max", f"99.9 % of magnitudes are at most this; of {QUANTILE_ELEMENTS} elements, evenly spaced by row"
    ),
    "share_gt_10": Key("mean", "share of finite elements with |x| > 10"),
    "norm_mean": Key("mean", "mean L2 norm of a feature vector, over its finite elements"),
    "nonfinite": Key("sum", "number of NaN and infinite elements"),
}
WHERE = ("tokens", "head", "points")


class ClipProbe(FieldProbe):
    """Reads the field ``tokens`` of the CLIP tower's output (tokens), the output of the projection head (head), and
    ``f2d``, ``f3d``, ``valid`` of the encoder's output (points, ratio_2d_3d; only points that are valid, but
    `nonfinite` counts all). A 4-D tensor has its channels in dimension 1, any other in its last.

    Args:
        head: name patterns of the projection head.
        modules, fields, name, every: as for every FieldProbe.
    """

    prefix = "clip"
    TABLE: ClassVar[dict[str, Key]] = {f"{where}/{key}": entry for where in WHERE for key, entry in RANGES.items()} | {
        "ratio_2d_3d": Key("mean", "mean norm of f2d ÷ mean norm of f3d, over valid points")
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
    on_cpu = x.device.type == "cpu"  # there, asking for a value and selecting rows cost no synchronisation
    norms = torch.linalg.vector_norm(x, dim=1)
    healthy = on_cpu and bool(norms.isfinite().all())
    nonfinite = torch.zeros(()) if healthy else (~x.isfinite()).sum()
    if on_cpu and rows is not None:
        x, norms, rows = x[rows], norms[rows], None
    keep: Tensor | None = None  # elements that count, None where all of them do
    if not healthy or rows is not None:
        keep = x.isfinite() if rows is None else x.isfinite() & rows[:, None]
    if not x.numel():
        return [*[nothing] * 6, nonfinite]
    if keep is None:
        count = torch.full((), x.numel(), dtype=torch.float64, device=x.device)
        low, high = x.aminmax()
        return [
            low,
            high,
            torch.maximum(-low, high),
            _quantile(x.abs(), None),
            _share(x, count),
            norms.mean(),
            nonfinite,
        ]
    count = keep.sum()
    low, high = torch.where(keep, x, torch.inf).amin(), torch.where(keep, x, -torch.inf).amax()
    clean = torch.where(keep, x, 0.0)
    values = [
        low,
        high,
        torch.maximum(-low, high),
        _quantile(clean.abs(), keep),
        _share(clean, count),
        _norm_mean(clean, rows),
    ]
    return [*[torch.where(count > 0, value.double(), nothing) for value in values], nonfinite]


def _share(x: Tensor, count: Tensor) -> Tensor:
    return (x.abs() > 10).sum() / count


def _norm_mean(x: Tensor, rows: Tensor | None) -> Tensor:
    """Mean L2 norm of the rows that count, over finite elements; NaN where there is none."""
    norms = torch.linalg.vector_norm(torch.where(x.isfinite(), x, 0.0), dim=1, dtype=torch.float64)
    return norms.mean() if rows is None else torch.where(rows, norms, 0.0).sum() / rows.sum()


def _quantile(magnitudes: Tensor, keep: Tensor | None) -> Tensor:
    """The magnitude that floor(n/1000) of the n that count exceed, from the largest thousandth alone: torch.quantile
    sorts everything and refuses more than 16 million elements. Magnitudes (R, C) are 0 where they do not count."""
    stride = -(-magnitudes.numel() // QUANTILE_ELEMENTS)
    sample = magnitudes[::stride].reshape(-1)
    count = torch.full((), sample.numel(), device=sample.device) if keep is None else keep[::stride].sum()
    largest = torch.topk(sample, sample.numel() // 1000 + 1).values
    return largest.gather(0, (count // 1000)[None])[0]
