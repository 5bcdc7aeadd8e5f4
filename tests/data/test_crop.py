from __future__ import annotations

import numpy as np

from bifusion_diag.config.settings import DataSettings
from bifusion_diag.data.crop import crop_scene


def spread(make_scene, size, count=3000, **fields):
    scene = make_scene(count, **fields)
    scene.points[:, :3] *= size
    return scene


def test_a_small_scene_is_left_alone(make_scene):
    scene = spread(make_scene, 5.0)
    assert crop_scene(scene, DataSettings(crop_size=6.4), np.random.default_rng(0)) is scene


def test_a_large_scene_is_cut_to_the_cube(make_scene):
    scene = spread(make_scene, 20.0)
    corners = []
    for seed in range(20):
        cut = crop_scene(scene, DataSettings(crop_size=6.4), np.random.default_rng(seed)).validate()
        assert (np.ptp(cut.points[:, :3], axis=0) <= 6.4 + 1e-5).all()
        inside = (scene.points[:, :3] >= cut.points[:, :3].min(0)) & (scene.points[:, :3] <= cut.points[:, :3].max(0))
        assert len(cut) == inside.all(1).sum(), "every point of the cube stays"
        corners.append(cut.points[:, :3].min(0))
    assert len(np.unique(corners, axis=0)) == 20


def test_points_are_capped_at_random(make_scene):
    scene = make_scene(3000)
    settings = DataSettings(max_points=500)
    one, other = (crop_scene(scene, settings, np.random.default_rng(seed)).validate() for seed in (0, 1))
    again = crop_scene(scene, settings, np.random.default_rng(0))
    assert len(one) == len(other) == 500
    np.testing.assert_array_equal(one.points, again.points)
    assert not np.array_equal(one.points, other.points)
    rows = {row.tobytes() for row in scene.points}
    assert all(row.tobytes() in rows for row in one.points)


def test_a_few_points_far_away_neither_cause_a_cut_nor_vanish(make_scene):
    scene = spread(make_scene, 4.0)
    scene.points[:5, 0] = 700.0
    assert crop_scene(scene, DataSettings(), np.random.default_rng(0)) is scene


def test_points_that_are_not_finite_are_left_to_collate(make_scene):
    scene = spread(make_scene, 20.0)
    scene.points[:50, 1] = np.nan
    scene.points[50:90, 2] = -np.inf
    cut = crop_scene(scene, DataSettings(crop_size=3), np.random.default_rng(1))
    assert (~np.isfinite(cut.points).all(1)).sum() == 90
    assert len(cut) < 300


def test_nothing_to_cut(make_scene):
    for scene in (make_scene(0), make_scene(1)):
        assert crop_scene(scene, DataSettings(), np.random.default_rng(0)) is scene
    lost = make_scene(5)
    lost.points[:, 0] = np.nan
    assert crop_scene(lost, DataSettings(), np.random.default_rng(0)) is lost
