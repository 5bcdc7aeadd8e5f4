"""A small batch for whole models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bifusion_diag.data.batch import Batch
from bifusion_diag.data.geometry import unproject_depth

H, W = 12, 16


def make_batch(*, lost: bool = False) -> Batch:
    """Two scenes of two views. A third of scene 0's points were never seen; ``lost``: scene 1 has no pose at all."""
    generator = torch.Generator().manual_seed(5)
    intrinsics = torch.tensor([[14.0, 0.0, 7.5], [0.0, 14.0, 5.5], [0.0, 0.0, 1.0]]).expand(2, 2, 3, 3).clone()
    pose = torch.eye(4).repeat(2, 2, 1, 1)
    pose[:, 1, 0, 3] = 0.2
    depth = torch.rand(2, 2, H, W, generator=generator) + 1
    points = unproject_depth(depth[:, 0], intrinsics[:, 0], pose[:, 0]).reshape(2, H * W, 3)
    points[0, ::3] -= torch.tensor([0.0, 0.0, 9.0])
    if lost:
        pose[1] = -torch.inf
    n = 2 * H * W
    scene_index = torch.arange(2).repeat_interleave(H * W)
    return Batch(
        xyz=points.reshape(n, 3),
        coords=points.reshape(n, 3),
        color=torch.randn(n, 3, generator=generator),
        scene_index=scene_index,
        point_counts=(H * W, H * W),
        superpoint=torch.arange(n) // 8,
        superpoint_counts=(H * W // 8, H * W // 8),
        semantic=torch.arange(n) % 5,
        instance=torch.arange(n) % (H * W) // 64,
        images=torch.randint(0, 256, (2, 2, 3, H, W), dtype=torch.uint8, generator=generator),
        depth=depth,
        intrinsics=intrinsics,
        pose=pose,
        names=("a", "b"),
        labels=("test", "test"),
    )


@pytest.fixture
def batch_of_two() -> Callable[..., Batch]:
    """Makes two scenes of H·W points each that come from depth images; see :func:`make_batch`."""
    return make_batch
