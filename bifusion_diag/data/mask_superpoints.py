"""Superpoints relabelled by 2D masks.

ESAM makes a superpoint of all points whose pixels lie in one SAM mask, and clusters the points without a mask by their
coordinates. Here VCCS superpoints take the place of that clustering, and a mask that reaches over a depth edge is cut
there, as a superpoint must be connected.

Letters: N points, V voxels, M masks of all frames, P pieces. A *cell* is the part of a voxel's points that lie in one
region; K cells. Masks so cut the cloud at pixels, not at voxels.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array

from bifusion_diag.data.voxel_graph import VoxelGraph, build_voxel_graph, connected_parts

_SMALLEST_SHARE = 0.05  # a piece of less than this share of a seed cell's face (R²) is part of its neighbour


def relabel_by_masks(
    superpoint: np.ndarray,
    xyz: np.ndarray,
    mask: np.ndarray,
    frame: np.ndarray,
    *,
    voxel_size: float,
    seed_size: float,
) -> np.ndarray:
    """Cut superpoints where the masks differ, and join the adjacent pieces of one mask.

    1. A point is in the region of its mask; one without a mask is in that of its superpoint.
    2. Masks of two frames are one region if most of each lies in the other: both fill more than half of the voxels of
       the other in which both frames have masks.
    3. Every connected piece of a region (points in one voxel or in voxels that touch) is a superpoint.
    4. A piece smaller than a twentieth of R² joins the piece that it touches most, if it touches any: such pieces
       lie at the edges of masks that are a pixel or two off their objects.

    The result does not depend on the order of the points, nor on the numbers of masks and frames except in ties.

    Args:
        superpoint: (N,) ids 0..S-1, such as VCCS gives them.
        xyz: (N, 3) finite coordinates [m].
        mask: (N,) int64 mask of each point in its own frame, 0 or less where it is in none.
        frame: (N,) int64 frame that each point is from.
        voxel_size: side of the voxels whose touching makes points adjacent [m].
        seed_size: seed distance R of the superpoints [m].

    Returns:
        (N,) int64 ids 0..S'-1, every one used.
    """
    if len(xyz) == 0:
        return np.zeros(0, dtype=np.int64)
    graph = build_voxel_graph(xyz, voxel_size)
    masked = mask > 0
    region = np.asarray(superpoint, dtype=np.int64).copy()
    region[masked] = region.max() + 1 + _shared_masks(graph.voxel[masked], mask[masked], frame[masked], graph.size)
    count = int(region.max()) + 1
    keys, cell, points = np.unique(graph.voxel * count + region, return_inverse=True, return_counts=True)
    voxel, region = keys // count, keys % count
    source, target = _touching_cells(graph, voxel)
    same = region[source] == region[target]
    piece = connected_parts(source[same], target[same], len(keys))
    area = np.bincount(piece, points / np.bincount(graph.voxel)[voxel])  # in voxels, so free of the points' density
    large = area >= _SMALLEST_SHARE * (seed_size / voxel_size) ** 2
    piece = _owners(piece[source], piece[target], area, large)[piece]
    return np.unique(piece, return_inverse=True)[1].reshape(-1)[cell.reshape(-1)].astype(np.int64)


def replace_by_ids(superpoint: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Put given superpoints in the place of others, as they are; points without one keep what they had.

    Args:
        superpoint: (N,) ids 0..S-1.
        ids: (N,) int64 given ids, negative where there is none.

    Returns:
        (N,) int64 ids 0..S'-1, every one used.
    """
    given = ids >= 0
    known = np.unique(ids[given], return_inverse=True)[1].reshape(-1)
    mixed = np.asarray(superpoint, dtype=np.int64) + len(known)
    mixed[given] = known
    return np.unique(mixed, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _shared_masks(voxel: np.ndarray, mask: np.ndarray, frame: np.ndarray, voxels: int) -> np.ndarray:
    """(N,) int64 ids from 0 of masks that are one across frames, for points that all have a mask."""
    if len(mask) == 0:
        return np.zeros(0, dtype=np.int64)
    numbers, mask = np.unique(mask, return_inverse=True)
    used, frame = np.unique(frame, return_inverse=True)
    keys, ids = np.unique(frame * len(numbers) + mask, return_inverse=True)
    count, frames = len(keys), keys // len(numbers)
    in_mask = _occurrence(ids, voxel, (count, voxels))
    in_frame = _occurrence(frame, voxel, (len(used), voxels))
    common = (in_mask @ in_mask.T).tocoo()  # voxels that two masks share
    overlap = (in_mask @ in_frame.T).toarray()  # voxels of a mask where a frame has any mask: (M, frames)
    one, other = common.coords
    most = 2 * common.data > np.maximum(overlap[one, frames[other]], overlap[other, frames[one]])
    joined = most & (frames[one] != frames[other])
    return connected_parts(one[joined], other[joined], count)[ids]


def _occurrence(row: np.ndarray, column: np.ndarray, shape: tuple[int, int]) -> csr_array:
    """A table that is 1 where a pair occurs, however often."""
    pairs = np.unique(row * shape[1] + column)
    return csr_array((np.ones(len(pairs), dtype=np.int64), (pairs // shape[1], pairs % shape[1])), shape=shape)


def _touching_cells(graph: VoxelGraph, voxel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(E,), (E,): cells of one voxel or of voxels that touch, in both directions; `voxel` (K,) ascends."""
    count = np.bincount(voxel, minlength=graph.size)
    start = np.cumsum(count) - count
    several = np.flatnonzero(count > 1)
    one, other = np.concatenate([graph.source, several]), np.concatenate([graph.target, several])
    pairs = count[one] * count[other]
    within = np.arange(pairs.sum()) - np.repeat(np.cumsum(pairs) - pairs, pairs)
    width = np.repeat(count[other], pairs)
    return np.repeat(start[one], pairs) + within // width, np.repeat(start[other], pairs) + within % width


def _owners(source: np.ndarray, target: np.ndarray, area: np.ndarray, large: np.ndarray) -> np.ndarray:
    """(P,) the piece that each piece becomes part of, itself if it stays.

    Args:
        source: (E,) pieces of touching cells.
        target: (E,) likewise.
        area: (P,).
        large: (P,) bool, pieces that stay. Where small ones touch nothing large, the largest of them stays.
    """
    count = len(area)
    touching = source != target
    one, other, strength = _summed(source[touching], target[touching], np.ones(int(touching.sum())), count)
    cluster = connected_parts(one, other, count)
    order = np.lexsort((np.arange(count), -area, ~large, cluster))
    keep = large.copy()
    keep[order[np.unique(cluster[order], return_index=True)[1]]] = True
    owner = np.where(keep, np.arange(count), -1)
    while (owner < 0).any():
        claimed = (owner[one] < 0) & (owner[other] >= 0)
        small, claim, contacts = _summed(one[claimed], owner[other[claimed]], strength[claimed], count)
        order = np.lexsort((claim, -contacts, small))
        first = order[np.unique(small[order], return_index=True)[1]]
        owner[small[first]] = claim[first]
    return owner


def _summed(
    row: np.ndarray, column: np.ndarray, value: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each pair of indices below `count` once, with the sum of its values."""
    table = csr_array((value, (row, column)), shape=(count, count))
    table.sum_duplicates()
    pairs = table.tocoo()
    return pairs.coords[0], pairs.coords[1], pairs.data
