from __future__ import annotations

import numpy as np
import pytest

from bifusion_diag.data.synthetic.camera import free_spots, intrinsics, look, sense_depth, walk
from bifusion_diag.data.synthetic.raycast import pixel_rays
from bifusion_diag.data.synthetic.render import Rendering
from bifusion_diag.data.synthetic.room import furnish


def test_intrinsics_scale_with_the_image():
    K = intrinsics(480, 640)
    np.testing.assert_allclose(K, [[577.87, 0, 319.5], [0, 577.87, 239.5], [0, 0, 1]], rtol=1e-6)
    np.testing.assert_allclose(intrinsics(240, 320)[0, 0], 577.87 / 2, rtol=1e-6)


def test_look_by_hand():
    pose = look(np.array([1.0, 2, 3]), np.pi / 2, 0.0, 0.0)
    np.testing.assert_allclose(pose[:3, :3] @ [0, 0, 1], [0, 1, 0], atol=1e-7)  # forward
    np.testing.assert_allclose(pose[:3, :3] @ [1, 0, 0], [1, 0, 0], atol=1e-7)  # right
    np.testing.assert_allclose(pose[:3, :3] @ [0, 1, 0], [0, 0, -1], atol=1e-7)  # down
    np.testing.assert_array_equal(pose[:3, 3], [1, 2, 3])
    assert look(np.zeros(3), 0.0, -0.5, 0.0)[2, 2] == pytest.approx(np.sin(-0.5))


@pytest.mark.parametrize("index", range(5))
def test_a_walk_stays_in_the_room_and_its_views_overlap(index):
    room = furnish(np.random.default_rng(index))
    poses = walk(room, 6, np.random.default_rng(index)).astype(np.float64)
    for pose in poses:
        np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-6)
        assert np.linalg.det(pose[:3, :3]) == pytest.approx(1)
        x, y, z = pose[:3, 3]
        assert 0 < x < room.width
        assert 0 < y < room.depth
        assert 1.2 < z < 1.9
        assert np.abs(free_spots(room) - [x, y]).max(1).min() < 1e-6
    steps = np.arccos((poses[:-1, :3, 2] * poses[1:, :3, 2]).sum(1))
    assert np.rad2deg(steps).max() < 58, "less than the horizontal field of view"


def flat_view(distance, shape=(120, 160)):
    depth = np.full(shape, distance, np.float32)
    normal = np.broadcast_to(np.float32([0, 0, -1]), (*shape, 3))
    return Rendering(depth, np.zeros(shape, np.int64), normal, np.zeros((*shape, 3), np.float32))


@pytest.mark.parametrize("distance", [1.0, 2.5, 4.0])
def test_depth_noise_grows_as_published(distance):
    rays = pixel_rays(intrinsics(120, 160), 120, 160)
    depth = sense_depth(flat_view(distance), np.eye(4, dtype=np.float32), rays, np.random.default_rng(0))
    error = depth[depth > 0] - distance
    assert len(error) > 0.8 * depth.size
    assert error.mean() == pytest.approx(0, abs=3e-4)
    assert error.std() == pytest.approx(0.0012 + 0.0019 * (distance - 0.4) ** 2, rel=0.05)


def test_no_reading_out_of_range_at_grazing_angles_and_on_most_edges():
    pose, rays = np.eye(4, dtype=np.float32), pixel_rays(intrinsics(120, 160), 120, 160)
    rng = np.random.default_rng(1)
    for distance in (0.1, 20.0, np.inf):
        assert not sense_depth(flat_view(distance), pose, rays, rng).any()
    grazing = flat_view(2.0)._replace(normal=np.broadcast_to(np.float32([0, -1, -0.01]), (120, 160, 3)))
    depth = sense_depth(grazing, pose, rays, rng)
    assert not depth[40:60].any(), "seen along the surface, or from behind"
    step = flat_view(2.0)
    step.depth[:, 80:] = 3.0
    depth = sense_depth(step, pose, rays, rng)
    assert (depth[:, 79:81] == 0).mean() > 0.7
    assert (depth[:, :78] == 0).mean() < 0.2
