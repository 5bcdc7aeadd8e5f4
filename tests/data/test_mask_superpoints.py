"""Superpoints from masks: against a union-find over all pairs of points, hand-made scenes, and the words of errors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import ndimage

from bifusion_diag.config.settings import DataSettings, GraphMaskSettings
from bifusion_diag.data.mask_superpoints import relabel_by_masks, replace_by_ids
from bifusion_diag.data.masks import graph_masks, ids_at_pixels
from bifusion_diag.data.superpoints import vccs
from bifusion_diag.data.synthetic import SyntheticRooms
from bifusion_diag.errors import UserError

VOXEL, SEED = 0.05, 0.3


def relabel(superpoint, xyz, mask, frame=None, seed_size=SEED):
    frame = np.zeros(len(xyz), np.int64) if frame is None else frame
    return relabel_by_masks(superpoint, xyz, mask, frame, voxel_size=VOXEL, seed_size=seed_size)


def same_partition(one, other):
    pairs = len({*zip(one.tolist(), other.tolist(), strict=True)})
    return pairs == len(np.unique(one)) == len(np.unique(other))


def is_compact(label):
    return label.dtype == np.int64 and np.array_equal(np.unique(label), np.arange(label.max() + 1))


def pieces_by_hand(xyz, region):
    """Union-find over all pairs of points of one region whose voxels touch."""
    cell = np.floor(xyz / VOXEL)
    parent = list(range(len(xyz)))

    def root(i):
        while parent[i] != i:
            i = parent[i]
        return i

    for i, j in itertools.combinations(range(len(xyz)), 2):
        if region[i] == region[j] and np.abs(cell[i] - cell[j]).max() <= 1:
            parent[root(i)] = root(j)
    return np.array([root(i) for i in range(len(xyz))])


def plane(width=1.2, height=0.6, step=0.01):
    x, y = (grid.ravel() for grid in np.meshgrid(np.arange(step / 2, width, step), np.arange(step / 2, height, step)))
    return np.stack([x, y, np.full_like(x, 0.02)], axis=1)


@pytest.mark.parametrize("seed", range(6))
def test_pieces_equal_a_union_find_over_all_pairs(seed):
    rng = np.random.default_rng(seed)
    xyz = rng.uniform(0, [1.0, 0.6, 0.1], (250, 3))
    superpoint = vccs(xyz, np.zeros_like(xyz), voxel_size=VOXEL, seed_size=SEED)
    mask = rng.integers(0, 4, 250) * (rng.random(250) < 0.8)
    region = np.where(mask > 0, -mask, superpoint)
    # seeds as small as voxels: no piece is small enough to join another
    label = relabel(superpoint, xyz, mask, seed_size=VOXEL)
    assert is_compact(label)
    assert same_partition(label, pieces_by_hand(xyz, region))
    assert len(np.unique(label)) > len(np.unique(superpoint))


@pytest.mark.parametrize("seed", range(4))
def test_small_pieces_join_and_everything_stays_connected(seed):
    rng = np.random.default_rng(seed)
    xyz = rng.uniform(0, [1.2, 0.8, 0.04], (500, 3))
    superpoint = vccs(xyz, np.zeros_like(xyz), voxel_size=VOXEL, seed_size=SEED)
    stripes = (xyz[:, 0] / 0.25).astype(np.int64)  # masks with random specks, some of which have no mask
    mask = np.where(rng.random(500) < 0.1, rng.integers(0, 6, 500), stripes)
    label = relabel(superpoint, xyz, mask)
    assert is_compact(label)
    assert same_partition(label, pieces_by_hand(xyz, label)), "every superpoint is connected"
    apart = len(np.unique(pieces_by_hand(xyz, np.where(mask > 0, -mask, superpoint))))
    assert len(np.unique(label)) < apart
    order = rng.permutation(500)
    assert np.array_equal(relabel(superpoint[order], xyz[order], mask[order]), label[order])


def test_a_mask_cuts_between_points_of_one_voxel_and_joins_superpoints():
    xyz = plane()
    superpoint = vccs(xyz, np.zeros_like(xyz), voxel_size=VOXEL, seed_size=0.2)
    assert superpoint.max() > 10
    mask = np.where(xyz[:, 0] < 0.63, 7, 9)  # 0.63 is inside of a voxel
    label = relabel(superpoint, xyz, mask, seed_size=0.2)
    assert same_partition(label, mask)


def test_a_mask_is_cut_at_a_gap_and_a_sliver_joins_the_surface_that_it_lies_on():
    wall = plane()
    box = plane(0.4, 0.4) + np.array([0.4, 0.1, 0.5])
    xyz = np.concatenate([wall, box])
    near = np.arange(len(xyz)) >= len(wall)
    # the box's mask is two pixels too far to the left: it takes a strip of the wall behind
    strip = ~near & (np.abs(xyz[:, 0] - 0.39) < 0.01) & (np.abs(xyz[:, 1] - 0.3) < 0.2)
    mask = np.where(near | strip, 2, 1)
    assert strip.sum() == 80
    label = relabel(np.zeros(len(xyz), np.int64), xyz, mask, seed_size=0.6)
    assert same_partition(label, near)


def test_a_small_piece_joins_the_one_that_it_touches_most():
    xyz = plane()
    left = xyz[:, 0] < 0.6
    small = (np.abs(xyz[:, :2] - [0.58, 0.3]) < [0.02, 0.05]).all(1)  # in the left part, but for one side
    label = relabel(np.zeros(len(xyz), np.int64), xyz, np.where(small, 5, np.where(left, 1, 2)), seed_size=0.5)
    assert 0 < small.sum() < 60
    assert same_partition(label, left)


def test_points_without_a_mask_keep_their_superpoint():
    xyz = plane()
    superpoint = vccs(xyz, np.zeros_like(xyz), voxel_size=VOXEL, seed_size=SEED)
    none = np.zeros(len(xyz), np.int64)
    assert same_partition(relabel(superpoint, xyz, none), superpoint)
    mask = np.where(xyz[:, 0] > 0.9, 3, 0)
    label = relabel(superpoint, xyz, mask)
    rest = np.isin(superpoint, superpoint[mask > 0], invert=True)
    assert rest.sum() > 1000
    assert same_partition(label[rest], superpoint[rest])
    assert len(np.unique(label[mask > 0])) == 1


def test_small_pieces_that_touch_nothing_stay():
    xyz = np.array([[0.0, 0, 0], [5, 0, 0], [5.01, 0, 0], [9, 0, 0]])
    label = relabel(np.array([0, 1, 1, 2]), xyz, np.array([1, 1, 2, 0]))
    assert label[1] == label[2]
    assert len(set(label)) == 3
    assert relabel(np.zeros(0, np.int64), np.zeros((0, 3)), np.zeros(0, np.int64)).shape == (0,)


def test_masks_of_two_frames_are_one_where_most_of_each_lies_in_the_other():
    xyz = plane()
    frame = np.arange(len(xyz)) % 2
    superpoint = vccs(xyz, np.zeros_like(xyz), voxel_size=VOXEL, seed_size=SEED)
    left = xyz[:, 0] < 0.6
    numbers = np.where(frame == 0, np.where(left, 1, 2), np.where(left, 2, 1))  # one picture, other numbers
    assert same_partition(relabel(superpoint, xyz, numbers, frame), left)
    # one frame sees three equal parts, the other sees one: none is most of the other, so all stay apart
    thirds = np.where(frame == 0, 1 + (xyz[:, 0] / 0.4).astype(int), 1)
    assert relabel(superpoint, xyz, thirds, frame).max() == 3
    # a frame that sees half of a mask of the other sees the same mask
    seen = (frame == 0) | left
    part = relabel(superpoint[seen], xyz[seen], np.ones(seen.sum(), np.int64), frame[seen])
    assert part.max() == 0
    # without an overlap there is no evidence
    apart = np.where(left, 0, 1)
    assert relabel(superpoint, xyz, np.ones(len(xyz), np.int64), apart).max() == 1


def test_given_ids_stand_as_they_are():
    superpoint = np.array([0, 0, 1, 1, 2, 2])
    label = replace_by_ids(superpoint, np.array([900, -1, -1, 900, 0, -5]))
    assert is_compact(label)
    assert same_partition(label, np.array([0, 1, 2, 0, 3, 4]))
    assert np.array_equal(replace_by_ids(superpoint, np.full(6, -1)), superpoint)


def test_graph_masks_are_connected_and_follow_colour():
    image = np.full((40, 60, 3), 40, np.uint8)
    image[:, 25:] = [200, 40, 40]
    image[5:15, 40:55] = [40, 40, 200]
    truth = np.zeros((40, 60), int)
    truth[:, 25:], truth[5:15, 40:55] = 1, 2
    assert same_partition(graph_masks(image, GraphMaskSettings(sigma=0)).ravel(), truth.ravel())
    noisy = np.clip(image + np.random.default_rng(0).normal(0, 25, image.shape), 0, 255).astype(np.uint8)
    segments = graph_masks(noisy, GraphMaskSettings(min_size=30))
    assert segments.min() == 1
    for number in np.unique(segments):
        part = segments == number
        assert part.sum() >= 30
        assert ndimage.label(part, np.ones((3, 3)))[1] == 1
    assert np.array_equal(segments, graph_masks(noisy, GraphMaskSettings(min_size=30)))


def test_ids_are_those_of_the_nearest_pixel():
    rng = np.random.default_rng(0)
    frame, row, column = rng.integers(0, 2, 300), rng.integers(0, 24, 300), rng.integers(0, 32, 300)
    small, large = np.arange(12 * 16).reshape(12, 16), np.arange(72 * 96).reshape(72, 96)
    ids = ids_at_pixels([small, large], frame, row, column, height=24, width=32)
    for i in range(300):
        if frame[i] == 0:
            assert ids[i] == small[row[i] // 2, column[i] // 2]
        else:
            assert ids[i] == large[3 * row[i] + 1, 3 * column[i] + 1]  # the middle one of three


def purity(superpoint, truth):
    """Share of points that have the commonest truth of their superpoint."""
    return sum(np.bincount(truth[superpoint == s]).max() for s in np.unique(superpoint)) / len(truth)


def test_synthetic_rooms_with_masks():
    small = {"scenes": 2, "image_height": 120, "image_width": 160, "max_points": 10_000, "point_views": 2}
    clusters = SyntheticRooms(DataSettings(**small), 0)
    options = DataSettings(**small, superpoints="masks", graph_masks={"min_size": 12})
    rooms = SyntheticRooms(options, 0)
    assert "graph-based segmentation of the colour images (scale 100, sigma 0.5, min_size 12)" in str(rooms.describe())
    for index in range(2):
        scene, other = rooms[index], clusters[index]
        assert np.array_equal(scene.superpoint, SyntheticRooms(options, 0)[index].superpoint)
        assert all(np.array_equal(value, vars(other)[k]) for k, value in vars(scene).items() if k != "superpoint")
        things = scene.instance + 1 + 1000 * (scene.instance < 0) * (scene.semantic + 1)
        assert purity(scene.superpoint, things) > 0.95  # 0.7 would do for floor, walls and nothing else
        assert scene.superpoint.max() < other.superpoint.max()
    with pytest.raises(UserError, match=r"data\.masks '/masks': synthetic rooms have no mask files\. Use 'graph'"):
        SyntheticRooms(DataSettings(superpoints="masks", masks="/masks"), 0)
    with pytest.raises(UserError, match=r"data\.superpoints 'files': synthetic rooms have no files\. Use 'vccs'"):
        SyntheticRooms(DataSettings(superpoints="files"), 0)
