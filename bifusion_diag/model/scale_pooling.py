"""From points and superpoints to the voxels of every scale, by the mean, scale by scale.

A coarse voxel's value is the mean of the values of its up to eight children, not of its points: what Mask3D's repeated
average pooling gives. It is linear in the points, so that each point has one weight at each scale.

Legend: N points · M voxels of a scale · S superpoints of a scene · Q columns · P pairs of voxel and superpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bifusion_diag.model.outputs import Scales
from bifusion_diag.model.segments import segment_sum, split_rows, starts
from bifusion_diag.model.sparse import SparseTensor
from bifusion_diag.model.sparse.coordinates import Packing, bounding_box
from bifusion_diag.model.sparse.tensor import lexicographic_order


class Shares(NamedTuple):
    """How the voxels of a scene are made of its superpoints."""

    voxel: Tensor  # (P,) int64 within the scene
    superpoint: Tensor  # (P,) int64 within the scene
    share: Tensor  # (P,) in (0, 1]; a voxel's shares add up to 1

    def pool(self, values: Tensor, voxels: int) -> Tensor:
        """Carry (S, Q) to the voxels: (M, Q)."""
        return segment_sum(values.index_select(0, self.superpoint) * self.share[:, None], self.voxel, voxels)


class ScaleVoxels(NamedTuple):
    """The voxels of one scale; one list entry a scene, voxels in lexicographic order."""

    feats: list[Tensor]  # (M_i, C)
    cells: list[Tensor]  # (M_i, 3) int64, in input voxels
    positions: list[Tensor]  # (M_i, 3) mean position [m]
    shares: list[Shares]


@torch.no_grad()
def _orders(tensors: Sequence[SparseTensor]) -> list[Tensor]:
    return [lexicographic_order(tensor.coords.long()) for tensor in tensors]


def scale_voxels(
    scales: Scales,
    coords: Tensor,
    point_counts: tuple[int, ...],
    superpoint: Tensor,
    superpoint_counts: tuple[int, ...],
) -> list[ScaleVoxels]:
    """The voxels of every scale, scene by scene.

    Args:
        scales: features, coarsest first, and the finest voxel of each point.
        coords: (N, 3) [m].
        point_counts: points of each scene, all ≥ 1.
        superpoint: (N,) int64, unique in the batch.
        superpoint_counts: superpoints of each scene.

    Returns:
        One entry a scale, coarsest first.
    """
    scenes, superpoints = len(point_counts), sum(superpoint_counts)
    orders = _orders(scales.tensors)
    cells = [t.coords.long().index_select(0, o) for t, o in zip(scales.tensors, orders, strict=True)]
    counts = torch.stack([torch.bincount(c[:, 0], minlength=scenes) for c in cells]).tolist()
    found: list[ScaleVoxels] = []
    rows, weight = scales.point_voxel, coords.new_ones(len(coords), dtype=torch.float64)
    rows = torch.argsort(orders[-1]).index_select(0, rows)
    for scale in reversed(range(len(cells))):
        if scale < len(cells) - 1:
            child = cells[scale + 1]
            parent = _parents(child, cells[scale], scales.tensors[scale].stride)
            rows, siblings = parent.index_select(0, rows), torch.bincount(parent)
        else:
            siblings = torch.bincount(rows)
        weight = weight / siblings.index_select(0, rows)
        per_scene = tuple(counts[scale])
        first_voxel, first_superpoint = starts(per_scene), starts(superpoint_counts)
        positions = segment_sum(coords.double() * weight[:, None], rows, len(cells[scale])).to(coords.dtype)
        pairs, which = torch.unique(rows * superpoints + superpoint, return_inverse=True)
        share = segment_sum(weight, which, len(pairs)).to(coords.dtype)
        voxel = torch.div(pairs, superpoints, rounding_mode="floor")
        of_scene = torch.bincount(cells[scale][:, 0].index_select(0, voxel), minlength=scenes).tolist()
        split = [split_rows(values, tuple(of_scene)) for values in (voxel, pairs % superpoints, share)]
        found.append(
            ScaleVoxels(
                feats=split_rows(scales.tensors[scale].feats.index_select(0, orders[scale]), per_scene),
                cells=split_rows(cells[scale][:, 1:], per_scene),
                positions=split_rows(positions, per_scene),
                shares=[
                    Shares(split[0][i] - first_voxel[i], split[1][i] - first_superpoint[i], split[2][i])
                    for i in range(scenes)
                ],
            )
        )
    return found[::-1]


def _parents(fine: Tensor, coarse: Tensor, stride: int) -> Tensor:
    """Row of the coarse voxel that holds each fine one: (M, 4), (M', 4) in lexicographic order → (M,) int64."""
    target = torch.cat([fine[:, :1], fine[:, 1:].div(stride, rounding_mode="floor") * stride], dim=1)
    packing = Packing(*bounding_box(coarse))
    return torch.searchsorted(packing.pack(coarse), packing.pack(target))
