"""Procedural surfaces: colour as a function of two coordinates on the surface.

Legend: n pixels of one kind of material, each with its own parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Surface(NamedTuple):
    """What a texture is given, one row a pixel."""

    u: Array  # (n,) [m] on the surface; for upright surfaces u is level and v points up
    v: Array  # (n,) [m]
    first: Array  # (n, 3) colours in 0..1
    second: Array  # (n, 3)
    scale: Array  # (n,) [m]
    seed: Array  # (n,) int64


def hashed(i: Array, j: Array, seed: Array) -> Array:
    """A number in [0, 1) for every integer cell (i, j) of a material (n,); SplitMix64's finaliser."""
    key = i.astype(np.int64) * 73_856_093 ^ j.astype(np.int64) * 19_349_663 ^ seed.astype(np.int64) * 83_492_791
    x = key.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) / np.float32(2**24)


def value_noise(x: Array, y: Array, seed: Array) -> Array:
    """Smooth noise in [0, 1] with features of size 1 (n,)."""
    i, j = np.floor(x), np.floor(y)
    fx, fy = x - i, y - j
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    bottom = hashed(i, j, seed) * (1 - fx) + hashed(i + 1, j, seed) * fx
    top = hashed(i, j + 1, seed) * (1 - fx) + hashed(i + 1, j + 1, seed) * fx
    return bottom * (1 - fy) + top * fy


def _mix(s: Surface, share: Array) -> Array:
    """``first`` where share is 0, ``second`` where it is 1."""
    return s.first + (s.second - s.first) * share[:, None]


def plain(s: Surface) -> Array:
    """One colour, slightly uneven."""
    return s.first * (0.97 + 0.06 * value_noise(s.u / s.scale, s.v / s.scale, s.seed))[:, None]


def checks(s: Surface) -> Array:
    """Tiles in two colours."""
    return _mix(s, (np.floor(s.u / s.scale) + np.floor(s.v / s.scale)) % 2)


def tiles(s: Surface) -> Array:
    """Tiles of one colour with joints in the other."""
    u, v = s.u / s.scale, s.v / s.scale
    joint = (u - np.floor(u) < 0.05) | (v - np.floor(v) < 0.05)
    shade = 0.92 + 0.16 * hashed(np.floor(u), np.floor(v), s.seed)
    return _mix(s, joint.astype(np.float32)) * shade[:, None]


def stripes(s: Surface) -> Array:
    """Upright stripes."""
    return _mix(s, np.floor(s.u / s.scale) % 2)


def wood(s: Surface) -> Array:
    """Grain along u."""
    grain = value_noise(s.u / (8 * s.scale), s.v / s.scale, s.seed)
    rings = 0.5 + 0.5 * np.sin(2 * np.pi * (s.v / s.scale + 2.5 * grain))
    return _mix(s, 0.6 * rings + 0.4 * value_noise(s.u / s.scale, s.v / (0.2 * s.scale), s.seed))


def planks(s: Surface) -> Array:
    """Floor boards: wood, each board a little different."""
    row = np.floor(s.v / s.scale)
    board = np.floor(s.u / (9 * s.scale) + 0.37 * row)
    tone = hashed(row, board, s.seed)
    joint = (s.v / s.scale - row < 0.04).astype(np.float32)
    grain = value_noise(s.u / (2 * s.scale), s.v / (0.12 * s.scale), s.seed)
    return _mix(s, np.clip(0.65 * tone + 0.35 * grain, 0, 1)) * (1 - 0.5 * joint)[:, None]


def fabric(s: Surface) -> Array:
    """Speckles of two sizes."""
    coarse = value_noise(s.u / s.scale, s.v / s.scale, s.seed)
    fine = value_noise(s.u / (0.12 * s.scale), s.v / (0.12 * s.scale), s.seed + 1)
    return _mix(s, 0.5 * coarse + 0.5 * fine)


def books(s: Surface) -> Array:
    """Spines of changing colour."""
    spine = np.floor(s.u / s.scale)
    tone = np.stack([hashed(spine, np.full_like(spine, k), s.seed) for k in range(3)], axis=1)
    edge = (s.u / s.scale - spine < 0.12).astype(np.float32)
    band = (np.abs(s.v / s.scale % 6 - 4) < 0.4).astype(np.float32)
    colour = 0.1 + 0.75 * tone
    return (colour + (0.9 - colour) * 0.5 * band[:, None]) * (1 - 0.6 * edge)[:, None]


def painting(s: Surface) -> Array:
    """Blots of all colours."""
    channels = [value_noise(s.u / s.scale + 7 * k, s.v / s.scale, s.seed + k) for k in range(3)]
    return 0.5 * _mix(s, channels[0]) + 0.5 * np.stack(channels, axis=1)


def glass(s: Surface) -> Array:
    """A bright outside: sky above, ground below, in soft bands."""
    return _mix(s, np.clip(0.5 + s.v / s.scale + 0.3 * value_noise(s.u / 0.3, s.v / 0.3, s.seed), 0, 1))


def keys(s: Surface) -> Array:
    """Small dark squares with light gaps."""
    u, v = s.u / s.scale, s.v / s.scale
    gap = (u - np.floor(u) < 0.2) | (v - np.floor(v) < 0.2)
    return _mix(s, gap.astype(np.float32))


TEXTURES: dict[str, Callable[[Surface], Array]] = {
    kind.__name__: kind for kind in (plain, checks, tiles, stripes, wood, planks, fabric, books, painting, glass, keys)
}
