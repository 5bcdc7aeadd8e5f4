"""Augmentation of point coordinates as in ESAM: flips, rotation, scale, shift and elastic distortion."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bifusion_diag.config.settings import AugmentSettings

#: ESAM counts the elastic distortion in voxels of this size [m].
VOXEL = 0.02
#: (granularity, magnitude) of the two elastic passes [voxels]. As in the code of SparseConvNet that ESAM follows, the
#: nodes of the noise grid are two granularities apart.
ELASTIC_PASSES = ((6.0, 40.0), (20.0, 160.0))
#: The noise grid reaches at most this far from the median point [m], so its size is bounded: (2·10 / 0.24 + 5)³ nodes.
ELASTIC_REACH = 10.0

Points = NDArray[Any]


class Augmentation:
    """Random motion of the points of one scene. What the projection uses is not touched by it."""

    def __init__(self, settings: AugmentSettings) -> None:
        self.settings = settings

    def __call__(self, xyz: Points, rng: np.random.Generator) -> NDArray[np.float32]:
        """Move the points.

        Flips of x and of y, rotation about z by −π..π, scale and shift act on all points, about the world's origin;
        the elastic distortion leaves points further than ``ELASTIC_REACH`` from the median where they are. A point that
        is not finite stays not finite.

        Args:
            xyz: (N, 3) [m].
            rng: the only source of randomness.

        Returns:
            (N, 3) float32 [m].
        """
        options = self.settings
        moved = np.asarray(xyz, dtype=np.float64)
        sign = np.where(rng.random(2) < options.flip, -1.0, 1.0)
        angle = rng.uniform(-np.pi, np.pi) if options.rotate else 0.0
        scale = rng.uniform(*options.scale)
        shift = rng.normal(0.0, options.translate_std, 3)
        cos, sin = np.cos(angle), np.sin(angle)
        linear = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]]) @ np.diag([*sign, 1.0]) * scale
        with np.errstate(invalid="ignore"):  # points that are not finite stay so
            moved = moved @ linear.T + shift
        if rng.random() < options.elastic:
            for granularity, magnitude in ELASTIC_PASSES:
                moved = elastic(moved, rng, 2 * granularity * VOXEL, magnitude * VOXEL)
        return moved.astype(np.float32)


def elastic(xyz: Points, rng: np.random.Generator, spacing: float, magnitude: float) -> NDArray[np.float64]:
    """Displace points by a smooth random field (Simard et al. 2003, as used in 3D by SparseConvNet and ESAM).

    White Gaussian noise on a grid is blurred twice by a box of 3 nodes along every axis and read out trilinearly.

    Args:
        xyz: (N, 3) [m].
        rng: of the noise.
        spacing: distance of the grid's nodes [m].
        magnitude: what the blurred noise is multiplied by [m].

    Returns:
        (N, 3) [m].
    """
    moved = np.array(xyz, dtype=np.float64)
    finite = np.asarray(np.isfinite(moved).all(axis=1))
    if not finite.any():
        return moved
    centre = np.median(moved[finite], axis=0)
    near = finite.copy()
    near[finite] = (np.abs(moved[finite] - centre) <= ELASTIC_REACH).all(1)
    if not near.any():  # the median lies in the void between far parts of a torn scene
        return moved
    reach = np.abs(moved[near] - centre).max(0)
    # two nodes more on every side, so that the blur's zero border lies outside of the points
    half_nodes = np.ceil(reach / spacing).astype(int) + 2
    noise = rng.standard_normal((3, *(2 * half_nodes + 1)), dtype=np.float32)
    for axis in (1, 2, 3) * 2:
        noise = ndimage.uniform_filter1d(noise, 3, axis=axis, mode="constant")
    where = ((moved[near] - centre) / spacing + half_nodes).T
    for axis in range(3):
        moved[near, axis] += magnitude * ndimage.map_coordinates(noise[axis], where, order=1)
    return moved
