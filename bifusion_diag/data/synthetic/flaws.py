"""Flaws of real captures, put into synthetic scenes on demand.

Every flaw draws from a random stream of its own, so switching one on changes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.config.settings import FlawSettings
from bifusion_diag.data.scannet200 import STUFF_CLASSES
from bifusion_diag.data.scene import Scene

Streams = Callable[[int], np.random.Generator]  # the random stream of the flaw with this number


def _noted(scene: Scene, note: str, **changes: Any) -> Scene:
    return replace(scene, notes=(*scene.notes, note), **changes)


def _keep_instances(scene: Scene, keep: NDArray[np.bool_], note: str) -> Scene:
    """Unlabel every point (N,) that is neither kept nor of a stuff class."""
    stuff = np.isin(scene.semantic, STUFF_CLASSES)
    instance = np.where(keep, scene.instance, -1)
    return _noted(scene, note, instance=instance, semantic=np.where(keep | stuff, scene.semantic, -1))


def single_instance(scene: Scene, rng: np.random.Generator) -> Scene:
    """Only one object keeps its label."""
    ids = np.unique(scene.instance[scene.instance >= 0])
    if not len(ids):
        return _noted(scene, "no labelled instance: none was in view")
    return _keep_instances(scene, scene.instance == rng.choice(ids), "a single labelled instance")


def no_instance(scene: Scene, rng: np.random.Generator) -> Scene:
    """No object keeps its label."""
    del rng
    return _keep_instances(scene, np.zeros(len(scene), bool), "no labelled instance")


def empty_crop(scene: Scene, rng: np.random.Generator) -> Scene:
    """Only 5 to 30 points around a random one are left."""
    count = min(int(rng.integers(5, 31)), len(scene))
    xyz = scene.points[:, :3]
    distance = np.linalg.norm(xyz - xyz[rng.integers(len(scene))], axis=1)
    return scene.take(np.sort(np.argsort(distance)[:count]), f"empty crop: only {count} points are left")


def far_outliers(scene: Scene, rng: np.random.Generator) -> Scene:
    """Three to eight points (fewer in a tiny scene) are 200 to 900 m away."""
    count = min(int(rng.integers(3, 9)), max(len(scene) // 4, 1))
    hit = rng.choice(len(scene), count, replace=False)
    direction = rng.normal(size=(count, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    points = scene.points.copy()
    points[hit, :3] = direction * rng.uniform(200, 900, (count, 1))
    return _noted(scene, f"far outliers: {count} points are hundreds of metres away", points=points)


def colour_outliers(scene: Scene, rng: np.random.Generator) -> Scene:
    """One point in a hundred, at least one, has colours below 0 and above 255."""
    hit = rng.choice(len(scene), max(len(scene) // 100, 1), replace=False)
    points = scene.points.copy()
    low = rng.random((len(hit), 3)) < 0.5
    points[hit, 3:] = np.where(low, rng.uniform(-300, -20, low.shape), rng.uniform(280, 1000, low.shape))
    return _noted(scene, f"colour outliers: {len(hit)} points have colours outside [0, 255]", points=points)


def wrong_extrinsics(scene: Scene, rng: np.random.Generator) -> Scene:
    """One view's pose is turned by 60° to 180° and moved by 1 to 5 m."""
    view = int(rng.integers(len(scene.pose)))
    angle = rng.choice([-1, 1]) * rng.uniform(np.pi / 3, np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    pose = scene.pose.copy()
    pose[view, :3, :3] = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ pose[view, :3, :3]
    shift = rng.normal(size=3)
    pose[view, :3, 3] += shift / np.linalg.norm(shift) * rng.uniform(1, 5)
    return _noted(scene, f"wrong extrinsics: the pose of view {view} belongs to another place", pose=pose)


def lost_tracking(scene: Scene, rng: np.random.Generator) -> Scene:
    """One view's pose is −inf throughout, as ScanNet's pose files mark it."""
    view = int(rng.integers(len(scene.pose)))
    pose = scene.pose.copy()
    pose[view] = -np.inf
    return _noted(scene, f"lost tracking: non-finite pose in view {view}", pose=pose)


#: In the order in which they are applied; later ones may undo what earlier ones did to the same points or view.
FLAWS: dict[str, Callable[[Scene, np.random.Generator], Scene]] = {
    flaw.__name__: flaw
    for flaw in (
        single_instance,
        no_instance,
        empty_crop,
        far_outliers,
        colour_outliers,
        wrong_extrinsics,
        lost_tracking,
    )
}
assert set(FLAWS) == set(FlawSettings.model_fields)


def drawn_flaws(chances: FlawSettings, stream: Streams) -> list[str]:
    """Which flaws a scene gets: each by the first draw of its own stream."""
    return [name for number, name in enumerate(FLAWS) if stream(number).random() < getattr(chances, name)]


def apply_flaws(scene: Scene, chances: FlawSettings, stream: Streams) -> Scene:
    """The scene with the flaws that it gets, each named in ``notes``; the scene has at least one point."""
    for number, (name, flaw) in enumerate(FLAWS.items()):
        rng = stream(number)
        if rng.random() < getattr(chances, name):
            scene = flaw(scene, rng)
    return scene
