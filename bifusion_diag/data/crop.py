"""Cutting a scene to what one training step can hold."""

from __future__ import annotations

import numpy as np

from bifusion_diag.config.settings import DataSettings
from bifusion_diag.data.scene import Scene


def crop_scene(scene: Scene, settings: DataSettings, rng: np.random.Generator) -> Scene:
    """Keep a cube of ``crop_size`` m around a random point, and at most ``max_points`` of its points, at random.

    The cube is cut only from a scene whose bulk (the 1st to 99th percentile of an axis) is larger, so that a few points
    far away do not cause a cut: they stay in the scene, as they do in training code that cuts nothing. Points whose
    coordinates are not finite are left for :func:`~bifusion_diag.data.batch.collate` to count and drop.

    Args:
        scene: may have no points; then nothing is cut.
        settings: ``crop_size`` [m] and ``max_points``.
        rng: decides the cube's centre and which points stay; two draws, whatever the scene.

    Returns:
        The scene itself where nothing has to go. Superpoint ids are compact; instance ids are as they were.
    """
    centre_draw, order_seed = rng.random(), rng.integers(2**63)
    xyz = scene.points[:, :3]
    keep = np.arange(len(scene))
    finite = np.asarray(np.isfinite(xyz).all(axis=1))
    if finite.any():
        low, high = np.percentile(xyz[finite], [1, 99], axis=0)
        if (high - low > settings.crop_size).any():
            centre = xyz[finite][int(centre_draw * finite.sum())]
            outside = finite & (np.abs(np.where(finite[:, None], xyz, centre) - centre) > settings.crop_size / 2).any(1)
            keep = keep[~outside]
    if len(keep) > settings.max_points:
        keep = np.sort(np.random.default_rng(order_seed).permutation(keep)[: settings.max_points])
    return scene if len(keep) == len(scene) else scene.take(keep)
