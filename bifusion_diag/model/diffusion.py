"""Semantics for points that have none: those of the nearest superpoint that has some (document 003, part 8).

Legend: N points of a scene · S superpoints of a scene.
"""

from __future__ import annotations

import torch
from scipy.spatial import cKDTree
from torch import Tensor

from bifusion_diag.model.segments import segment_mean


def diffuse_semantics(labels: Tensor, coords: Tensor, superpoint: Tensor, superpoints: int, radius: float) -> Tensor:
    """Give every point without a label that of the nearest labelled superpoint.

    A superpoint is labelled if one of its points is, and has the label of the first of them; its place is the centre of
    its points. On the CPU.

    Args:
        labels: (N,) int64, -1 = none. All points of a superpoint have one label, or masks label them one by one.
        coords: (N, 3) finite coordinates [m].
        superpoint: (N,) int64 within the scene.
        superpoints: S.
        radius: farthest distance between a point and the superpoint's centre [m]; 0 leaves all labels as they are.

    Returns:
        (N,) int64, -1 where no labelled superpoint is near enough: background.
    """
    without = (labels < 0).nonzero()[:, 0]
    labelled = (labels >= 0).nonzero()[:, 0]
    if radius == 0 or not len(without) or not len(labelled):
        return labels
    n = len(labels)
    first = labels.new_full((superpoints,), n).scatter_reduce(
        0, superpoint.index_select(0, labelled), labelled, "amin", include_self=True
    )
    sources = (first < n).nonzero()[:, 0]
    centres = segment_mean(coords, superpoint, superpoints).index_select(0, sources)
    tree = cKDTree(centres.cpu().numpy())
    _, nearest = tree.query(coords.index_select(0, without).cpu().numpy(), distance_upper_bound=radius)
    source_labels = labels.index_select(0, first.index_select(0, sources))
    known = torch.cat([source_labels, labels.new_full((1,), -1)])  # the tree answers "none" with one past the end
    found = known.index_select(0, torch.from_numpy(nearest).to(labels.device))
    return labels.index_copy(0, without, found)
