"""Normals of analytic surfaces."""

from __future__ import annotations

import numpy as np

from bifusion_diag.data.normals import estimate_normals


def test_sphere_seen_from_outside() -> None:
    xyz = np.random.default_rng(0).normal(size=(4000, 3))
    xyz /= np.linalg.norm(xyz, axis=1, keepdims=True)
    normals = estimate_normals(xyz, 5 * xyz)  # every point seen from straight above
    assert np.einsum("ni,ni->n", normals, xyz).min() > np.cos(np.radians(5))


def test_normals_turn_towards_the_viewpoint() -> None:
    xyz = np.random.default_rng(0).uniform(size=(200, 3)) * [1, 1, 0]
    for height in (2.0, -2.0):
        normals = estimate_normals(xyz, np.array([0.5, 0.5, height]))
        np.testing.assert_allclose(normals, np.tile([0, 0, np.sign(height)], (200, 1)), atol=1e-12)


def test_fewer_points_than_neighbours() -> None:
    for count in (0, 1, 2):
        normals = estimate_normals(np.zeros((count, 3)), np.ones(3))
        assert normals.shape == (count, 3)
        np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1)
