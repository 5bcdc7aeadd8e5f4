"""VCCS: its guarantees, checked against neighbourhoods found by brute force."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from bifusion_diag.data.superpoints import vccs
from bifusion_diag.errors import UserError

VOXEL, SEED = 0.05, 0.3


def _room(points: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A floor, a wall and a sphere hovering above the floor, with noise and patches of colour."""
    rng = np.random.default_rng(seed)
    xyz = rng.uniform(0, 2, (points, 3))
    kind = rng.integers(0, 3, points)
    xyz[kind == 0, 2] = 0
    xyz[kind == 1, 0] = 0
    ball = rng.normal(size=(int((kind == 2).sum()), 3))
    xyz[kind == 2] = 0.4 * ball / np.linalg.norm(ball, axis=1, keepdims=True) + [1, 1, 1]
    rgb = 255.0 * (np.floor(xyz / 0.7).sum(axis=1, keepdims=True) % 2) * np.array([1, 0.5, 0.2])
    return (xyz + rng.normal(0, 0.003, xyz.shape)).astype(np.float32), rgb.astype(np.float32)


def _touching(xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Voxel of each point and the (V, V) table of voxels that touch, from all pairs of grid coordinates."""
    cells, voxel = np.unique(np.floor(xyz.astype(np.float64) / VOXEL), axis=0, return_inverse=True)
    return voxel.reshape(-1), np.abs(cells[:, None] - cells[None]).max(axis=2) <= 1


@pytest.mark.parametrize("with_normals", [False, True])
def test_superpoints_partition_the_cloud_into_connected_parts(with_normals: bool) -> None:
    xyz, rgb = _room(4000)
    normals = None
    if with_normals:
        normals = np.random.default_rng(1).normal(size=xyz.shape)
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    label = vccs(xyz, rgb, normals, voxel_size=VOXEL, seed_size=SEED)
    assert label.shape == (4000,)
    assert label.dtype == np.int64
    assert np.array_equal(np.unique(label), np.arange(label.max() + 1))
    voxel, touching = _touching(xyz)
    for superpoint in range(label.max() + 1):
        voxels = np.unique(voxel[label == superpoint])
        assert connected_components(touching[np.ix_(voxels, voxels)])[0] == 1
    assert all(len(np.unique(label[voxel == v])) == 1 for v in range(0, voxel.max() + 1, 7))


def test_extent_follows_the_seed_size() -> None:
    xyz, rgb = _room(20_000)
    for seed_size in (0.2, 0.4):
        label = vccs(xyz, rgb, voxel_size=VOXEL, seed_size=seed_size)
        extents = [np.ptp(xyz[label == s], axis=0).max() for s in range(label.max() + 1)]
        assert max(extents) < 2 * np.sqrt(3) * seed_size + 2 * VOXEL  # √3 R to each side of the centre
        assert seed_size / 2 < np.median(np.array(extents)[label]) < 2 * seed_size  # of the median point's superpoint


def test_two_sheets_that_meet_far_away_are_both_seeded() -> None:
    """A long U: the seeds of one sheet must not leave the other to be claimed from its far end."""
    y, z = (grid.ravel() for grid in np.meshgrid(np.arange(0, 3, 0.02), np.arange(0, 0.3, 0.02)))
    sheets = [np.stack([np.full_like(y, x), y, z], axis=1) for x in (0.01, 0.21)]
    end = np.stack([np.linspace(0.01, 0.21, 40), np.zeros(40), np.full(40, 0.1)], axis=1)
    xyz = np.concatenate([*sheets, end])
    label = vccs(xyz, np.zeros_like(xyz), voxel_size=VOXEL, seed_size=0.6)
    assert max(np.ptp(xyz[label == s, 1]) for s in range(label.max() + 1)) < 1.5
    away = xyz[:, 1] > 1.5
    assert not set(label[away & (xyz[:, 0] < 0.1)]) & set(label[away & (xyz[:, 0] > 0.1)])


def test_a_gap_is_never_crossed_and_colour_is_an_edge() -> None:
    x, y = (grid.ravel() for grid in np.meshgrid(np.arange(0.005, 0.6, 0.02), np.arange(0.005, 0.6, 0.02)))
    plane = np.stack([x, y, np.full_like(x, 0.01)], axis=1)
    near, far = plane, plane + np.array([0, 0, 2.5 * VOXEL])  # one empty layer of voxels between
    label = vccs(np.concatenate([near, far]), np.zeros((2 * len(plane), 3)), voxel_size=VOXEL, seed_size=SEED)
    assert not set(label[: len(plane)]) & set(label[len(plane) :])

    black = x < 0.35  # a voxel border, but no border of the seed grid
    label = vccs(plane, np.where(black[:, None], 0.0, 255.0) * np.ones(3), voxel_size=VOXEL, seed_size=SEED)
    assert not set(label[black]) & set(label[~black])


def test_a_bend_is_an_edge_whatever_the_sign_of_the_normals() -> None:
    a, b = (grid.ravel() for grid in np.meshgrid(np.arange(0.01, 0.8, 0.02), np.arange(0.01, 0.8, 0.02)))
    flat = np.stack([a, b, np.full_like(a, 0.01)], axis=1)
    upright = np.stack([a, np.full_like(a, 0.81), b], axis=1)
    xyz = np.concatenate([flat, upright])
    normals = np.repeat([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]], len(flat), axis=0)
    normals *= np.random.default_rng(0).choice([-1.0, 1.0], (len(xyz), 1))
    label = vccs(xyz, np.zeros_like(xyz), normals, voxel_size=VOXEL, seed_size=SEED)
    mixed = np.intersect1d(label[: len(flat)], label[len(flat) :])
    assert np.isin(label, mixed).mean() < 0.05  # only voxels that hold points of both


def test_same_partition_for_any_order_of_the_points() -> None:
    xyz, rgb = _room(5000)
    label = vccs(xyz, rgb, voxel_size=VOXEL, seed_size=SEED)
    assert np.array_equal(label, vccs(xyz, rgb, voxel_size=VOXEL, seed_size=SEED))
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(xyz))
        assert np.array_equal(vccs(xyz[order], rgb[order], voxel_size=VOXEL, seed_size=SEED), label[order])


def test_far_outliers_change_nothing_else() -> None:
    xyz, rgb = _room(2000)
    label = vccs(xyz, rgb, voxel_size=VOXEL, seed_size=SEED)
    far = np.array([[800.0, -3, 2], [1e6, 1e6, 1e6], [-3e38, 0, 3e38]], dtype=np.float32)
    with_far = vccs(np.concatenate([xyz, far]), np.zeros((2003, 3)) + rgb[:1], voxel_size=VOXEL, seed_size=SEED)
    assert len(np.unique(with_far[2000:])) == 3
    assert not set(with_far[2000:]) & set(with_far[:2000])
    same = vccs(np.concatenate([xyz, far[:2]]), np.concatenate([rgb, rgb[:2]]), voxel_size=VOXEL, seed_size=SEED)[:2000]
    pairs = coo_array((np.ones(2000), (label, same))).tocsr()
    assert pairs.nnz == label.max() + 1  # one new id for each old one


def test_degenerate_clouds() -> None:
    one = np.array([[1.0, 2, 3]])
    assert vccs(one, one, voxel_size=VOXEL, seed_size=SEED).tolist() == [0]
    assert not vccs(np.repeat(one, 50, axis=0), np.zeros((50, 3)), voxel_size=VOXEL, seed_size=SEED).any()
    assert vccs(np.zeros((0, 3)), np.zeros((0, 3)), voxel_size=VOXEL, seed_size=SEED).shape == (0,)
    line = np.stack([np.arange(0, 3, 0.04), np.zeros(75), np.zeros(75)], axis=1)
    assert 5 <= vccs(line, np.full((75, 3), 1e9), voxel_size=VOXEL, seed_size=SEED).max() <= 15


def test_bad_input_says_what_to_do() -> None:
    xyz = np.array([[0.0, 0, 0], [np.nan, 0, 0]])
    with pytest.raises(UserError, match="some points are not finite; drop them before"):
        vccs(xyz, np.zeros((2, 3)), voxel_size=VOXEL, seed_size=SEED)
    with pytest.raises(UserError, match="some normals are not finite"):
        vccs(np.zeros((2, 3)), np.zeros((2, 3)), xyz, voxel_size=VOXEL, seed_size=SEED)
    with pytest.raises(UserError, match=r"voxel size \(0.5 m\) must be positive and at most the seed size \(0.1 m\)"):
        vccs(np.zeros((2, 3)), np.zeros((2, 3)), voxel_size=0.5, seed_size=0.1)


def _clouds(seed: int) -> dict[str, np.ndarray]:
    """Random clouds of many kinds, (N, 3) [m], small enough for brute force."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(200, 900))
    flat = rng.uniform(0, 2, (n, 2))
    side = rng.integers(0, 2, n)
    angle = rng.uniform(0, 12 * np.pi, 2 * n)
    return {
        "volume": rng.uniform(0, 0.8, (n, 3)),
        "isolated points": rng.uniform(0, 30, (n, 3)),
        "sparse": rng.uniform(0, 2, (n, 3)),
        "random walk": np.cumsum(rng.normal(0, 0.03, (n, 3)), axis=0),
        "two sheets with a gap": np.c_[flat, 2.2 * VOXEL * side + rng.normal(0, 0.002, n)],
        "both sides of a thin wall": np.c_[flat, 0.8 * VOXEL * side],
        "spiral": np.c_[0.03 * angle * np.cos(angle), 0.03 * angle * np.sin(angle), rng.uniform(0, 0.2, 2 * n)],
        "duplicates": np.repeat(rng.uniform(0, 1, (n // 10, 3)), 10, axis=0),
        "far from the origin": rng.uniform(0, 1, (n, 3)) + 1e6,
        "far outliers": np.concatenate([rng.uniform(0, 1, (n, 3)), rng.normal(0, 1e7, (5, 3))]),
        "on the borders of voxels": rng.integers(-9, 9, (n, 3)) * VOXEL,
        "a single point": rng.normal(0, 100, (1, 3)),
        "two points": np.array([[0.0, 0, 0], [rng.uniform(0, 0.2), 0, 0]]),
    }


@pytest.mark.parametrize("kind", _clouds(0))
def test_guarantees_hold_for_random_clouds(kind: str) -> None:
    """Every point has a superpoint, every superpoint is connected, none reaches beyond √3 R to each side."""
    for seed in range(4):
        xyz = _clouds(seed)[kind]
        rng = np.random.default_rng(seed)
        rgb = rng.uniform(0, 255, (len(xyz), 3)) if seed % 2 else np.full((len(xyz), 3), 90.0)
        voxel, touching = _touching(xyz)
        count = connected_components(touching)[0]
        for seed_size in (VOXEL, 0.2, 0.6):
            label = vccs(xyz, rgb, voxel_size=VOXEL, seed_size=seed_size)
            assert label.shape == (len(xyz),)
            assert np.array_equal(np.unique(label), np.arange(label.max() + 1))
            of_voxel = np.full(voxel.max() + 1, -1)
            of_voxel[voxel] = label
            assert np.array_equal(of_voxel[voxel], label)  # a voxel has one superpoint
            same = touching & (of_voxel[:, None] == of_voxel[None])
            assert connected_components(same)[0] == label.max() + 1  # as many connected pieces as superpoints
            assert label.max() + 1 >= count  # no bridge between the parts of the cloud
            extents = [np.ptp(xyz[label == s], axis=0).max() for s in range(label.max() + 1)]
            assert max(extents) <= 2 * np.sqrt(3) * seed_size + 2 * VOXEL
            if seed_size == VOXEL:
                assert label.max() + 1 == len(of_voxel)  # as fine as the voxels


def test_the_number_of_superpoints_follows_the_seed_size() -> None:
    """On a plane of one colour every seed cell gives one superpoint, about R across."""
    x, y = (grid.ravel() for grid in np.meshgrid(np.arange(0.005, 2.4, 0.02), np.arange(0.005, 2.4, 0.02)))
    plane = np.stack([x, y, np.full_like(x, 0.01)], axis=1)
    for seed_size in (0.2, 0.3, 0.6):
        label = vccs(plane, np.zeros_like(plane), voxel_size=VOXEL, seed_size=seed_size)
        cells = (2.4 / seed_size) ** 2
        assert 0.8 * cells <= label.max() + 1 <= 1.3 * cells
        # a point's superpoint is about that of the nearest seed: it stays within R of the middle
        middle = np.stack([plane[label == s].mean(axis=0) for s in range(label.max() + 1)])
        away = np.linalg.norm(plane - middle[label], axis=1)
        assert away.max() < seed_size


def test_a_superpoint_keeps_to_its_seed_even_where_nothing_else_looks_like_it() -> None:
    """A black diagonal on a white floor, in which a single seed lies: black ends √3 R from that superpoint's centre."""
    x, y = (grid.ravel() for grid in np.meshgrid(np.arange(0.005, 3, 0.02), np.arange(0.005, 3, 0.02)))
    floor = np.stack([x, y, np.full_like(x, 0.01)], axis=1)
    row, column = np.floor(y / VOXEL), np.floor(x / VOXEL)
    middle = np.isin(column, [24, 25]) & (row >= 24) & (row <= 28)  # of the seed cell [1, 1.5)², and on to the line
    black = (row == column + 4) | middle  # the line passes by the middles of all cells
    rgb = np.where(black[:, None], 0.0, 255.0) * np.ones(3)
    seed_size = 0.5
    label = vccs(floor, rgb, voxel_size=VOXEL, seed_size=seed_size)
    seeded = label == label[middle][0]
    assert not seeded[~black].any()
    ends = floor[seeded]
    length = np.linalg.norm(ends.max(axis=0) - ends.min(axis=0))
    assert 2 * seed_size < length < 2 * np.sqrt(3) * seed_size + 2 * VOXEL
