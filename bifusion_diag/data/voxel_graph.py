"""The occupied voxels of a point cloud and which of them touch: what superpoints and regions grow on."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

_GAP = 2  # two occupied slices of the grid that do not touch stay this far apart, however far they are in metres


@dataclass(frozen=True)
class VoxelGraph:
    """V occupied voxels and their 26-neighbourhood.

    The voxels are ordered by their place in the grid, so nothing here depends on the order of the points.

    Attributes:
        voxel: (N,) int64, the voxel of each point.
        cell: (V, 3) float64 grid coordinates, ``floor(xyz / voxel_size)``; float, as far outliers overflow integers.
        source, target: (E,) int64, every pair of touching voxels in both directions, ordered by ``source``.
    """

    voxel: np.ndarray
    cell: np.ndarray
    source: np.ndarray
    target: np.ndarray

    @property
    def size(self) -> int:
        """V, the number of occupied voxels."""
        return len(self.cell)


def build_voxel_graph(xyz: np.ndarray, voxel_size: float) -> VoxelGraph:
    """Sort points into voxels and link the voxels that share a face, an edge or a corner.

    Args:
        xyz: (N, 3) finite coordinates [m].
        voxel_size: side of a voxel [m].
    """
    cells = np.floor(np.asarray(xyz, dtype=np.float64) / voxel_size)
    slots, extent = _compress(cells)
    strides = np.array([extent[1] * extent[2], extent[2], 1])
    keys, first, voxel = np.unique(slots @ strides, return_index=True, return_inverse=True)
    sources, targets = [], []
    for offset in itertools.product((-1, 0, 1), repeat=3):
        if offset <= (0, 0, 0):  # the other half follows by symmetry
            continue
        neighbour = keys + int(strides @ np.array(offset))
        position = np.minimum(np.searchsorted(keys, neighbour), len(keys) - 1)
        here = np.flatnonzero(keys[position] == neighbour)
        sources += [here, position[here]]
        targets += [position[here], here]
    source, target = np.concatenate(sources), np.concatenate(targets)
    order = np.argsort(source * len(keys) + target)
    return VoxelGraph(voxel.reshape(-1), cells[first], source[order], target[order])


def connected_parts(source: np.ndarray, target: np.ndarray, size: int) -> np.ndarray:
    """(size,) int64 number of the connected part that each node is in, given pairs of nodes that touch."""
    matrix = csr_array((np.ones(len(source), dtype=np.int8), (source, target)), shape=(size, size))
    return connected_components(matrix, directed=False)[1].astype(np.int64)


def _compress(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Small integer coordinates with the same neighbours: empty slices of the grid are closed up to one.

    A point kilometres away would otherwise make the grid too large for 64-bit keys.

    Returns:
        (N, 3) int64 coordinates from 1, and (3,) int64 extents that leave an empty slice at both ends.
    """
    slots, extent = np.empty(cells.shape, dtype=np.int64), np.empty(3, dtype=np.int64)
    for axis in range(3):
        values, inverse = np.unique(cells[:, axis], return_inverse=True)
        steps = np.minimum(np.diff(values), _GAP).astype(np.int64)
        place = 1 + np.concatenate([[0], np.cumsum(steps)])
        slots[:, axis] = place[inverse.reshape(-1)]
        extent[axis] = place[-1] + 2
    return slots, extent
