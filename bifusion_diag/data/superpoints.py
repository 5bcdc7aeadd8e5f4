"""Superpoints: Voxel Cloud Connectivity Segmentation (VCCS; Papon et al., CVPR 2013).

Letters: N points, V occupied voxels, E directed pairs of touching voxels, S superpoints.

The distance of a voxel to a superpoint's centre is that of the paper's equation 3,

    D² = w_s · |Δxyz|² / (3 R²) + w_c · |ΔLab|² / m² + w_n · sin²∠(n, n')

with R the seed distance. Two choices differ from the paper: normals stand for FPFH histograms, as in the Point Cloud
Library, and they enter as n nᵀ (½‖n nᵀ − n' n'ᵀ‖² = sin²), which needs no orientation. D is then Euclidean in twelve
features, and a centre is the plain mean of its voxels.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array

from bifusion_diag.data.normals import smallest_direction
from bifusion_diag.data.voxel_graph import VoxelGraph, build_voxel_graph, connected_parts
from bifusion_diag.errors import UserError

_SPACE_WEIGHT, _COLOUR_WEIGHT, _NORMAL_WEIGHT = 0.4, 0.4, 1.0
_LAB_SCALE = 50.0  # m of equation 3: black to white is 100
_ITERATIONS = 3  # the paper lets the centres settle for five; the partition hardly moves after the second
_GROWTH = 1.8  # voxels are searched to this many seed distances from the seed (Point Cloud Library)
_SEED_SHARE = 0.05  # a seed needs this share of the voxels of a plane through its cell (Papon, section 3.2)
_FIXED_POINT = 2.0**20  # means are taken over integers: sums are exact, so the order of the points cannot matter


def vccs(
    xyz: np.ndarray, rgb: np.ndarray, normals: np.ndarray | None = None, *, voxel_size: float, seed_size: float
) -> np.ndarray:
    """Group points into superpoints of similar colour and normal.

    A superpoint is connected: its voxels touch each other by faces, edges or corners, so it never bridges a gap. Every
    connected part of the cloud, however small, has at least one superpoint of its own. The result does not depend on
    the order of the points.

    Args:
        xyz: (N, 3) coordinates [m].
        rgb: (N, 3) colours, 0..255; values outside are clipped.
        normals: (N, 3) unit normals of either sign, or None to take them from the voxels around.
        voxel_size: side of a voxel [m].
        seed_size: distance of the seeds, R [m]; a superpoint reaches at most about √3 R from its centre.

    Returns:
        (N,) int64 superpoint ids 0..S-1, every one used.

    Raises:
        UserError: points or normals that are not finite, or sizes that do not fit together.
    """
    if not 0 < voxel_size <= seed_size:
        raise UserError(
            f"superpoints: the voxel size ({voxel_size} m) must be positive and at most the seed size ({seed_size} m)"
        )
    for name, values in (("points", xyz), ("normals", normals)):
        if values is not None and not np.isfinite(values).all():
            raise UserError(f"superpoints: some {name} are not finite; drop them before the clustering")
    if len(xyz) == 0:
        return np.zeros(0, dtype=np.int64)
    graph = build_voxel_graph(xyz, voxel_size)
    features = _voxel_features(graph, xyz, rgb, normals, voxel_size, seed_size)
    seeds = _seed_voxels(graph, voxel_size, seed_size)
    rounds = int(np.ceil(_GROWTH * seed_size / voxel_size))
    neighbours = _Neighbours(graph)
    label = _grow(neighbours, features, seeds, features[seeds], rounds)
    for _ in range(_ITERATIONS - 1):
        centre = _means(features, label, len(seeds))
        seeds = _nearest_to_centre(features, label, centre)
        label = _grow(neighbours, features, seeds, centre, rounds)
    label = _fill(neighbours, features, _largest_part(graph, label), centre)
    return np.unique(label, return_inverse=True)[1].reshape(-1)[graph.voxel].astype(np.int64)


class _Neighbours:
    """Touching voxels by voxel, for many voxels at once."""

    def __init__(self, graph: VoxelGraph) -> None:
        self._target = graph.target
        self._count = np.bincount(graph.source, minlength=graph.size)
        self._start = np.cumsum(self._count) - self._count

    def of(self, voxels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(K,), (K,): each of the voxels as often as it has neighbours, and those neighbours."""
        count = self._count[voxels]
        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        return np.repeat(voxels, count), self._target[np.repeat(self._start[voxels], count) + within]


def _voxel_features(
    graph: VoxelGraph, xyz: np.ndarray, rgb: np.ndarray, normals: np.ndarray | None, voxel_size: float, seed_size: float
) -> np.ndarray:
    """(V, 12) float64: scaled xyz, Lab and n nᵀ, in which the distance of the module's docstring is Euclidean."""
    within = np.asarray(xyz, dtype=np.float64) / voxel_size - graph.cell[graph.voxel]
    centre = (graph.cell + _exact_means(within, graph)) * voxel_size
    lab = _lab(_exact_means(np.clip(np.nan_to_num(np.asarray(rgb, dtype=np.float64)), 0, 255), graph))
    if normals is None:
        direction = _voxel_normals(graph, centre)
        outer = direction[:, :, None] * direction[:, None, :]
    else:
        directions = np.asarray(normals, dtype=np.float64)
        products = (directions[:, :, None] * directions[:, None, :]).reshape(-1, 9)
        outer = _exact_means(products, graph).reshape(-1, 3, 3)
    diagonal, above = outer[:, [0, 1, 2], [0, 1, 2]], outer[:, [0, 0, 1], [1, 2, 2]]
    return np.hstack(
        [
            centre * np.sqrt(_SPACE_WEIGHT / 3) / seed_size,
            lab * np.sqrt(_COLOUR_WEIGHT) / _LAB_SCALE,
            diagonal * np.sqrt(_NORMAL_WEIGHT / 2),
            above * np.sqrt(_NORMAL_WEIGHT),
        ]
    )


def _exact_means(values: np.ndarray, graph: VoxelGraph) -> np.ndarray:
    """(V, C) means of (N, C) values over the points of each voxel, the same for every order of the points."""
    whole = np.round(values * _FIXED_POINT)
    sums = [np.bincount(graph.voxel, column, minlength=graph.size) for column in whole.T]
    return np.stack(sums, axis=1) / np.bincount(graph.voxel, minlength=graph.size)[:, None] / _FIXED_POINT


def _means(features: np.ndarray, label: np.ndarray, count: int) -> np.ndarray:
    """(S, C) means of the features of each label; -1 is nobody's. Every label must occur."""
    held = label >= 0
    sums = [np.bincount(label[held], column[held], minlength=count) for column in features.T]
    return np.stack(sums, axis=1) / np.bincount(label[held], minlength=count)[:, None]


def _voxel_normals(graph: VoxelGraph, centre: np.ndarray) -> np.ndarray:
    """(V, 3) normals of the plane through each voxel and the voxels that touch it."""
    offset = centre[graph.target] - centre[graph.source]
    adjacency = csr_array(
        (np.ones(len(graph.source)), (graph.source, np.arange(len(graph.source)))), (graph.size, len(offset))
    )
    count = np.bincount(graph.source, minlength=graph.size) + 1  # the voxel itself has offset zero
    mean = adjacency @ offset / count[:, None]
    products = (offset[:, :, None] * offset[:, None, :]).reshape(-1, 9)
    second = (adjacency @ products / count[:, None]).reshape(-1, 3, 3)
    return smallest_direction(second - mean[:, :, None] * mean[:, None, :])


def _lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of sRGB colours 0..255; L is 0..100."""
    value = rgb / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
    ratio = linear @ to_xyz.T / to_xyz.sum(axis=1)
    x, y, z = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def _seed_voxels(graph: VoxelGraph, voxel_size: float, seed_size: float) -> np.ndarray:
    """(S,) voxels to grow from: one in every connected fragment of the cloud within a cell of the seed grid.

    Where a cell cuts several sheets (both faces of a board, say), each gets a seed, else one of them might lie
    unclaimed far from all seeds. A fragment of too few voxels gets none if it touches one that is large enough.
    """
    cell = np.floor((graph.cell + 0.5) * voxel_size / seed_size)
    cell_id = np.unique(cell, axis=0, return_inverse=True)[1].reshape(-1)
    inside = cell_id[graph.source] == cell_id[graph.target]
    fragment = connected_parts(graph.source[inside], graph.target[inside], graph.size)
    size = np.bincount(fragment)
    large = size >= _SEED_SHARE * (seed_size / voxel_size) ** 2
    reached = np.zeros(len(size), dtype=bool)
    reached[fragment[graph.target[large[fragment[graph.source]]]]] = True
    seeded = large | ~reached
    middle = _means(graph.cell, fragment, len(size))
    return _nearest_to_centre(graph.cell, np.where(seeded[fragment], fragment, -1), middle)


def _nearest_to_centre(features: np.ndarray, label: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The voxel of each label that is nearest to the label's centre, ordered by label; label -1 is nobody's."""
    held = np.flatnonzero(label >= 0)
    distance = np.square(features[held] - centre[label[held]]).sum(axis=1)
    order = np.lexsort((held, distance, label[held]))
    _, first = np.unique(label[held][order], return_index=True)
    return held[order[first]]


def _grow(
    neighbours: _Neighbours, features: np.ndarray, seeds: np.ndarray, centre: np.ndarray, rounds: int
) -> np.ndarray:
    """Let all superpoints grow at once from their seeds through touching voxels (Papon, section 3.4).

    A voxel changes to a superpoint that reaches it if it is nearer to that one's centre. A superpoint keeps to √3 R of
    its centre.

    Returns:
        (V,) int64 labels, -1 where no superpoint came.
    """
    label = np.full(len(features), -1, dtype=np.int64)
    nearest = np.full(len(features), np.inf)
    label[seeds] = np.arange(len(seeds))
    nearest[seeds] = -1.0  # a seed stays its own
    frontier = seeds
    for _ in range(rounds):
        source, voxel = neighbours.of(frontier)
        rival = label[source] != label[voxel]
        claim, voxel = label[source[rival]], voxel[rival]
        distance, space = _distances(features, voxel, centre, claim)
        better = (distance < nearest[voxel]) & (space <= _SPACE_WEIGHT)
        frontier, winner = _first_by_voxel(voxel[better], distance[better], claim[better])
        if len(frontier) == 0:
            break
        label[frontier], nearest[frontier] = claim[better][winner], distance[better][winner]
    return label


def _fill(neighbours: _Neighbours, features: np.ndarray, label: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Give every voxel without a superpoint to the nearest one that touches it, from the borders inwards."""
    label = label.copy()
    waiting = np.flatnonzero(label < 0)
    while len(waiting):
        voxel, beside = neighbours.of(waiting)
        touching = label[beside] >= 0
        voxel, claim = voxel[touching], label[beside[touching]]
        distance, _ = _distances(features, voxel, centre, claim)
        filled, winner = _first_by_voxel(voxel, distance, claim)
        assert len(filled), "a connected part of the cloud has no superpoint"
        label[filled] = claim[winner]
        waiting = waiting[label[waiting] < 0]
    return label


def _distances(
    features: np.ndarray, voxel: np.ndarray, centre: np.ndarray, claim: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(K,), (K,): squared distances D² of voxels to the centres that claim them, and the part of it that is space."""
    offset = features[voxel] - centre[claim]
    return np.einsum("kc,kc->k", offset, offset), np.einsum("kc,kc->k", offset[:, :3], offset[:, :3])


def _first_by_voxel(voxel: np.ndarray, distance: np.ndarray, claim: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each voxel once, with the position of its nearest claim (ties: the lower label)."""
    order = np.lexsort((claim, distance, voxel))
    unique, first = np.unique(voxel[order], return_index=True)
    return unique, order[first]


def _largest_part(graph: VoxelGraph, label: np.ndarray) -> np.ndarray:
    """Keep of each superpoint its largest connected part: a voxel taken by a rival may have been a bridge."""
    same = (label[graph.source] == label[graph.target]) & (label[graph.source] >= 0)
    part = connected_parts(graph.source[same], graph.target[same], graph.size)
    size = np.bincount(part)[part]
    held = np.flatnonzero(label >= 0)
    order = held[np.lexsort((part[held], -size[held], label[held]))]
    _, first = np.unique(label[order], return_index=True)
    kept = np.isin(part, part[order[first]])
    return np.where(kept, label, -1)
