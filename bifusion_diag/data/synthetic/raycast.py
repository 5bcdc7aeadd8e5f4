"""Ray casting of solids: how far every pixel sees, and what.

Legend: H, W image size [px] · P solids. Rays have z = 1 in the camera's frame, so the ray
parameter is the depth along the optical axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.data.synthetic.solids import Solid

Array = NDArray[Any]
NEAR = 0.05  # [m] nothing nearer than this is seen


class Hits(NamedTuple):
    """What each pixel sees."""

    depth: Array  # (H, W) float32 z along the optical axis [m], inf where nothing is hit
    solid: Array  # (H, W) int64 which solid, -1 where nothing is hit


def pixel_rays(intrinsics: Array, height: int, width: int) -> Array:
    """(H, W, 3) float32 directions in the camera's frame, z = 1, through the pixel centres."""
    v, u = np.mgrid[:height, :width].astype(np.float32)
    x = (u - intrinsics[0, 2]) / intrinsics[0, 0]
    y = (v - intrinsics[1, 2]) / intrinsics[1, 1]
    return np.stack([x, y, np.ones_like(x)], axis=-1).astype(np.float32)


def cast(solids: Sequence[Solid], origin: Array, directions: Array, windows: Sequence[tuple[slice, slice]]) -> Hits:
    """Nearest surface along rays that share an origin.

    Args:
        solids: P of them; the origin must be outside of all.
        origin: (3,) world [m].
        directions: (H, W, 3) float32 world.
        windows: for each solid the part of the image that can see it.
    """
    depth = np.full(directions.shape[:2], np.inf, np.float32)
    which = np.full(directions.shape[:2], -1, np.int64)
    for number, (solid, window) in enumerate(zip(solids, windows, strict=True)):
        if window[0].start >= window[0].stop or window[1].start >= window[1].stop:
            continue
        reached = entry(solid, origin, directions[window])
        nearer = reached < depth[window]
        depth[window][nearer] = reached[nearer]
        which[window][nearer] = number
    return Hits(depth, which)


def entry(solid: Solid, origin: Array, directions: Array) -> Array:
    """Ray parameter at which rays enter a solid (H, W), inf for those that miss it."""
    half = np.asarray(solid.half, np.float32)
    cos, sin = np.float32(np.cos(solid.yaw)), np.float32(np.sin(solid.yaw))
    ox, oy, oz = (origin - np.asarray(solid.centre)).astype(np.float32)
    # in the solid's own frame, scaled so that its half extents are 1
    start = ((cos * ox + sin * oy) / half[0], (cos * oy - sin * ox) / half[1], oz / half[2])
    dx, dy, dz = directions[..., 0], directions[..., 1], directions[..., 2]
    heading = ((cos * dx + sin * dy) / half[0], (cos * dy - sin * dx) / half[1], dz / half[2])
    if solid.shape == "box":
        spans = [_slab(o, d) for o, d in zip(start, heading, strict=True)]
    elif solid.shape == "cylinder":
        spans = [_ball(start[:2], heading[:2]), _slab(start[2], heading[2])]
    else:
        spans = [_ball(start, heading)]
    first, last = spans[0]
    for enter, leave in spans[1:]:
        first, last = np.maximum(first, enter), np.minimum(last, leave)
    return np.where((first < last) & (first > NEAR), first, np.float32(np.inf))


def _slab(o: np.float32, d: Array) -> tuple[Array, Array]:
    """Where rays o + t·d are between −1 and 1."""
    inverse = 1 / np.where(np.abs(d) < 1e-9, np.float32(1e-9), d)
    one, other = (-1 - o) * inverse, (1 - o) * inverse
    return np.minimum(one, other), np.maximum(one, other)


def _ball(start: Sequence[np.float32], heading: Sequence[Array]) -> tuple[Array, Array]:
    """Where rays are inside the unit circle or sphere; an empty span (inf, −inf) for those that miss it."""
    a = sum(d * d for d in heading) + np.float32(1e-12)
    b = sum(o * d for o, d in zip(start, heading, strict=True))
    c = sum(o * o for o in start) - np.float32(1)
    discriminant = b * b - a * c
    root = np.sqrt(np.maximum(discriminant, 0))
    hit = discriminant > 0
    return np.where(hit, (-b - root) / a, np.inf), np.where(hit, (-b + root) / a, -np.inf)


def image_window(solid: Solid, pose: Array, intrinsics: Array, height: int, width: int) -> tuple[slice, slice]:
    """The part of the image (rows, columns) that can see a solid: the bounding rectangle of its projected corners.

    The whole image where the solid reaches behind the camera, an empty window where all of it lies behind.
    """
    signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T
    local = signs * np.asarray(solid.half)
    cos, sin = np.cos(solid.yaw), np.sin(solid.yaw)
    world = local @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]]) + np.asarray(solid.centre)
    x, y, z = ((world - pose[:3, 3]) @ pose[:3, :3]).T
    if (z < NEAR).all():
        return slice(0, 0), slice(0, 0)
    if (z < NEAR).any():
        return slice(0, height), slice(0, width)
    u = intrinsics[0, 0] * x / z + intrinsics[0, 2]
    v = intrinsics[1, 1] * y / z + intrinsics[1, 2]
    return _clip(v.min(), v.max(), height), _clip(u.min(), u.max(), width)


def _clip(low: float, high: float, size: int) -> slice:
    return slice(int(np.clip(np.floor(low), 0, size)), int(np.clip(np.ceil(high) + 1, 0, size)))
