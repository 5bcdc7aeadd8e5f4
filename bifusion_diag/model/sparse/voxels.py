"""Points to voxels and back.

Legend: N points · M voxels · C channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional as F

from bifusion_diag.errors import UserError
from bifusion_diag.model.sparse.coordinates import Packing, bounding_box, check_range
from bifusion_diag.model.sparse.tensor import Engine, SparseTensor


class Grouping(NamedTuple):
    """Which points lie in which voxel."""

    inverse: Tensor  # (N,) int64 voxel of each point
    order: Tensor  # (N,) int64 points sorted by voxel
    start: Tensor  # (M,) int64 where each voxel's points start in `order`
    size: Tensor  # (M,) int64 points of each voxel


def _sum_by_voxel(feats: Tensor, groups: Grouping) -> Tensor:
    """(N, C) -> (M, C) float64: sums of float32 that do not depend on the order of the points."""
    return F.embedding_bag(groups.order, feats.detach().double(), groups.start, mode="sum")


class _Mean(Function):
    """Points → voxels: mean of the features. No scatter, hence the same bits on every run."""

    @staticmethod
    def forward(ctx: Any, feats: Tensor, groups: Grouping) -> Tensor:
        ctx.groups = groups
        return (_sum_by_voxel(feats, groups) / groups.size[:, None]).to(feats.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        share = grad / ctx.groups.size[:, None].to(grad.dtype)
        return share.index_select(0, ctx.groups.inverse), None


class _Slice(Function):
    """Voxels → points: every point takes its voxel's features."""

    @staticmethod
    def forward(ctx: Any, feats: Tensor, groups: Grouping) -> Tensor:
        ctx.groups = groups
        return feats.index_select(0, groups.inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_by_voxel(grad, ctx.groups).to(grad.dtype), None


class Voxels(NamedTuple):
    """Voxelised points."""

    tensor: SparseTensor  # M voxels with the mean features of their points
    groups: Grouping

    @property
    def inverse(self) -> Tensor:
        """(N,) int64 row in ``tensor`` of each point."""
        return self.groups.inverse

    def slice(self, tensor: SparseTensor) -> Tensor:
        """(N, C) features at the points, from features (M, C) on the same voxels."""
        assert tensor.stride == 1, "points take features of the finest scale"
        assert tensor.maps is self.tensor.maps, "the voxels that the points were put into"
        return _Slice.apply(tensor.feats, self.groups)


def voxelize(coords: Tensor, feats: Tensor, scene_index: Tensor, voxel_size: float, engine: Engine) -> Voxels:
    """Put points into cubic voxels.

    Args:
        coords: (N, 3) [m].
        feats: (N, C).
        scene_index: (N,) int64, 0..B-1.
        voxel_size: side of a voxel [m].
        engine: who will convolve.

    Returns:
        Voxels floor(coords / voxel_size) (towards minus infinity, in the precision of the points), rows sorted by
        (scene, x, y, z); features are the mean over the voxel's points.

    Raises:
        UserError: no points, non-finite coordinates, or coordinates too far apart to be numbered.
    """
    if len(coords) == 0:
        raise UserError("There are no points to voxelise: every scene of the batch is empty.")
    # Divided by a tensor: by a Python number, CUDA would multiply with the reciprocal and round differently.
    place = torch.floor(coords.detach() / coords.new_tensor(voxel_size))
    check_range(place)
    cells = torch.cat([scene_index[:, None], place.long()], 1)
    packing = Packing(*bounding_box(cells))
    keys, inverse, count = torch.unique(packing.pack(cells), return_inverse=True, return_counts=True)
    groups = Grouping(inverse, torch.argsort(inverse, stable=True), count.cumsum(0) - count, count)
    maps = engine.maps(packing.unpack(keys))
    return Voxels(SparseTensor(_Mean.apply(feats, groups), 1, maps), groups)
