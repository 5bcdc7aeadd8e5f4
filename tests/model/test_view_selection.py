"""Which of several views a point takes: against a loop over points and views, on rooms and on real frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bifusion_diag.config import load_settings
from bifusion_diag.config.settings import DataSettings, ProjectionSettings
from bifusion_diag.data import BatchLoader, open_source
from bifusion_diag.data.batch import Batch, collate
from bifusion_diag.data.rgbd import RGBDFolder
from bifusion_diag.data.synthetic import SyntheticRooms
from bifusion_diag.model.build import build_model
from bifusion_diag.model.outputs import Projection
from bifusion_diag.model.projection import PointProjection, PointSampling

EPSILON = 0.05


def project(batch: Batch, epsilon: float = EPSILON) -> Projection:
    arrays = (batch.xyz, batch.point_counts, batch.depth, batch.intrinsics, batch.pose)
    return PointProjection(ProjectionSettings(depth_tolerance=epsilon))(*arrays)


def choose_by_loop(errors: list[list[float]], visible: list[list[bool]]) -> tuple[list[int], list[bool]]:
    """Of each point's visible views the one with the smallest error, the first of equals; 0 where there is none."""
    chosen, valid = [], []
    for error, seen in zip(errors, visible, strict=True):
        best = None
        for view in range(len(error)):
            if seen[view] and (best is None or error[view] < error[best]):
                best = view
        chosen.append(0 if best is None else best)
        valid.append(best is not None)
    return chosen, valid


@pytest.mark.parametrize("seed", range(3))
def test_the_nearest_of_three_views_is_chosen_ties_to_the_first(seed: int) -> None:
    """Cameras stand at one place before points of whole z; depths are whole too, so errors tie exactly."""
    rng = np.random.default_rng(seed)
    views, height, width, n = 3, 6, 8, 400
    depth = torch.from_numpy(rng.integers(0, 9, (1, views, height, width)).astype(np.float32))  # 0: no reading
    intrinsics = torch.tensor([[4.0, 0, 3.5], [0, 4.0, 2.5], [0, 0, 1]]).expand(1, views, 3, 3)
    pose = torch.eye(4).repeat(1, views, 1, 1)
    z = rng.integers(-1, 9, n)
    row, column = rng.integers(-1, height + 1, n), rng.integers(-1, width + 1, n)
    xyz = torch.from_numpy(np.stack([(column - 3.5) * z / 4, (row - 2.5) * z / 4, z], 1).astype(np.float32))
    found = PointProjection(ProjectionSettings(depth_tolerance=2.5))(xyz, (n,), depth, intrinsics, pose)

    errors, visible = [], []
    for point in range(n):
        inside = z[point] > 0 and 0 <= row[point] < height and 0 <= column[point] < width
        readings = [float(depth[0, v, row[point], column[point]]) if inside else 0.0 for v in range(views)]
        errors.append([abs(reading - z[point]) for reading in readings])
        visible.append([inside and reading > 0 and abs(reading - z[point]) < 2.5 for reading in readings])
    chosen, valid = choose_by_loop(errors, visible)
    assert found.visible.tolist() == visible
    assert found.view.tolist() == chosen
    assert found.valid.tolist() == valid
    # every case occurs: each view, points without a view, exact ties
    assert set(found.view[found.valid].tolist()) == {0, 1, 2}
    assert 0.1 < found.valid.float().mean() < 0.9
    ties = {e.count(min(e)) for e, seen in zip(errors, visible, strict=True) if all(seen)}
    assert 2 in ties


def test_points_without_a_view_get_zeros_and_others_the_feature_of_their_view() -> None:
    """Each view's map is constant, so the sampled feature names the view."""
    scenes = SyntheticRooms(small(views=3, point_views=5), 0)
    batch = collate([scenes[0], scenes[1]], [scenes[i].points[:, :3] for i in range(2)])
    found = project(batch)
    maps = torch.arange(1, 7, dtype=torch.float32).view(6, 1, 1, 1).expand(6, 2, 4, 5).contiguous()
    sampling = PointSampling(ProjectionSettings())
    sampled = sampling(maps, found, batch.scene_index, (60, 80))
    expected = torch.where(found.valid, batch.scene_index * 3 + found.view + 1, 0).float()
    torch.testing.assert_close(sampled, expected[:, None].expand(-1, 2), rtol=1e-6, atol=0)
    assert 0.05 < (~found.valid).float().mean() < 0.95


def small(**options: object) -> DataSettings:
    return DataSettings(**{"scenes": 4, "image_height": 60, "image_width": 80, "max_points": 1500, **options})


def test_augmentation_moves_no_projection() -> None:
    """The model's own projection, hooked: the loader augments the points, and yet each lands on its own pixel."""
    settings = small(views=3, point_views=3)
    source = open_source(settings, seed=0)
    batch = BatchLoader(source, settings, batch_size=2, seed=0).batch(0)
    assert (batch.coords - batch.xyz).norm(dim=1).median() > 0.1
    model = build_model(load_settings("bifusion", scale="small")).eval()
    seen: list[Projection] = []
    (module,) = (module for module in model.modules() if isinstance(module, PointProjection))
    module.register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        model.encoder(batch)
        model.encoder(plain := Batch(**{**vars(batch), "coords": batch.xyz}))
    assert plain.coords is batch.xyz
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert seen[0].valid.all()
    # and it would show: the augmented points land elsewhere
    moved = project(Batch(**{**vars(batch), "xyz": batch.coords}))
    assert moved.valid.float().mean() < 0.5


def check_poses(source: SyntheticRooms | RGBDFolder, index: int, *, rounding: float, own: float, shared: float) -> None:
    """Views of one scene agree: points are seen, with errors of rounding, most at their own pixel; views overlap."""
    scene = source[index]
    found = project(collate([scene], [scene.points[:, :3]]))
    assert found.valid.float().mean() > 0.999
    n = torch.arange(len(scene))
    uv = found.uv[n, found.view]
    pixel = (uv + 0.5).floor().long()
    reading = torch.from_numpy(scene.depth)[found.view, pixel[:, 1], pixel[:, 0]]
    error = (reading - found.camera_xyz[n, found.view, 2]).abs()
    assert error.max() < rounding  # a point's own view has none but rounding; another may still beat it
    assert ((uv - pixel).abs() < 0.02).all(1).float().mean() > own  # at the centre of its own pixel
    assert set(found.view.tolist()) == set(range(len(scene.pose)))
    assert (found.visible.sum(1) > 1).float().mean() > shared
    color = torch.from_numpy(scene.images)[found.view, :, pixel[:, 1], pixel[:, 0]].float()
    assert (color == torch.from_numpy(scene.points[:, 3:])).all(1).float().mean() > own


@pytest.mark.parametrize("index", range(2))
def test_views_of_a_synthetic_room_agree(index: int) -> None:
    check_poses(SyntheticRooms(small(views=3, point_views=3), 0), index, rounding=1e-4, own=0.99, shared=0.1)


def test_views_of_real_frames_agree(real_frames: Path) -> None:
    source = RGBDFolder(real_frames, DataSettings(views=3, point_views=3, max_points=10_000))
    check_poses(source, 0, rounding=1e-3, own=0.9, shared=0.05)  # the tracker's rotations are orthogonal to 1e-3


def test_real_neighbouring_frames_see_each_others_points(real_frames: Path) -> None:
    """Points of one frame in the two others: within the depth sensor's noise many are seen, as the poses are right."""
    three = RGBDFolder(real_frames, DataSettings(views=3, point_views=3, max_points=10_000))[0]
    one = RGBDFolder(real_frames, DataSettings(max_points=5_000))[0]
    others = collate([one], [one.points[:, :3]])
    arrays = {
        name: torch.from_numpy(getattr(three, name)[1:])[None] for name in ("depth", "intrinsics", "pose", "images")
    }
    found = project(Batch(**{**vars(others), **arrays}), epsilon=0.1)
    inside = found.inside.any(1)
    assert inside.float().mean() > 0.2
    assert found.valid[inside].float().mean() > 0.5
    wrong = {**arrays, "pose": arrays["pose"].flip(1)}  # the two poses exchanged: it would show
    swapped = project(Batch(**{**vars(others), **wrong}), epsilon=0.1)
    assert swapped.valid.float().mean() < found.valid.float().mean()
