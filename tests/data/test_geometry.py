from __future__ import annotations

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from bifusion_diag.data.geometry import project, to_camera, unproject_depth

K = torch.tensor([[[100.0, 0, 31.5], [0, 100.0, 23.5], [0, 0, 1]], [[80.0, 0, 30.0], [0, 90.0, 20.0], [0, 0, 1]]])


def random_poses(count: int) -> torch.Tensor:
    pose = np.tile(np.eye(4), (count, 1, 1))
    pose[:, :3, :3] = Rotation.random(count, rng=np.random.default_rng(3)).as_matrix()
    pose[:, :3, 3] = np.random.default_rng(4).normal(size=(count, 3))
    return torch.from_numpy(pose)


def test_to_camera_is_the_inverse_pose():
    pose, xyz = random_poses(3), torch.randn(20, 3, dtype=torch.float64)
    homogeneous = torch.cat([xyz, torch.ones(20, 1, dtype=torch.float64)], 1)
    expected = (torch.linalg.inv(pose) @ homogeneous.T).transpose(1, 2)[..., :3]
    torch.testing.assert_close(to_camera(xyz, pose), expected)


def test_lost_tracking_gives_coordinates_that_are_not_finite_in_its_view_only():
    pose = random_poses(2).float()
    pose[1] = -torch.inf
    camera = to_camera(torch.randn(5, 3), pose)
    assert torch.isfinite(camera[0]).all()
    assert not torch.isfinite(camera[1]).any()
    assert torch.equal(project(camera, K)[1], torch.zeros(5, 2))
    assert not torch.isfinite(unproject_depth(torch.ones(2, 4, 4), K, pose)[1]).any()


def test_projection_by_hand():
    camera = torch.tensor([[[0.0, 0.0, 2.0], [1.0, -0.5, 2.0], [1.0, 1.0, -1.0], [1.0, 1.0, 0.0], [torch.nan, 0, 1.0]]])
    expected = torch.tensor([[[31.5, 23.5], [81.5, -1.5], [0, 0], [0, 0], [0, 0]]])
    torch.testing.assert_close(project(camera, K[:1]), expected)


def test_projection_passes_no_gradient_to_points_without_a_pixel():
    camera = torch.tensor([[[0.2, 0.1, 2.0], [1.0, 1.0, 0.0], [torch.inf, 0.0, 1.0]]], requires_grad=True)
    project(camera, K[:1]).sum().backward()
    assert camera.grad is not None
    torch.testing.assert_close(camera.grad[0, 0], torch.tensor([50.0, 50.0, -(0.2 + 0.1) * 100 / 4]))
    assert torch.equal(camera.grad[0, 1:], torch.zeros(2, 3))


def test_unprojected_pixels_come_back_to_their_pixels():
    pose, depth = random_poses(2), torch.rand(2, 48, 64, dtype=torch.float64) + 0.5
    world = unproject_depth(depth, K.double(), pose)
    for view in range(2):
        camera = to_camera(world[view].reshape(-1, 3), pose[view : view + 1])
        torch.testing.assert_close(camera[0, :, 2], depth[view].reshape(-1))
        uv = project(camera, K[view : view + 1].double()).reshape(48, 64, 2)
        v, u = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
        torch.testing.assert_close(uv, torch.stack([u, v], -1).double(), atol=1e-9, rtol=0)
