"""Geometric pseudo-labels for frames without ground truth.

They let an unlabelled capture drive every loss term with plausible numbers and sizes of objects. They are not ground
truth: a class here is a statement about geometry (see :func:`pseudo_labels`), and agreement with it is not accuracy.

Everything is decided per superpoint ("patch" below); P patches, E pairs of touching patches.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from bifusion_diag.data.scannet200 import class_id
from bifusion_diag.data.voxel_graph import VoxelGraph, build_voxel_graph

_VOXEL = 0.04  # [m] patches touch if their voxels do; also the unit of area
_PLANE_ANGLE, _PLANE_DISTANCE = np.cos(np.radians(15)), 0.05  # a patch fits a plane: angle of normals, distance [m]
_PLANE_AREA, _PLANES = 0.3, 16  # smallest plane [m²], and how many are looked for
_HYPOTHESES = 512  # the largest patches are tried as planes
_LEVEL, _UPRIGHT = np.cos(np.radians(15)), np.sin(np.radians(15))  # |normal · up| of horizontal and of vertical planes
_EDGE, _EDGE_SHARE = 0.15, 0.05  # [m] and share: what is left of the scene beyond the outermost planes
_BELOW_CAMERA, _ABOVE_CAMERA = 0.7, 0.3  # [m] a floor is at least so far below the camera, a ceiling so far above
_WALL_HEIGHT = 0.8  # [m]
_FLAT = np.cos(np.radians(12))  # patches that bend less than this belong together even if the bend is concave
_FURNITURE = 1.0  # [m] diameter, about its centre, from which a region is furniture


class PseudoLabels(NamedTuple):
    """Labels of N points: ScanNet200 class ids and instance ids from 0, both -1 where nothing is said."""

    semantic: np.ndarray
    instance: np.ndarray


class _Patches(NamedTuple):
    """Superpoints as flat patches: centre (P, 3) [m], unit normal (P, 3), area (P,) [m²], height of ends (P,) [m]."""

    centre: np.ndarray
    normal: np.ndarray
    area: np.ndarray
    low: np.ndarray
    high: np.ndarray


def pseudo_labels(
    xyz: np.ndarray,
    normals: np.ndarray,
    superpoint: np.ndarray,
    *,
    up_hint: np.ndarray,
    viewpoint: np.ndarray,
    min_points: int = 100,
) -> PseudoLabels:
    """Label the walls, floor and ceiling of a scene, and its other connected regions as instances.

    1. Up is where :func:`estimate_up` turns the hint.
    2. Planes grow over patches of like normal and small distance. A horizontal one is *floor* if almost nothing lies
       below it and it is well below the camera, *ceiling* if almost nothing lies above it and it is above the camera; a
       vertical one is a *wall* if it is tall and almost nothing lies behind it. They are stuff: instance -1.
    3. What is left grows into regions of touching patches: across patches of one plane and across convex or flat edges,
       but not across concave ones, where objects rest on others (Stein et al., Object partitioning using local
       convexity, CVPR 2014). Regions of `min_points` or more are instances: *furniture* if about 1 m across or more,
       else *object*. Smaller ones are left unlabelled.

    Args:
        xyz: (N, 3) points [m].
        normals: (N, 3) unit normals, turned towards the camera.
        superpoint: (N,) ids 0..P-1, every one used.
        up_hint: (3,) rough direction of up, such as the camera's.
        viewpoint: (3,) position of the camera, of several their mean [m].
        min_points: smallest instance.
    """
    if len(xyz) == 0:
        return PseudoLabels(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    points, directions = np.asarray(xyz, dtype=np.float64), np.asarray(normals, dtype=np.float64)
    graph = build_voxel_graph(points, _VOXEL)
    held = csr_array((np.ones(len(points)), (graph.voxel, superpoint)))  # (V, P) points of each patch in each voxel
    area = np.bincount(held.indices) * _VOXEL**2
    mean_normal = _unit(_sums(directions, superpoint))
    up = estimate_up(mean_normal, area, up_hint)
    patches = _make_patches(points, superpoint, mean_normal, area, up)
    plane = _grow_planes(patches)
    structure = _structure(patches, plane, up, float(viewpoint @ up))
    region = _grow_regions(patches, plane, structure < 0, _touching_patches(held, graph))
    return _number(points, structure, region, superpoint, min_points)


def estimate_up(normals: np.ndarray, weight: np.ndarray, hint: np.ndarray) -> np.ndarray:
    """The direction that most surfaces are parallel or perpendicular to, near the hint.

    Args:
        normals: (P, 3) unit normals.
        weight: (P,) their weights.
        hint: (3,) a direction within about 45° of up.

    Returns:
        (3,) unit vector; the hint itself, normalised, if no surface speaks for or against it.

    Source:
        Gupta et al., Perceptual organization and recognition of indoor scenes, CVPR 2013, section 4.1 (gravity).
    """
    up = _unit(np.asarray(hint, dtype=np.float64))
    for angle in [np.radians(45)] * 5 + [np.radians(15)] * 5:
        along = np.abs(normals @ up)
        level, upright = along > np.cos(angle), along < np.sin(angle)
        sign = np.where(level, -1.0, np.where(upright, 1.0, 0.0)) * weight
        scatter = np.einsum("p,pi,pj->ij", sign, normals, normals)
        if not scatter.any():
            break
        candidate = np.linalg.eigh(scatter)[1][:, 0]
        up = candidate if candidate @ hint > 0 else -candidate
    return up


def _sums(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """(P, C) sums of (N, C) values by index."""
    return np.stack([np.bincount(index, column) for column in values.T], axis=1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _make_patches(
    xyz: np.ndarray, superpoint: np.ndarray, normal: np.ndarray, area: np.ndarray, up: np.ndarray
) -> _Patches:
    height = xyz @ up
    low, high = np.full(len(area), np.inf), np.full(len(area), -np.inf)
    np.minimum.at(low, superpoint, height)
    np.maximum.at(high, superpoint, height)
    centre = _sums(xyz, superpoint) / np.bincount(superpoint)[:, None]
    return _Patches(centre, normal, area, low, high)


def _grow_planes(patches: _Patches) -> np.ndarray:
    """(P,) number of the plane that a patch belongs to, largest first; -1 for none.

    Every one of the largest patches is tried as the seed of a plane, the best seed's plane is fitted again to what it
    gathered, and its patches are taken out before the next: RANSAC with all hypotheses instead of random ones.
    """
    plane = np.full(len(patches.area), -1, dtype=np.int64)
    seeds = np.argsort(-patches.area, kind="stable")[:_HYPOTHESES]
    fits = _fits(patches, patches.normal[seeds], patches.centre[seeds])
    for number in range(_PLANES):
        free = plane < 0
        best = int(np.argmax(np.where(free[seeds], fits @ (patches.area * free), -1.0)))
        members = fits[best] & free
        if members.any():
            normal, centre = _fit(patches, members, patches.normal[seeds[best]])
            members = _fits(patches, normal[None], centre[None])[0] & free
        if patches.area[members].sum() < _PLANE_AREA:
            break
        plane[members] = number
    return plane


def _fit(patches: _Patches, members: np.ndarray, side: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit normal (3,) and centre (3,) of the plane through patches; normals are first turned to `side` (3,)."""
    weight = patches.area[members, None]
    normal = patches.normal[members]
    turned = np.where(normal @ side < 0, -1.0, 1.0)[:, None] * normal
    return _unit((weight * turned).sum(axis=0)), (weight * patches.centre[members]).sum(axis=0) / weight.sum()


def _fits(patches: _Patches, normal: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """(H, P) whether each patch fits each of H planes, given by normals (H, 3) and points on them (H, 3)."""
    distance = normal @ patches.centre.T - np.einsum("hi,hi->h", normal, centre)[:, None]
    return (np.abs(distance) < _PLANE_DISTANCE) & (np.abs(normal @ patches.normal.T) > _PLANE_ANGLE)


def _structure(patches: _Patches, plane: np.ndarray, up: np.ndarray, camera: float) -> np.ndarray:
    """(P,) class id of patches of floor, ceiling and walls; -1 elsewhere. `camera` is the camera's height [m]."""
    structure = np.full(len(plane), -1, dtype=np.int64)
    total = patches.area.sum()
    for number in range(plane.max() + 1):
        members = plane == number
        normal, centre = _fit(patches, members, patches.normal[members][np.argmax(patches.area[members])])
        height = centre @ up
        level = patches.centre @ up - height
        if abs(normal @ up) > _LEVEL:
            if patches.area[level < -_EDGE].sum() < _EDGE_SHARE * total and camera - height > _BELOW_CAMERA:
                structure[members] = class_id("floor")
            elif patches.area[level > _EDGE].sum() < _EDGE_SHARE * total and height - camera > _ABOVE_CAMERA:
                structure[members] = class_id("ceiling")
        elif abs(normal @ up) < _UPRIGHT:
            behind = (patches.centre - centre) @ normal < -_EDGE
            tall = patches.high[members].max() - patches.low[members].min() > _WALL_HEIGHT
            if tall and patches.area[behind].sum() < _EDGE_SHARE * total:
                structure[members] = class_id("wall")
    return structure


def _touching_patches(held: csr_array, graph: VoxelGraph) -> np.ndarray:
    """(E, 2) pairs of different patches that have points in the same or in touching voxels; `held` is (V, P)."""
    near = csr_array((np.ones(len(graph.source)), (graph.source, graph.target)), shape=(graph.size, graph.size))
    pairs = (held.T @ held + held.T @ (near @ held)).tocoo()
    once = pairs.row < pairs.col
    return np.stack([pairs.row[once], pairs.col[once]], axis=1)


def _grow_regions(patches: _Patches, plane: np.ndarray, free: np.ndarray, touching: np.ndarray) -> np.ndarray:
    """(P,) number of the region that each patch is in; patches that are not free stay alone."""
    one, other = touching[free[touching].all(axis=1)].T
    along = patches.centre[one] - patches.centre[other]
    # normals that point apart along the line between the centres: a convex edge
    convex = np.einsum("ei,ei->e", patches.normal[one] - patches.normal[other], along) > 0
    flat = np.einsum("ei,ei->e", patches.normal[one], patches.normal[other]) > _FLAT
    same_plane = (plane[one] == plane[other]) & (plane[one] >= 0)
    joined = same_plane | convex | flat
    size = len(plane)
    matrix = csr_array((np.ones(joined.sum(), dtype=np.int8), (one[joined], other[joined])), shape=(size, size))
    return connected_components(matrix, directed=False)[1].astype(np.int64)


def _number(
    xyz: np.ndarray, structure: np.ndarray, region: np.ndarray, superpoint: np.ndarray, min_points: int
) -> PseudoLabels:
    """Spread the decisions over the points and number the instances from 0, largest first."""
    semantic = structure[superpoint]
    instance = np.full(len(xyz), -1, dtype=np.int64)
    loose = np.flatnonzero(semantic < 0)
    point_region = region[superpoint[loose]]
    size = np.bincount(point_region, minlength=len(structure))
    largest_first = np.argsort(-size, kind="stable")
    kept = largest_first[size[largest_first] >= min_points]
    for number, which in enumerate(kept):
        members = loose[point_region == which]
        diameter = 2 * np.linalg.norm(xyz[members] - xyz[members].mean(axis=0), axis=1).max()
        semantic[members] = class_id("furniture" if diameter > _FURNITURE else "object")
        instance[members] = number
    return PseudoLabels(semantic, instance)
