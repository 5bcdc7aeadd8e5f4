"""Projection and sampling against loops over single points."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bifusion_diag.config.settings import ProjectionSettings
from bifusion_diag.data.geometry import unproject_depth
from bifusion_diag.model.outputs import Projection
from bifusion_diag.model.projection import PointProjection, PointSampling

H, W = 12, 16
K = torch.tensor([[14.0, 0.0, 7.3], [0.0, 13.0, 5.6], [0.0, 0.0, 1.0]])


def camera(yaw: float, centre: tuple[float, float, float]) -> Tensor:
    """A camera-to-world pose that looks along world +y, turned by yaw [rad] about z."""
    look = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])  # columns: right, down, forward
    turn = torch.tensor([[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1.0]])
    pose = torch.eye(4)
    pose[:3, :3] = turn @ look
    pose[:3, 3] = torch.tensor(centre)
    return pose


def twin(xyz: Tensor, depth: Tensor, intrinsics: Tensor, pose: Tensor, tolerance: float) -> dict[str, list]:
    """One scene, strict, in plain Python: what each field should hold."""
    fields: dict[str, list] = {name: [] for name in ("uv", "in_front", "inside", "visible", "view", "valid")}
    for point in xyz.double().numpy():
        rows: dict[str, list] = {name: [] for name in ("uv", "in_front", "inside", "visible")}
        best, chosen = math.inf, 0
        for view in range(len(pose)):
            rotation, translation = pose[view, :3, :3].double().numpy(), pose[view, :3, 3].double().numpy()
            with np.errstate(invalid="ignore"):
                x, y, z = rotation.T @ (point - translation)
            in_front = bool(np.isfinite([x, y, z]).all() and z > 0)
            u = float(intrinsics[view, 0, 0] * x / z + intrinsics[view, 0, 2]) if in_front else 0.0
            v = float(intrinsics[view, 1, 1] * y / z + intrinsics[view, 1, 2]) if in_front else 0.0
            inside = in_front and -0.5 <= u < W - 0.5 and -0.5 <= v < H - 0.5
            visible = False
            if inside:
                reading = float(depth[view, math.floor(v + 0.5), math.floor(u + 0.5)])
                error = abs(reading - z)
                visible = reading > 0 and error < tolerance
                if visible and error < best:
                    best, chosen = error, view
            for name, value in (("uv", [u, v]), ("in_front", in_front), ("inside", inside), ("visible", visible)):
                rows[name].append(value)
        for name, values in rows.items():
            fields[name].append(values)
        fields["view"].append(chosen)
        fields["valid"].append(math.isfinite(best))
    return fields


def two_scenes() -> tuple[Tensor, tuple[int, ...], Tensor, Tensor, Tensor]:
    """Scene 0: two good views. Scene 1: a lost pose (−inf) and a NaN pose's neighbour."""
    generator = torch.Generator().manual_seed(3)
    xyz = torch.rand(90, 3, generator=generator) * torch.tensor([4.0, 5.0, 3.0]) - torch.tensor([2.0, 1.0, 1.5])
    poses = torch.stack([camera(0.0, (0.0, -1.5, 0.0)), camera(0.5, (0.6, -1.2, 0.1))]).repeat(2, 1, 1, 1)
    poses[1, 0] = -torch.inf
    depth = torch.rand(2, 2, H, W, generator=generator) * 4 + 0.5
    depth[:, :, ::3] = 0
    return xyz, (50, 40), depth, K.expand(2, 2, 3, 3), poses


@pytest.mark.parametrize("broken", [-torch.inf, torch.nan])
def test_projection_equals_a_loop_over_points(broken: float) -> None:
    xyz, counts, depth, intrinsics, pose = two_scenes()
    pose[1, 0] = broken
    tolerance = 1.0  # wide, so that random depth leaves visible, occluded and doubly visible points
    found = PointProjection(ProjectionSettings(depth_tolerance=tolerance))(xyz, counts, depth, intrinsics, pose)
    start = 0
    for scene, count in enumerate(counts):
        part = slice(start, start + count)
        want = twin(xyz[part], depth[scene], intrinsics[scene], pose[scene], tolerance)
        torch.testing.assert_close(found.uv[part], torch.tensor(want["uv"]), rtol=1e-4, atol=1e-3)
        for name in ("in_front", "inside", "visible", "view", "valid"):
            assert getattr(found, name)[part].tolist() == want[name], (scene, name)
        start += count
    # the scenes hold every case: behind, outside, occluded, visible once and twice
    for name in ("in_front", "inside", "visible"):
        share = getattr(found, name).float().mean()
        assert 0.05 < share < 0.95, name
    assert (found.visible.sum(1) == 2).any()
    assert not torch.isfinite(found.camera_xyz[50:, 0]).all(-1).any()
    assert not found.visible[50:, 0].any()
    assert torch.isfinite(found.uv).all()


def test_of_equal_views_the_first_is_chosen() -> None:
    pose = torch.stack([camera(0.0, (0.0, 0.0, 0.0))] * 3)[None]
    depth = torch.full((1, 3, H, W), 2.0)
    depth[0, 0] = 3.0  # the first view is occluded: the tie is between the second and the third
    found = PointProjection(ProjectionSettings())(
        torch.tensor([[0.0, 2.01, 0.0]]), (1,), depth, K.expand(1, 3, 3, 3), pose
    )
    assert found.visible.tolist() == [[False, True, True]]
    assert found.view.tolist() == [1]


def test_a_point_at_the_lens_is_not_seen_where_there_is_no_reading() -> None:
    depth = torch.zeros(1, 1, H, W)  # 0 means "no reading", and is within the tolerance of z = 0.01 m
    pose = camera(0.0, (0.0, 0.0, 0.0))[None, None]
    found = PointProjection(ProjectionSettings())(
        torch.tensor([[0.0, 0.01, 0.0]]), (1,), depth, K.expand(1, 1, 3, 3), pose
    )
    assert found.inside.all()
    assert not found.valid.any()


def test_points_of_a_depth_image_come_back_to_their_own_pixel() -> None:
    depth = torch.rand(1, 1, H, W) + 1
    pose = camera(0.3, (0.1, 0.2, 0.3))[None, None]
    xyz = unproject_depth(depth[0], K[None], pose[0]).reshape(-1, 3)
    found = PointProjection(ProjectionSettings(depth_tolerance=1e-3))(xyz, (H * W,), depth, K.expand(1, 1, 3, 3), pose)
    row, column = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    torch.testing.assert_close(found.uv[:, 0], torch.stack([column, row], -1).reshape(-1, 2).float(), rtol=0, atol=1e-3)
    assert found.valid.all()


def test_replace_goes_on_with_untransformed_points_of_the_whole_view() -> None:
    xyz = torch.tensor([[0.0, 0.1, 2.0], [0.2, 0.0, -1.0]])
    pose = torch.stack([torch.eye(4), torch.full((4, 4), -torch.inf)])[None]
    depth = torch.full((1, 2, H, W), 2.0)
    project = PointProjection(ProjectionSettings(sanitize="replace"))
    found = project(xyz, (2,), depth, K.expand(1, 2, 3, 3), pose)
    assert not torch.isfinite(found.camera_xyz[:, 1]).any()  # the raw values stay countable
    assert found.in_front.tolist() == [[True, True], [False, False]]  # the garbage looks like the identity pose's view
    torch.testing.assert_close(found.uv[:, 1], found.uv[:, 0])
    assert found.valid.tolist() == [True, False]
    strict = PointProjection(ProjectionSettings())(xyz, (2,), depth, K.expand(1, 2, 3, 3), pose)
    assert strict.in_front.tolist() == [[True, False], [False, False]]


def at_pixels(uv: Tensor, valid: Tensor, views: int, view: Tensor) -> Projection:
    """A projection whose points lie at given pixels of their chosen view (elsewhere in the others)."""
    n = len(uv)
    everywhere = uv.new_full((n, views, 2), 1e4)
    everywhere[torch.arange(n), view] = uv
    flags = valid[:, None].expand(n, views)
    return Projection(torch.zeros(n, views, 3), everywhere, flags, flags, flags, view, valid)


def bilinear(image: np.ndarray, u: float, v: float, height: int, width: int) -> np.ndarray:
    """One point of one (C, h, w) map, by the four cells around it."""
    h, w = image.shape[1:]
    x = min(max((u + 0.5) / width * w - 0.5, 0.0), w - 1.0)
    y = min(max((v + 0.5) / height * h - 0.5, 0.0), h - 1.0)
    total = np.zeros(image.shape[0])
    for row in range(h):
        for column in range(w):
            total += max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row)) * image[:, row, column]
    return total


def test_sampling_equals_hand_written_bilinear() -> None:
    maps = torch.randn(4, 3, 5, 7)  # two scenes of two views
    n = 200
    uv = torch.rand(n, 2) * torch.tensor([W, H]) - 0.5
    uv[0], uv[1] = torch.tensor([-0.5, -0.5]), torch.tensor([W - 0.51, H - 0.51])
    view = torch.arange(n) % 2
    valid = torch.rand(n) > 0.2
    scene = (torch.arange(n) >= n // 2).long()
    found = PointSampling(ProjectionSettings())(maps, at_pixels(uv, valid, 2, view), scene, (H, W))
    for i in range(n):
        image = maps[int(scene[i]) * 2 + int(view[i])].double().numpy()
        want = bilinear(image, float(uv[i, 0]), float(uv[i, 1]), H, W) if valid[i] else np.zeros(3)
        np.testing.assert_allclose(found[i].numpy(), want, atol=1e-5)


def test_sampling_passes_gradcheck_and_nothing_comes_from_invalid_points() -> None:
    maps = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    uv = (torch.rand(9, 2) * torch.tensor([W, H]) - 0.5).double()
    projection = at_pixels(uv, torch.ones(9, dtype=torch.bool), 1, torch.zeros(9, dtype=torch.int64))
    scene = torch.tensor([0] * 5 + [1] * 4)
    sampling = PointSampling(ProjectionSettings())
    assert torch.autograd.gradcheck(lambda m: sampling(m, projection, scene, (H, W)), (maps,))

    invalid = projection._replace(valid=torch.zeros(9, dtype=torch.bool), uv=torch.full((9, 1, 2), torch.nan))
    sampled = sampling(maps, invalid, scene, (H, W))
    sampled.backward(torch.full_like(sampled, torch.nan))
    assert (sampled == 0).all()
    assert maps.grad is not None
    assert (maps.grad == 0).all()
