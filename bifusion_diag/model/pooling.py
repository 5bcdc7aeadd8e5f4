"""Points to superpoints: ESAM's geometry-aware pooling (Xu et al., ICLR 2025, section 3.2), or the plain mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bifusion_diag.model.segments import segment_extent, segment_max, segment_mean

_SMALLEST_DIAMETER = 1e-2  # [m], added to the diameter: a superpoint of one point must not divide by zero


class Pooled(NamedTuple):
    """Output of a pooling."""

    features: Tensor  # (S, C) superpoint features
    point_weight: Tensor  # (N, 1) weight of each point in its superpoint, in (0, 2)


class GeometryAwarePooling(nn.Module):
    """Weighted mean of the superpoint's point features plus a code of the superpoint's shape.

    Args:
        channels: C, width of the point features and of the superpoint features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.position = nn.Sequential(
            nn.Linear(3, channels),
            nn.LayerNorm(channels),
            nn.ReLU(),
            nn.Linear(channels, channels),
            nn.LayerNorm(channels),
        )
        self.weight = nn.Sequential(
            nn.Linear(2 * channels, channels),
            nn.LayerNorm(channels),
            nn.ReLU(),
            nn.Linear(channels, 1, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor, coords: Tensor, superpoint: Tensor, n_superpoints: int) -> Pooled:
        """Pool.

        Args:
            x: (N, C) point features.
            coords: (N, 3) point coordinates [m].
            superpoint: (N,) int64, unique in the batch.
            n_superpoints: S.

        Returns:
            Superpoint features and point weights.
        """
        position = self.position(_within_superpoint(coords, superpoint, n_superpoints))
        shape = segment_max(position, superpoint, n_superpoints)
        point_weight = 2 * self.weight(torch.cat([position, shape.index_select(0, superpoint)], dim=1))
        return Pooled(segment_mean(x * point_weight, superpoint, n_superpoints) + shape, point_weight)


class MeanPooling(nn.Module):
    """Mean of the superpoint's point features, as in OneFormer3D and Mask3D. Nothing is learned."""

    def forward(self, x: Tensor, coords: Tensor, superpoint: Tensor, n_superpoints: int) -> Pooled:
        """Pool; arguments as in :meth:`GeometryAwarePooling.forward`. Every point weighs 1."""
        return Pooled(segment_mean(x, superpoint, n_superpoints), x.new_ones(len(x), 1))


def make_pooling(kind: str, channels: int) -> GeometryAwarePooling | MeanPooling:
    """The pooling of a name: "geometry" or "mean"."""
    return MeanPooling() if kind == "mean" else GeometryAwarePooling(channels)


def _within_superpoint(coords: Tensor, superpoint: Tensor, n_superpoints: int) -> Tensor:
    """Coordinates from the superpoint's mean, in units of its longest side: (N, 3)."""
    centre = segment_mean(coords, superpoint, n_superpoints).index_select(0, superpoint)
    diameter = segment_extent(coords, superpoint, n_superpoints).amax(dim=1).index_select(0, superpoint)
    return (coords - centre) / (diameter[:, None] + _SMALLEST_DIAMETER)
