"""A hand-held RGB-D camera: where it stands, what it sees through, and what its depth sensor misses."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bifusion_diag.data.synthetic.render import Rendering
from bifusion_diag.data.synthetic.room import Room

Array = NDArray[Any]

FOCAL_640 = 577.87  # focal length of ScanNet's depth camera for an image 640 px wide [px]
CLEARANCE = 0.28  # distance of the camera from furniture [m]
STEP_ANGLE = np.deg2rad(22.0)  # turn from one view to the next: less than half of the horizontal field of view (58°)
STEP_LENGTH = 0.25  # longest way from one view to the next [m]
SWEEP = np.deg2rad(75.0)  # largest turn away from the middle of the room
DEPTH_RANGE = (0.35, 8.0)  # [m] outside of it the sensor has no reading


def intrinsics(height: int, width: int) -> Array:
    """(3, 3) float32 [px] of a camera with square pixels and the principal point in the middle of the image."""
    focal = FOCAL_640 * width / 640
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]], np.float32)


def look(position: Array, yaw: float, pitch: float, roll: float) -> Array:
    """Pose of a camera.

    Args:
        position: (3,) [m].
        yaw: heading, counted from the world's x axis towards y [rad].
        pitch: upwards is positive [rad].
        roll: clockwise about the viewing direction [rad].

    Returns:
        (4, 4) float32 camera-to-world; the camera's axes are right, down, forward.
    """
    forward = np.array([np.cos(pitch) * np.cos(yaw), np.cos(pitch) * np.sin(yaw), np.sin(pitch)])
    right = np.array([np.sin(yaw), -np.cos(yaw), 0.0])
    down = np.cross(forward, right)
    rolled_right = np.cos(roll) * right + np.sin(roll) * down
    pose = np.eye(4)
    pose[:3, :3] = np.stack([rolled_right, np.cross(forward, rolled_right), forward], axis=1)
    pose[:3, 3] = position
    return pose.astype(np.float32)


def walk(room: Room, views: int, rng: np.random.Generator) -> Array:
    """Poses of someone who walks through a room at head height while turning: neighbouring views overlap.

    Returns:
        (views, 4, 4) float32 camera-to-world.
    """
    middle = np.array([room.width, room.depth]) / 2
    spots = free_spots(room)
    away = np.linalg.norm(spots - middle, axis=1)
    start = spots[rng.choice(np.flatnonzero(away >= np.quantile(away, 0.6)))]
    goal = spots[rng.choice(len(spots))]
    height, pitch = rng.uniform(1.35, 1.7), np.deg2rad(rng.uniform(-26, -12))
    sweep = min(STEP_ANGLE * (views - 1) / 2, SWEEP)
    turns = np.linspace(-sweep, sweep, views) * rng.choice([-1, 1]) + np.deg2rad(rng.uniform(-12, 12))
    way = goal - start
    way *= min(1.0, STEP_LENGTH * (views - 1) / max(float(np.linalg.norm(way)), 0.1))
    poses = []
    for share, turn in zip(np.linspace(0, 1, views), turns, strict=True):
        wanted = start + way * share
        spot = spots[np.linalg.norm(spots - wanted, axis=1).argmin()]
        heading = np.arctan2(*(middle - spot)[::-1]) + turn
        wobble = rng.normal(0, np.deg2rad(1.5), 2)
        position = np.array([*spot, height + rng.normal(0, 0.02)])
        poses.append(look(position, heading, pitch + wobble[0], wobble[1]))
    return np.stack(poses)


def free_spots(room: Room) -> Array:
    """(n, 2) places on a 0.1 m grid where a person can stand [m]; the roomiest one where there is none."""
    x, y = np.meshgrid(np.arange(0.3, room.width - 0.29, 0.1), np.arange(0.3, room.depth - 0.29, 0.1))
    spots = np.stack([x.ravel(), y.ravel()], axis=1)
    clearance = np.full(len(spots), np.inf)
    for thing in room.things:
        if thing.name in ("wall", "floor", "ceiling", "ceiling light"):
            continue
        for solid in thing.solids:
            cos, sin = abs(np.cos(solid.yaw)), abs(np.sin(solid.yaw))
            reach = np.array([solid.half[0] * cos + solid.half[1] * sin, solid.half[0] * sin + solid.half[1] * cos])
            outside = np.maximum(np.abs(spots - np.asarray(solid.centre[:2])) - reach, 0)
            clearance = np.minimum(clearance, np.linalg.norm(outside, axis=1))
    return spots[clearance >= min(CLEARANCE, clearance.max())]


def sense_depth(view: Rendering, pose: Array, rays: Array, rng: np.random.Generator) -> Array:
    """What a structured-light sensor makes of a view.

    Noise grows with the square of the distance: σ = 0.0012 + 0.0019 (z − 0.4)² m (Nguyen, Izadi, Lovell, 3DIMPVT 2012).
    There is no reading out of range, at grazing angles, at most depth edges, and in a few blobs. Readings are whole mm.

    Args:
        view: the true depth and normals.
        pose: (4, 4) camera-to-world.
        rays: (H, W, 3) viewing rays in the camera's frame, z = 1.
        rng: of the noise and the holes.

    Returns:
        (H, W) float32 [m], 0 = no reading.
    """
    z = np.where(np.isfinite(view.depth), view.depth, 0)
    noisy = z + rng.standard_normal(z.shape, np.float32) * (0.0012 + 0.0019 * (z - 0.4) ** 2)
    toward = -(rays @ pose[:3, :3].T) / np.linalg.norm(rays, axis=-1, keepdims=True)
    grazing = (view.normal * toward).sum(-1) < 0.12 + 0.08 * rng.random(z.shape, np.float32)
    spread = ndimage.maximum_filter(z, 3) - ndimage.minimum_filter(z, 3)
    edge = (spread > 0.06 * z + 0.04) & (rng.random(z.shape, np.float32) < 0.8)
    out_of_range = (noisy < DEPTH_RANGE[0]) | (noisy > DEPTH_RANGE[1])
    holes = out_of_range | grazing | edge | _blobs(z.shape, rng)
    return np.where(holes, 0, np.round(noisy, 3)).astype(np.float32)


def _blobs(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """(H, W) bool: zero to four ellipses."""
    height, width = shape
    v, u = np.ogrid[:height, :width]
    blobs = np.zeros(shape, bool)
    for _ in range(rng.integers(5)):
        cv, cu = rng.uniform(0, height), rng.uniform(0, width)
        rv, ru = rng.uniform(0.01, 0.06, 2) * (height + width) / 2
        blobs |= ((v - cv) / rv) ** 2 + ((u - cu) / ru) ** 2 < 1
    return blobs
