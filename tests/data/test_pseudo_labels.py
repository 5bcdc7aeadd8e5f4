"""Pseudo-labels of a scene whose parts are known."""

from __future__ import annotations

import numpy as np
import pytest

from bifusion_diag.data.pseudo_labels import PseudoLabels, estimate_up, pseudo_labels
from bifusion_diag.data.scannet200 import class_id
from bifusion_diag.data.superpoints import vccs

CAMERA = np.array([1.5, -2.0, 1.5])


def _rectangle(origin: list[float], side: list[float], other: list[float], normal: list[float]) -> np.ndarray:
    """(K, 6): points 2 cm apart on a rectangle, and its normal."""
    origin_, side_, other_ = (np.array(vector, dtype=float) for vector in (origin, side, other))
    a, b = (np.arange(0.01, np.linalg.norm(edge), 0.02) / np.linalg.norm(edge) for edge in (side_, other_))
    xyz = origin_ + a[:, None, None] * side_ + b[None, :, None] * other_
    return np.concatenate([xyz.reshape(-1, 3), np.broadcast_to(normal, (xyz.size // 3, 3))], axis=1)


def _box(x: float, y: float, width: float, height: float) -> np.ndarray:
    """The top, front and left side of a box on the floor: what the camera sees of it."""
    return np.concatenate(
        [
            _rectangle([x, y, height], [width, 0, 0], [0, width, 0], [0, 0, 1]),
            _rectangle([x, y, 0], [width, 0, 0], [0, 0, height], [0, -1, 0]),
            _rectangle([x, y, 0], [0, width, 0], [0, 0, height], [-1, 0, 0]),
        ]
    )


PARTS = {
    "floor": _rectangle([0, 0, 0], [3, 0, 0], [0, 3, 0], [0, 0, 1]),
    "wall": _rectangle([0, 3, 0], [3, 0, 0], [0, 0, 2.4], [0, -1, 0]),
    "ceiling": _rectangle([0, 1.5, 2.4], [3, 0, 0], [0, 1.5, 0], [0, 0, -1]),
    "furniture": _box(0.4, 1.4, 0.8, 0.7),
    "object": _box(2.2, 1.2, 0.4, 0.4),
}
SCENE = np.concatenate(list(PARTS.values()))
PART = np.repeat(list(PARTS), [len(points) for points in PARTS.values()])


def _label(rotation: np.ndarray, hint: np.ndarray, min_points: int = 100) -> PseudoLabels:
    xyz, normals = SCENE[:, :3] @ rotation.T, SCENE[:, 3:] @ rotation.T
    superpoint = vccs(xyz, np.full_like(xyz, 128), normals, voxel_size=0.04, seed_size=0.25)
    return pseudo_labels(
        xyz, normals, superpoint, up_hint=rotation @ hint, viewpoint=rotation @ CAMERA, min_points=min_points
    )


def _tilt(axis: int, degrees: float) -> np.ndarray:
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    rotation = np.eye(3)
    first, second = [i for i in range(3) if i != axis]
    rotation[[first, first, second, second], [first, second, first, second]] = cosine, -sine, sine, cosine
    return rotation


@pytest.mark.parametrize("rotation", [np.eye(3), _tilt(0, -115) @ _tilt(1, 30)], ids=["z up", "any world frame"])
def test_known_scene(rotation: np.ndarray) -> None:
    """Every part gets its class but for a rim of about a voxel, where parts meet."""
    hint = _tilt(0, 25) @ np.array([0.0, 0, 1])  # a camera that looks down by 25 degrees
    labels = _label(rotation, hint)
    for name in PARTS:
        assert (labels.semantic[name == PART] == class_id(name)).mean() > 0.9, name
    stuff = np.isin(labels.semantic, [class_id(name) for name in ("floor", "wall", "ceiling")])
    assert (labels.instance[stuff] == -1).all()
    assert ((labels.instance >= 0) == (~stuff & (labels.semantic >= 0))).all()
    boxes = [np.bincount(labels.instance[(name == PART) & (labels.instance >= 0)]) for name in ("furniture", "object")]
    assert [box.argmax() for box in boxes] == [0, 1]  # two instances, the larger first
    assert all(box.max() / box.sum() > 0.95 for box in boxes)


def test_small_regions_are_left_unlabelled() -> None:
    size = int((PART == "object").sum())
    labels = _label(np.eye(3), np.array([0.0, 0, 1]), min_points=2 * size)
    assert (labels.instance >= 0).any()
    small = PART == "object"
    assert (labels.instance[small] == -1).all()
    assert (labels.semantic[small] == -1).mean() > 0.9


def test_a_table_top_is_no_floor() -> None:
    """Horizontal, large and lowest, but just under the camera."""
    top = _rectangle([0, 0, 0], [2, 0, 0], [0, 1, 0], [0, 0, 1])
    superpoint = vccs(top[:, :3], np.zeros((len(top), 3)), voxel_size=0.04, seed_size=0.25)
    up = np.array([0.0, 0, 1])
    near = pseudo_labels(top[:, :3], top[:, 3:], superpoint, up_hint=up, viewpoint=0.5 * up)
    above = pseudo_labels(top[:, :3], top[:, 3:], superpoint, up_hint=up, viewpoint=1.5 * up)
    assert set(near.semantic) == {class_id("furniture")}
    assert set(above.semantic) == {class_id("floor")}


def test_up_is_found_to_a_degree() -> None:
    rng = np.random.default_rng(0)
    axes = np.eye(3)[rng.integers(0, 3, 400)] * rng.choice([-1.0, 1.0], (400, 1)) + rng.normal(0, 0.05, (400, 3))
    clutter = rng.normal(size=(100, 3))
    normals = np.concatenate([axes, clutter])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    rotation = _tilt(2, 40) @ _tilt(0, 70)
    up = estimate_up(normals @ rotation.T, np.ones(500), rotation @ _tilt(1, 30) @ np.array([0.0, 0, 1]))
    assert up @ rotation[:, 2] > np.cos(np.radians(1))


def test_degenerate_scenes() -> None:
    up = np.array([0.0, 0, 1])
    empty = pseudo_labels(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0, np.int64), up_hint=up, viewpoint=up)
    assert empty.semantic.shape == empty.instance.shape == (0,)
    one = pseudo_labels(np.zeros((1, 3)), up[None], np.zeros(1, np.int64), up_hint=up, viewpoint=up)
    assert (one.semantic.tolist(), one.instance.tolist()) == ([-1], [-1])
