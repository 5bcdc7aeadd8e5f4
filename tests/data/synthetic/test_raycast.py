"""Ray casting against closed forms and against a sphere tracer that knows nothing of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bifusion_diag.data.geometry import unproject_depth
from bifusion_diag.data.synthetic.camera import intrinsics, look
from bifusion_diag.data.synthetic.raycast import cast, image_window, pixel_rays
from bifusion_diag.data.synthetic.render import render
from bifusion_diag.data.synthetic.solids import Material, Solid

GREY = Material("plain", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1.0, 0)
HEIGHT, WIDTH = 60, 80
K = intrinsics(HEIGHT, WIDTH)
LAMP = np.array([0.0, 0.0, 10.0])


def view(solids, pose):
    return render(solids, LAMP, pose, K, HEIGHT, WIDTH)


def surface_points(drawn, pose):
    depth = np.where(np.isfinite(drawn.depth), drawn.depth, 0)
    world = unproject_depth(*(torch.from_numpy(a[None]) for a in (depth, K, pose)))[0].numpy()
    return world[drawn.solid >= 0]


def test_a_wall_at_a_known_distance():
    wall = Solid("box", (4.5, 0, 0), (0.5, 50, 50), GREY)
    pose = look(np.zeros(3), 0.0, 0.0, 0.0)
    drawn = view([wall], pose)
    np.testing.assert_allclose(drawn.depth, 4.0, atol=1e-5)
    np.testing.assert_array_equal(drawn.solid, 0)
    np.testing.assert_allclose(drawn.normal, np.broadcast_to([-1, 0, 0], drawn.normal.shape), atol=1e-6)


def test_a_floor_seen_from_above_and_aside():
    floor = Solid("box", (0, 0, -0.1), (50, 50, 0.1), GREY, yaw=0.4)
    pose = look(np.array([0.3, -0.2, 1.5]), 1.0, -0.9, 0.1)
    points = surface_points(view([floor], pose), pose)
    assert len(points) == HEIGHT * WIDTH
    np.testing.assert_allclose(points[:, 2], 0, atol=1e-5)


def signed_distance(solid, points):
    """Of a solid's surface, positive outside, or at least zero on it: written apart from the ray caster."""
    offset = points - np.asarray(solid.centre)
    turn = np.array([[np.cos(solid.yaw), np.sin(solid.yaw)], [-np.sin(solid.yaw), np.cos(solid.yaw)]])
    local = np.concatenate([offset[..., :2] @ turn.T, offset[..., 2:]], -1) / np.asarray(solid.half)
    if solid.shape == "box":
        return np.abs(local).max(-1) - 1
    if solid.shape == "cylinder":
        return np.maximum(np.hypot(local[..., 0], local[..., 1]), np.abs(local[..., 2])) - 1
    return np.linalg.norm(local, axis=-1) - 1


@pytest.mark.parametrize("shape", ["box", "cylinder", "ellipsoid"])
def test_solids_against_marching_along_the_rays(shape):
    solid = Solid(shape, (3.0, 0.4, 1.2), (0.5, 0.8, 0.6), GREY, yaw=0.7)
    pose = look(np.array([0.2, 0.1, 1.5]), 0.1, -0.1, 0.05)
    drawn = view([solid], pose)
    rays = pixel_rays(K, HEIGHT, WIDTH) @ pose[:3, :3].T
    steps = np.arange(0.5, 5.0, 0.01)
    along = pose[:3, 3] + rays[:, :, None] * steps[:, None]
    inside = signed_distance(solid, along) <= 0
    first = np.where(inside.any(2), steps[inside.argmax(2)], np.inf)
    both = np.isfinite(first) & np.isfinite(drawn.depth)
    # marching overshoots the surface by up to one step, and steps over chords that are shorter than one
    assert both.sum() > 300
    overshoot = first[both] - drawn.depth[both]
    assert (overshoot >= -1e-5).all()
    assert (overshoot <= 0.01 + 1e-5).all()
    assert np.isfinite(drawn.depth)[np.isfinite(first)].all()
    assert np.isfinite(drawn.depth).sum() - both.sum() < 12
    np.testing.assert_allclose(signed_distance(solid, surface_points(drawn, pose)), 0, atol=1e-5)


@pytest.mark.parametrize("shape", ["box", "cylinder", "ellipsoid"])
def test_normals_are_the_gradient_of_the_distance(shape):
    solid = Solid(shape, (2.5, 0.2, 1.0), (0.5, 0.8, 0.6), GREY, yaw=0.5)
    pose = look(np.array([0.0, 0.0, 2.2]), 0.0, -0.4, 0.0)
    drawn = view([solid], pose)
    points, normal = surface_points(drawn, pose).astype(np.float64), drawn.normal[drawn.solid >= 0]
    shifts = np.eye(3) * 1e-5
    gradient = np.stack([signed_distance(solid, points + s) - signed_distance(solid, points - s) for s in shifts], 1)
    gradient /= np.linalg.norm(gradient, axis=1, keepdims=True)
    agree = (gradient * normal).sum(1) > 0.999
    assert agree.mean() > 0.97, "all but the pixels on the edges of a box or cylinder"
    np.testing.assert_allclose(np.linalg.norm(normal, axis=1), 1, atol=1e-5)


def test_the_nearer_solid_hides_the_other_and_windows_lose_nothing():
    rng = np.random.default_rng(0)
    centres = np.concatenate([rng.uniform([1.5, -2, -1.5], [5, 2, 1.5], (40, 3)), rng.uniform(-3, -1, (5, 3))])
    solids = [
        Solid(
            str(rng.choice(["box", "cylinder", "ellipsoid"])), tuple(at), tuple(rng.uniform(0.1, 0.5, 3)), GREY, 0.3 * k
        )
        for k, at in enumerate(centres)
    ]
    solids.append(Solid("box", (0.0, 0.0, -2.0), (4.0, 4.0, 0.1), GREY))  # reaches behind the camera
    pose = look(np.zeros(3), 0.2, -0.3, 0.0)
    rays = pixel_rays(K, HEIGHT, WIDTH) @ pose[:3, :3].T
    whole = [(slice(0, HEIGHT), slice(0, WIDTH))] * len(solids)
    alone = np.stack([cast([solid], pose[:3, 3], rays, whole[:1]).depth for solid in solids])
    windows = [image_window(solid, pose, K, HEIGHT, WIDTH) for solid in solids]
    together = cast(solids, pose[:3, 3], rays, windows)
    np.testing.assert_array_equal(together.depth, alone.min(0))
    seen = np.isfinite(together.depth)
    np.testing.assert_array_equal(together.solid[seen], alone.argmin(0)[seen])
    assert len(np.unique(together.solid)) > 15


def test_what_stands_in_the_light_casts_a_shadow():
    floor = Solid("box", (0, 0, -0.1), (50, 50, 0.1), GREY)
    screen = Solid("box", (0, 3.0, 4.0), (0.6, 0.6, 0.01), GREY)
    pose = look(np.array([0.0, 0.0, 1.5]), np.pi / 2, -0.3, 0.0)
    bright, dark = view([floor], pose), view([floor, screen], pose)
    under = np.array([0.0, 5.0, 0.0])  # the lamp at z = 10 throws the screen's middle there
    camera = (under - pose[:3, 3]) @ pose[:3, :3]
    u, v = np.round(K[:2, :2] @ camera[:2] / camera[2] + K[:2, 2]).astype(int)
    assert dark.color[v, u, 0] < 0.9 * bright.color[v, u, 0]
    np.testing.assert_allclose(dark.color[-1, 0], bright.color[-1, 0])
