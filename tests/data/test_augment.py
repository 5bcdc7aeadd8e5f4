from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import pdist

from bifusion_diag.config.settings import AugmentSettings
from bifusion_diag.data.augment import ELASTIC_REACH, Augmentation, elastic

STILL = {"flip": 0.0, "rotate": False, "scale": (1.0, 1.0), "translate_std": 0.0, "elastic": 0.0}
XYZ = np.random.default_rng(5).normal(size=(60, 3)).astype(np.float32)


def augment(seed: int = 0, xyz: np.ndarray = XYZ, **options) -> np.ndarray:
    return Augmentation(AugmentSettings(**{**STILL, **options}))(xyz, np.random.default_rng(seed))


def test_everything_off_moves_nothing():
    np.testing.assert_array_equal(augment(), XYZ)


def test_flips_mirror_x_and_y():
    np.testing.assert_array_equal(augment(flip=1.0), XYZ * np.float32([-1, -1, 1]))
    signs = {tuple(np.sign(augment(seed, flip=0.5)[0] / XYZ[0])) for seed in range(40)}
    assert signs == {(a, b, 1.0) for a in (-1.0, 1.0) for b in (-1.0, 1.0)}


def test_rotation_is_about_z_and_keeps_distances():
    angles = []
    for seed in range(200):
        moved = augment(seed, rotate=True)
        np.testing.assert_allclose(moved[:, 2], XYZ[:, 2], atol=1e-6)
        angles.append(np.angle((moved[0, 0] + 1j * moved[0, 1]) / (XYZ[0, 0] + 1j * XYZ[0, 1])))
    np.testing.assert_allclose(pdist(moved), pdist(XYZ), rtol=1e-4, atol=1e-5)
    assert min(angles) < -3
    assert max(angles) > 3


def test_scale_and_shift():
    np.testing.assert_allclose(augment(scale=(1.7, 1.7)), XYZ * 1.7, rtol=1e-6)
    factors = [float(augment(seed, scale=(0.8, 1.2))[0, 0] / XYZ[0, 0]) for seed in range(200)]
    assert 0.8 <= min(factors) < 0.83
    assert 1.17 < max(factors) <= 1.2
    shifts = np.array([(augment(seed, translate_std=0.1) - XYZ).mean(0) for seed in range(400)])
    np.testing.assert_allclose(shifts.std(0), 0.1, rtol=0.15)  # of 400 draws: standard error 3.5 %


def test_elastic_is_smooth_and_as_large_as_its_closed_form():
    # a box of 3 nodes twice along an axis has the weights [1 2 3 2 1] / 9, so white noise keeps 19/81 of its variance
    # an axis, and the value at a node has the standard deviation magnitude · (19/81)^1.5
    nodes = np.stack(np.meshgrid(*[np.arange(-8, 9)] * 3), -1).reshape(-1, 3) * 0.24
    moved = elastic(nodes, np.random.default_rng(0), 0.24, 0.8) - nodes
    assert moved.std() == pytest.approx(0.8 * (19 / 81) ** 1.5, rel=0.1)
    near = elastic(nodes + 0.001, np.random.default_rng(0), 0.24, 0.8) - nodes - 0.001
    assert np.abs(near - moved).max() < 0.01


def test_elastic_happens_as_often_as_asked():
    happened = [not np.array_equal(augment(seed, elastic=0.5), XYZ) for seed in range(60)]
    assert 18 <= sum(happened) <= 42
    assert not np.array_equal(augment(elastic=1.0), XYZ)


def test_far_points_stay_where_they_are_and_non_finite_ones_stay_non_finite():
    flawed = np.concatenate([XYZ, [[1e30, 0, 0], [0, -800, 3], [np.nan, 0, 0], [0, np.inf, 0]]]).astype(np.float32)
    moved = augment(xyz=flawed, elastic=1.0)
    np.testing.assert_array_equal(moved[60:62], flawed[60:62])
    assert not np.isfinite(moved[62:]).all(1).any()
    assert (moved[:60] != XYZ).any(1).all()
    assert np.abs(moved[:60] - XYZ).max() < ELASTIC_REACH
    assert np.isnan(augment(xyz=np.full((2, 3), np.nan), elastic=1.0)).all()
    assert augment(xyz=np.zeros((0, 3)), elastic=1.0).shape == (0, 3)


def test_default_augmentation_does_not_warn_on_flawed_points():
    flawed = np.float32([[-np.inf, 1, 2], [np.nan] * 3, [900, 0, 0], [1, 2, 3]])
    moved = Augmentation(AugmentSettings())(flawed, np.random.default_rng(0))
    assert np.isfinite(moved).all(1).tolist() == [False, False, True, True]


def test_the_generator_decides_everything():
    options = AugmentSettings()
    one, two, other = (Augmentation(options)(XYZ, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


def test_elastic_leaves_a_scene_torn_in_two_where_it_is():
    torn = np.array([[0.0, 0.0, 0.0], [500.0, 0.0, 0.0]])  # no point is near the median, which is half-way
    np.testing.assert_array_equal(elastic(torn, np.random.default_rng(0), 0.24, 0.8), torn)
    assert augment(elastic=1.0, xyz=torn.astype(np.float32)).shape == (2, 3)
