"""Faults in the batch: of one sample unless said otherwise."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bifusion_diag.data.batch import Batch

FAR = 500.0  # [m] of a point that a depth camera has misread
BRIGHT = 1e4  # normalised colour; those of real points are within ±3
FEW = 3  # points that an empty crop keeps


def nan_color(batch: Batch, sample: int, step: int) -> Batch:
    """One point's red is NaN."""
    color = batch.color.clone()
    color[_rows(batch, sample).start, 0] = float("nan")
    return replace(batch, color=color)


def outlier_color(batch: Batch, sample: int, step: int) -> Batch:
    """One point's colour is far outside any other."""
    color = batch.color.clone()
    color[_rows(batch, sample).start] = BRIGHT
    return replace(batch, color=color)


def outlier_point(batch: Batch, sample: int, step: int) -> Batch:
    """One point lies far away."""
    row = _rows(batch, sample).start
    xyz, coords = batch.xyz.clone(), batch.coords.clone()
    xyz[row] += FAR
    coords[row] += FAR
    return replace(batch, xyz=xyz, coords=coords)


def nan_depth(batch: Batch, sample: int, step: int) -> Batch:
    """One pixel of the depth image is NaN."""
    depth = batch.depth.clone()
    depth[sample, 0, depth.shape[2] // 2, depth.shape[3] // 2] = float("nan")
    return replace(batch, depth=depth)


def lost_pose(batch: Batch, sample: int, step: int) -> Batch:
    """The pose of one view is −∞, as ScanNet marks lost tracking."""
    pose = batch.pose.clone()
    pose[sample, 0] = float("-inf")
    return replace(batch, pose=pose)


def wrong_labels(batch: Batch, sample: int, step: int) -> Batch:
    """Classes and objects are another scene's: drawn anew for every point."""
    return _relabelled(batch, _rows(batch, sample), step)


def all_labels_wrong(batch: Batch, sample: int, step: int) -> Batch:
    """As :func:`wrong_labels`, of every sample."""
    for each in range(batch.batch_size):
        batch = _relabelled(batch, _rows(batch, each), step)
    return batch


def swapped_images(batch: Batch, sample: int, step: int) -> Batch:
    """The sample and the next one have each other's images."""
    order = torch.arange(batch.batch_size)
    other = (sample + 1) % batch.batch_size
    order[sample], order[other] = other, sample
    return replace(batch, images=batch.images[order.to(batch.images.device)])


def empty_crop(batch: Batch, sample: int, step: int) -> Batch:
    """A handful of points is left."""
    rows = _rows(batch, sample)
    keep = torch.ones(len(batch.xyz), dtype=torch.bool, device=batch.xyz.device)
    keep[rows.start + FEW : rows.stop] = False
    counts = list(batch.point_counts)
    counts[sample] = min(FEW, counts[sample])
    superpoint, instance = batch.superpoint[keep], batch.instance[keep]
    used, superpoint = superpoint.unique(return_inverse=True)
    gone = sum(batch.superpoint_counts) - len(used)
    superpoints = list(batch.superpoint_counts)
    superpoints[sample] -= gone
    own = slice(rows.start, rows.start + counts[sample])
    instance[own] = _contiguous(instance[own])
    return replace(
        batch,
        xyz=batch.xyz[keep],
        coords=batch.coords[keep],
        color=batch.color[keep],
        scene_index=batch.scene_index[keep],
        semantic=batch.semantic[keep],
        point_counts=tuple(counts),
        superpoint=superpoint,
        superpoint_counts=tuple(superpoints),
        instance=instance,
    )


def _rows(batch: Batch, sample: int) -> slice:
    start = sum(batch.point_counts[:sample])
    return slice(start, start + batch.point_counts[sample])


def _relabelled(batch: Batch, rows: slice, step: int) -> Batch:
    """A class and an object at random for every labelled superpoint."""
    generator = torch.Generator().manual_seed(step)
    semantic, instance = batch.semantic.clone(), batch.instance.clone()
    ids, place = batch.superpoint[rows].unique(return_inverse=True)
    classes = int(batch.semantic.max()) + 1
    drawn = torch.randint(max(classes, 1), (len(ids),), generator=generator).to(semantic.device)
    semantic[rows] = torch.where(semantic[rows] >= 0, drawn[place], semantic[rows])
    objects = int(instance[rows].max()) + 1
    if objects:
        drawn = torch.randint(objects, (len(ids),), generator=generator).to(instance.device)
        instance[rows] = _contiguous(torch.where(instance[rows] >= 0, drawn[place], instance[rows]))
    return replace(batch, semantic=semantic, instance=instance)


def _contiguous(ids: Tensor) -> Tensor:
    """Renumber the ids ≥ 0 as 0, 1, ... in their order."""
    used = ids[ids >= 0].unique()
    return torch.where(ids >= 0, torch.searchsorted(used, ids.contiguous()), ids) if len(used) else ids
