from __future__ import annotations

import numpy as np
import pytest
import torch

from bifusion_diag.data.batch import collate, contiguous
from bifusion_diag.errors import UserError


def test_rows_of_all_scenes_stay_together(make_scene):
    scenes = [make_scene(10, seed=1, name="a", views=2), make_scene(4, seed=2, name="b", views=2)]
    coords = [scene.points[:, :3] + 1 for scene in scenes]
    batch = collate(scenes, coords)
    points = np.concatenate([scene.points for scene in scenes])
    assert torch.equal(batch.xyz, torch.from_numpy(points[:, :3]))
    assert torch.equal(batch.coords, batch.xyz + 1)
    assert batch.scene_index.tolist() == [0] * 10 + [1] * 4
    assert (batch.batch_size, batch.point_counts, batch.superpoint_counts) == (2, (10, 4), (7, 4))
    assert batch.superpoint.tolist() == [*(np.arange(10) % 7), *range(7, 11)]
    assert batch.semantic.tolist() == np.concatenate([scene.semantic for scene in scenes]).tolist()
    assert (batch.names, batch.labels) == (("a", "b"), ("test", "test"))
    for name in ("images", "depth", "intrinsics", "pose"):
        assert torch.equal(getattr(batch, name)[1], torch.from_numpy(getattr(scenes[1], name)))


def test_colours_are_normalised_with_the_numbers_of_esam(make_scene):
    points = np.zeros((2, 6), np.float32)
    points[1, 3:] = [255, -100, 400]
    color = collate([make_scene(2, points=points)], [points[:, :3]]).color
    mean = np.array([0.47793125906962, 0.4303257521323044, 0.3749598901421883])
    std = np.array([0.2834475483823543, 0.27566157565723015, 0.27018971370874995])
    np.testing.assert_allclose(color[0], -mean / std, rtol=1e-5)
    np.testing.assert_allclose(color[1], (np.array([1, -100 / 255, 400 / 255]) - mean) / std, rtol=1e-5)


def test_points_that_are_not_finite_are_dropped_with_all_that_belongs_to_them(make_scene):
    scene = make_scene(6, instance=np.array([5, 0, 9, 9, -1, 2]), superpoint=np.array([0, 1, 2, 2, 3, 4]))
    scene.points[0, 1] = np.nan
    coords = scene.points[:, :3].copy()
    coords[1] = np.inf
    scene.points[2, 0] = 800.0  # far away, but a number
    coords[2, 0] = 800.0
    batch = collate([scene], [coords])
    assert batch.point_counts == (4,)
    assert batch.xyz[0, 0] == 800
    assert batch.instance.tolist() == [1, 1, -1, 0]
    assert batch.superpoint.tolist() == [0, 0, 1, 2]
    assert batch.superpoint_counts == (3,)
    assert batch.notes == (("2 points with non-finite coordinates dropped",),)


def test_instance_ids_leave_no_gaps():
    assert contiguous(np.array([7, -1, 3, 7, -5, 12])).tolist() == [1, -1, 0, 1, -1, 2]
    assert contiguous(np.array([-1, -1])).tolist() == [-1, -1]


def test_a_scene_that_cannot_be_batched_is_named(make_scene):
    with pytest.raises(UserError, match=r"scene 'hollow' cannot be batched: it has no points; leave the scene out"):
        collate([make_scene(3), make_scene(0, name="hollow")], [np.zeros((3, 3)), np.zeros((0, 3))])
    with pytest.raises(UserError, match=r"scene 'lost' cannot be batched: none of its 3 points has finite coordinates"):
        collate([make_scene(3, name="lost")], [np.full((3, 3), np.nan)])
    with pytest.raises(UserError, match=r"'one' has .* \(1, 3, 6, 8\), 'two' has \(2, 3, 6, 8\); resize them"):
        collate([make_scene(3, name="one"), make_scene(3, name="two", views=2)], [np.zeros((3, 3))] * 2)
    with pytest.raises(UserError, match=r"scene 'small': augmented coords must be \(3, 3\), got \(2, 3\)"):
        collate([make_scene(3)], [np.zeros((2, 3))])


def test_to_moves_every_tensor_and_nothing_else(make_scene):
    batch = collate([make_scene(3)], [np.zeros((3, 3))])
    moved = batch.to("meta")
    assert {v.device.type for v in vars(moved).values() if isinstance(v, torch.Tensor)} == {"meta"}
    assert {v.device.type for v in vars(batch).values() if isinstance(v, torch.Tensor)} == {"cpu"}
    assert (moved.names, moved.point_counts, moved.notes) == (batch.names, batch.point_counts, batch.notes)


def test_colours_that_are_not_finite_are_kept_and_noted(make_scene):
    scene = make_scene(10)
    scene.points[[2, 5], 4] = np.nan
    batch = collate([scene], [scene.points[:, :3]])
    assert batch.notes == (("2 points with non-finite colours",),)
    assert int(batch.color.isnan().any(1).sum()) == 2


def test_scenes_of_a_batch_are_the_batch_of_these_scenes(make_scene):
    """Against collate itself: every field of the chosen scenes, in their new order."""
    sizes = (10, 4, 7)
    scenes = [
        make_scene(n, seed=i, name=f"s{i}", views=2, superpoint=np.arange(n) % (i + 2)) for i, n in enumerate(sizes)
    ]
    coords = [scene.points[:, :3] + 1 for scene in scenes]
    batch = collate(scenes, coords)
    for chosen in ([1], [2, 0], [0, 1, 2], [1, 1, 2]):
        picked, whole = batch.select(chosen), collate([scenes[i] for i in chosen], [coords[i] for i in chosen])
        for name, expected in vars(whole).items():
            found = getattr(picked, name)
            if isinstance(expected, torch.Tensor):
                assert found.dtype == expected.dtype, name
                assert torch.equal(found, expected), name
            else:
                assert found == expected, name


@pytest.mark.parametrize("chosen", [[], [2], [-1]])
def test_a_scene_that_the_batch_does_not_have_cannot_be_selected(make_scene, chosen):
    batch = collate([make_scene(3), make_scene(4)], [np.zeros((3, 3)), np.zeros((4, 3))])
    with pytest.raises(IndexError, match="of a batch of 2"):
        batch.select(chosen)
