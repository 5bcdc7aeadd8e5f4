from __future__ import annotations

import numpy as np
import pytest
import torch

from bifusion_diag.config.settings import DataSettings, FlawSettings
from bifusion_diag.data import CLASS_NAMES, BatchLoader
from bifusion_diag.data.geometry import project, to_camera
from bifusion_diag.data.synthetic import SyntheticRooms

SMALL = {"scenes": 4, "image_height": 60, "image_width": 80, "max_points": 2000}


def rooms(seed=0, **options):
    return SyntheticRooms(DataSettings(**{**SMALL, **options}), seed)


def equal(one, other):
    return all(np.array_equal(value, vars(other)[name]) for name, value in vars(one).items())


def visible(scene, view, epsilon=0.05):
    """Which points a view sees: in the image, and its depth agrees."""
    camera = to_camera(torch.from_numpy(scene.points[:, :3]), torch.from_numpy(scene.pose[view : view + 1]))
    uv = project(camera, torch.from_numpy(scene.intrinsics[view : view + 1]))[0].round().long().numpy()
    height, width = scene.depth[view].shape
    inside = ((uv >= 0) & (uv < [width, height])).all(1) & (camera[0, :, 2].numpy() > 0)
    u, v = np.where(inside[:, None], uv, 0).T
    return inside & (np.abs(scene.depth[view][v, u] - camera[0, :, 2].numpy()) < epsilon), u, v


@pytest.mark.parametrize("index", range(4))
def test_a_scene_is_whole_and_its_points_land_on_their_own_pixels(index):
    scene = rooms()[index].validate()
    assert scene.name == f"synthetic-00000{index}(seed 0)"
    assert scene.labels == "ground truth (synthetic)"
    assert scene.notes == ()
    assert 1000 < len(scene) <= 4000
    assert 0 < (scene.depth == 0).mean() < 0.3
    seen, u, v = visible(scene, 0, epsilon=1e-4)
    assert seen.all()
    np.testing.assert_array_equal(scene.points[:, 3:], scene.images[0][:, v, u].T)
    pixels = v * 80 + u
    assert len(np.unique(pixels)) == len(scene), "one point a pixel"


def test_labels_are_consistent():
    source = rooms()
    for index in range(4):
        scene = source[index]
        assert scene.semantic.min() >= 0
        assert scene.semantic.max() < 200
        np.testing.assert_array_equal(scene.instance < 0, scene.semantic <= 1)
        ids = np.unique(scene.instance[scene.instance >= 0])
        assert ids.tolist() == list(range(len(ids)))
        assert len(ids) >= 3
        for number in ids:
            assert len(np.unique(scene.semantic[scene.instance == number])) == 1
        names = [CLASS_NAMES[k] for k in np.unique(scene.semantic)]
        assert "wall" in names
        room = source.room(index)
        assert set(names) <= {thing.name for thing in room.things}
        walls = scene.points[scene.semantic == 0, :3]
        planes = np.abs(walls[:, [0, 0, 1, 1]] - [0, room.width, 0, room.depth]).min(1)
        assert np.median(planes) < 0.02
        assert planes.max() < 0.25, "depth noise only"


def test_scenes_depend_on_seed_and_index_alone():
    one, other = rooms(), rooms(scenes=9)
    forward = [one[index] for index in range(3)]
    backward = [other[index] for index in (2, 1, 0)][::-1]
    assert all(equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not np.array_equal(forward[0].images, forward[1].images)
    assert not np.array_equal(forward[0].images, rooms(seed=1)[0].images)
    with pytest.raises(IndexError, match="scene 4 of 4"):
        one[4]


def test_memory_is_bounded(monkeypatch):
    source = rooms()
    size = max(sum(v.nbytes for v in vars(rooms()[k]).values() if isinstance(v, np.ndarray)) for k in range(3))
    monkeypatch.setattr("bifusion_diag.data.scene_cache.CACHE_BYTES", int(2.5 * size))
    first = source[0]
    assert source[0] is first
    assert [source[k].name for k in (1, 2)] == ["synthetic-000001(seed 0)", "synthetic-000002(seed 0)"]
    assert source[0] is not first
    assert equal(source[0], first)
    assert source[2] is source[2], "the last one asked for"
    monkeypatch.setattr("bifusion_diag.data.scene_cache.CACHE_BYTES", 1)
    last = source[1]
    assert source[1] is last, "even where no scene fits"


def test_more_point_views_than_images_leave_points_unseen():
    scene = rooms(views=2, point_views=6)[0]
    assert scene.images.shape[0] == scene.pose.shape[0] == 2
    seen = np.stack([visible(scene, view)[0] for view in range(2)])
    assert seen.any(1).all(), "each image sees some points"
    assert 0.1 < 1 - seen.any(0).mean() < 0.9
    neighbours = rooms(views=6, point_views=6)[0]
    overlap = [(visible(neighbours, k)[0] & visible(neighbours, k + 1)[0]).mean() for k in range(5)]
    assert min(overlap) > 0, "neighbouring views share points"
    alone = rooms(views=3, point_views=1)[0]
    assert alone.images.shape[0] == 3
    assert visible(alone, 1, epsilon=1e-4)[0].all(), "the points are from the middle view"


FLAWS = list(FlawSettings.model_fields)


@pytest.mark.parametrize("flaw", FLAWS)
def test_each_flaw_is_noted_and_changes_only_what_it_is_about(flaw):
    clean = rooms(views=2, point_views=2)[1]
    scene = rooms(views=2, point_views=2, flaws={flaw: 1.0})[1].validate()
    (note,) = scene.notes
    xyz, rgb = scene.points[:, :3], scene.points[:, 3:]
    changed = {name for name, value in vars(scene).items() if not np.array_equal(value, vars(clean)[name])} - {"notes"}
    if flaw == "lost_tracking":
        assert changed == {"pose"}
        lost = ~np.isfinite(scene.pose).any((1, 2))
        assert lost.sum() == 1
        assert note == f"lost tracking: non-finite pose in view {lost.argmax()}"
    elif flaw == "wrong_extrinsics":
        assert changed == {"pose"}
        wrong = int((scene.pose != clean.pose).any((1, 2)).argmax())
        assert f"the pose of view {wrong} belongs" in note
        rotation = scene.pose[wrong, :3, :3]
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-6)
        assert 1 <= np.linalg.norm(scene.pose[wrong, :3, 3] - clean.pose[wrong, :3, 3]) <= 5.001
        assert visible(scene, wrong)[0].mean() < 0.5 * visible(clean, wrong)[0].mean()
    elif flaw == "far_outliers":
        assert changed == {"points"}
        far = np.linalg.norm(xyz, axis=1) > 150
        assert 3 <= far.sum() <= 8
        assert str(far.sum()) in note
        np.testing.assert_array_equal(scene.points[~far], clean.points[~far])
    elif flaw == "colour_outliers":
        assert changed == {"points"}
        outside = ((rgb < 0) | (rgb > 255)).any(1)
        assert outside.sum() == len(scene) // 100
        np.testing.assert_array_equal(xyz, clean.points[:, :3])
    elif flaw == "empty_crop":
        assert 5 <= len(scene) <= 30
        assert changed == {"points", "semantic", "instance", "superpoint"}
        assert np.ptp(xyz, axis=0).max() < 1.0
    elif flaw == "single_instance":
        assert changed == {"semantic", "instance"}
        assert len(np.unique(scene.instance[scene.instance >= 0])) == 1
        np.testing.assert_array_equal(scene.semantic == -1, (clean.instance >= 0) & (scene.instance < 0))
    else:
        assert changed == {"semantic", "instance"}
        assert (scene.instance == -1).all()
        np.testing.assert_array_equal(scene.semantic == -1, clean.instance >= 0)


def test_flaws_hit_as_often_as_asked_and_are_counted_beforehand():
    source = rooms(scenes=300, flaws={"lost_tracking": 0.3, "no_instance": 0.05})
    described = source.describe()
    assert described["flaw_chances"] == {"lost_tracking": 0.3, "no_instance": 0.05}
    assert described["flawed_scenes"]["lost_tracking"] == pytest.approx(90, abs=24)  # 3 standard deviations
    assert described["flawed_scenes"]["no_instance"] == pytest.approx(15, abs=12)
    few = rooms(flaws={"lost_tracking": 0.5})
    noted = sum(any("lost tracking" in note for note in few[index].notes) for index in range(4))
    assert few.describe()["flawed_scenes"] == {"lost_tracking": noted}
    assert rooms().describe() == {
        "kind": "synthetic rooms",
        "labels": "ground truth (synthetic)",
        "scenes": 4,
        "seed": 0,
        "views": 1,
        "point_views": 1,
        "superpoints": "VCCS (seeds 0.25 m apart, voxels of 0.04 m)",
        "flaw_chances": {},
        "flawed_scenes": {},
    }


def test_all_flaws_at_once_still_make_a_batch():
    settings = DataSettings(**SMALL, flaws=dict.fromkeys(FLAWS, 1.0))
    batch = BatchLoader(SyntheticRooms(settings, 0), settings, batch_size=2, seed=0).batch(0)
    assert all(len(notes) == len(FLAWS) for notes in batch.notes)
    assert all(1 <= count <= 30 for count in batch.point_counts)
    assert (batch.instance == -1).all()
    assert torch.isfinite(batch.coords).all()
