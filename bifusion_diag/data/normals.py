"""Surface normals of a point cloud."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree


def estimate_normals(xyz: np.ndarray, viewpoint: np.ndarray, *, neighbours: int = 20) -> np.ndarray:
    """Unit normals by principal components of the nearest neighbours, turned towards the viewpoint.

    Args:
        xyz: (N, 3) finite points [m].
        viewpoint: (3,) or (N, 3), where each point was seen from [m].
        neighbours: points that the plane is fitted to, the point itself included.

    Returns:
        (N, 3) float64. Where the neighbours do not span a plane, the normal is some direction across them.

    Source:
        Hoppe et al., Surface reconstruction from unorganized points, SIGGRAPH 1992, section 3.2.
    """
    points = np.asarray(xyz, dtype=np.float64)
    if len(points) == 0:
        return np.zeros((0, 3))
    _, index = cKDTree(points).query(points, k=min(neighbours, len(points)))
    offsets = points[index.reshape(len(points), -1)] - points[:, None]
    offsets -= offsets.mean(axis=1, keepdims=True)
    normals = smallest_direction(np.einsum("nki,nkj->nij", offsets, offsets))
    away = np.einsum("ni,ni->n", normals, np.broadcast_to(viewpoint, points.shape) - points) < 0
    normals[away] *= -1
    return normals


def smallest_direction(scatter: np.ndarray) -> np.ndarray:
    """Eigenvectors of the smallest eigenvalue of symmetric (..., 3, 3) matrices: (..., 3), sign arbitrary."""
    return np.ascontiguousarray(np.linalg.eigh(scatter)[1][..., 0])
