"""Rendering of a room: depth, normal and colour of every pixel, with a lamp and its shadows.

Legend: H, W image size [px] · P solids · n pixels that see a surface.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.data.synthetic.raycast import cast, entry, image_window, pixel_rays
from bifusion_diag.data.synthetic.solids import SHAPES, Solid
from bifusion_diag.data.synthetic.texture import TEXTURES, Surface

Array = NDArray[Any]


class Rendering(NamedTuple):
    """One view of a room."""

    depth: Array  # (H, W) float32 [m], inf where nothing is hit
    solid: Array  # (H, W) int64, -1 where nothing is hit
    normal: Array  # (H, W, 3) float32 unit surface normal in the world, 0 where nothing is hit
    color: Array  # (H, W, 3) float32 in 0..1


def render(
    solids: Sequence[Solid], light: Array, pose: Array, intrinsics: Array, height: int, width: int, shadow_step: int = 4
) -> Rendering:
    """Depth, solid, normal and colour of every pixel.

    Args:
        solids: P of them; the camera must be outside of all.
        light: (3,) position of the lamp [m].
        pose: (4, 4) camera-to-world.
        intrinsics: (3, 3) [px].
        height: H.
        width: W.
        shadow_step: shadows are cast for every so many pixels and interpolated, which makes them soft and cheap.
    """
    rotation, origin = pose[:3, :3].astype(np.float32), pose[:3, 3]
    directions = pixel_rays(intrinsics, height, width) @ rotation.T
    windows = [image_window(solid, pose, intrinsics, height, width) for solid in solids]
    depth, which = cast(solids, origin, directions, windows)
    seen = which >= 0
    xyz = origin + directions[seen] * depth[seen][:, None]
    normal = np.zeros((height, width, 3), np.float32)
    color = np.zeros((height, width, 3), np.float32)
    normal[seen], albedo = _surface(solids, which[seen], xyz)
    to_light = light - xyz
    distance = np.linalg.norm(to_light, axis=1)
    facing = np.maximum((normal[seen] * to_light).sum(1) / distance, 0)
    lit = _light_reaching(solids, light, origin, directions, depth, shadow_step)[seen]
    color[seen] = albedo * (0.48 + 0.62 * facing * (0.35 + 0.65 * lit) / (1 + 0.03 * distance**2))[:, None]
    return Rendering(depth, which, normal, np.clip(color, 0, 1))


def _light_reaching(
    solids: Sequence[Solid], light: Array, origin: Array, directions: Array, depth: Array, step: int
) -> Array:
    """Share of the lamp's light that reaches each pixel (H, W): 0 in a shadow, 1 outside, soft in between."""
    height, width = depth.shape
    coarse = np.where(np.isfinite(depth), depth, 0)[::step, ::step]
    points = origin + directions[::step, ::step] * coarse[..., None]
    # from the lamp towards the points: they lie at parameter 1, and anything clearly before casts a shadow
    rays = (points - light).astype(np.float32)
    first = np.full(coarse.shape, np.inf, np.float32)
    for solid in solids:
        first = np.minimum(first, entry(solid, light, rays))
    lit = (first > 0.97).astype(np.float32)
    rows = np.minimum(np.arange(height) / step, lit.shape[0] - 1)
    columns = np.minimum(np.arange(width) / step, lit.shape[1] - 1)
    return _bilinear(lit, rows, columns)


def _bilinear(grid: Array, rows: Array, columns: Array) -> Array:
    """(len(rows), len(columns)) values of a grid at all combinations of fractional rows and columns."""
    r, c = rows.astype(int), columns.astype(int)
    below, right = np.minimum(r + 1, grid.shape[0] - 1), np.minimum(c + 1, grid.shape[1] - 1)
    fr, fc = (rows - r)[:, None], columns - c
    top = grid[r][:, c] * (1 - fc) + grid[r][:, right] * fc
    bottom = grid[below][:, c] * (1 - fc) + grid[below][:, right] * fc
    return top * (1 - fr) + bottom * fr


def _surface(solids: Sequence[Solid], which: Array, xyz: Array) -> tuple[Array, Array]:
    """Normals (n, 3) and albedo (n, 3) of surface points ``xyz`` (n, 3) on the solids ``which`` (n,)."""
    half = np.array([solid.half for solid in solids], np.float32)[which]
    centre = np.array([solid.centre for solid in solids])[which]
    yaw = np.array([solid.yaw for solid in solids])[which]
    shape = np.array([SHAPES.index(solid.shape) for solid in solids])[which]
    cos, sin = np.cos(yaw).astype(np.float32), np.sin(yaw).astype(np.float32)
    offset = (xyz - centre).astype(np.float32)
    x, y = cos * offset[:, 0] + sin * offset[:, 1], cos * offset[:, 1] - sin * offset[:, 0]
    local = np.stack([x, y, offset[:, 2]], axis=1)
    unit = local / half
    # the face of a box, or the cap of a cylinder, is where a scaled coordinate is largest
    axis = np.abs(unit).argmax(1)
    axis = np.where(shape == SHAPES.index("cylinder"), _cylinder_axis(unit), axis)
    flat = (shape == SHAPES.index("box")) | ((shape == SHAPES.index("cylinder")) & (axis == 2))
    rows = np.arange(len(which))
    face = np.zeros_like(unit)
    face[rows, axis] = np.sign(unit[rows, axis])
    around = unit / half
    around[shape == SHAPES.index("cylinder"), 2] = 0
    normal = np.where(flat[:, None], face, around)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
    world = np.stack(
        [cos * normal[:, 0] - sin * normal[:, 1], sin * normal[:, 0] + cos * normal[:, 1], normal[:, 2]], axis=1
    )
    u = np.where(flat, np.where(axis == 0, y, x), np.arctan2(y, x) * half[:, 0])
    v = np.where(flat & (axis == 2), y, local[:, 2])
    return world, _albedo(solids, which, u, v)


def _cylinder_axis(unit: Array) -> Array:
    """2 on a cylinder's caps, 0 on its side."""
    return np.where(np.abs(unit[:, 2]) > np.hypot(unit[:, 0], unit[:, 1]), 2, 0)


def _albedo(solids: Sequence[Solid], which: Array, u: Array, v: Array) -> Array:
    """Colour of the material at surface coordinates u, v (n,) [m]: (n, 3) in 0..1."""
    materials = [solid.material for solid in solids]
    kinds = np.array([material.kind for material in materials])[which]
    first = np.array([material.first for material in materials], np.float32)
    second = np.array([material.second for material in materials], np.float32)
    scale = np.array([material.scale for material in materials], np.float32)
    seed = np.array([material.seed for material in materials], np.int64)
    albedo = np.zeros((len(which), 3), np.float32)
    for kind in np.unique(kinds):
        of_kind = kinds == kind
        part = which[of_kind]
        albedo[of_kind] = TEXTURES[str(kind)](
            Surface(u[of_kind], v[of_kind], first[part], second[part], scale[part], seed[part])
        )
    return np.clip(albedo, 0, 1)
