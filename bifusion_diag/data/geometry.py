"""The pinhole camera: world to camera, camera to pixel, and depth images back to the world.

Camera frame: x right, y down, z forward [m]. Pixel (u, v) = (column, row) [px]; whole numbers are pixel centres, so the
image covers −0.5 ≤ u < W − 0.5. Legend: N points · V views · H, W image size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_camera(xyz: Tensor, pose: Tensor) -> Tensor:
    """World coordinates in every camera's frame: Rᵀ(x − t), the inverse of a rigid camera-to-world pose.

    Args:
        xyz: (N, 3) [m], world.
        pose: (V, 4, 4) camera-to-world. It is not inverted numerically, so a pose that is not finite (lost tracking)
            never raises: its view's camera coordinates are not finite.

    Returns:
        (V, N, 3) [m].
    """
    rotation, translation = pose[:, :3, :3], pose[:, :3, 3]
    return (xyz[None] - translation[:, None]) @ rotation


def project(camera_xyz: Tensor, intrinsics: Tensor) -> Tensor:
    """Pixel coordinates of points in the camera's frame.

    Args:
        camera_xyz: (..., N, 3) [m].
        intrinsics: (..., 3, 3) [px], one for each leading index.

    Returns:
        (..., N, 2) u, v [px], whether inside the image or not; 0 for points that have no pixel: those not in front of
        the camera (z ≤ 0) and those with a coordinate that is not finite.
    """
    seen = torch.isfinite(camera_xyz).all(-1, keepdim=True) & (camera_xyz[..., 2:] > 0)
    safe = torch.where(seen, camera_xyz, torch.ones_like(camera_xyz))
    homogeneous = safe @ intrinsics.transpose(-1, -2)
    return torch.where(seen, homogeneous[..., :2] / homogeneous[..., 2:], torch.zeros_like(safe[..., :2]))


def unproject_depth(depth: Tensor, intrinsics: Tensor, pose: Tensor) -> Tensor:
    """World coordinates of every pixel of depth images.

    Args:
        depth: (V, H, W) z along the optical axis [m]; 0 = no reading, such pixels land on the camera centre and are
            the caller's to drop.
        intrinsics: (V, 3, 3) [px].
        pose: (V, 4, 4) camera-to-world; where it is not finite, so is the result.

    Returns:
        (V, H, W, 3) [m].
    """
    views, height, width = depth.shape
    v, u = torch.meshgrid(
        torch.arange(height, dtype=depth.dtype, device=depth.device),
        torch.arange(width, dtype=depth.dtype, device=depth.device),
        indexing="ij",
    )
    pixels = torch.stack([u, v, torch.ones_like(u)], dim=-1).reshape(1, -1, 3)
    rays = pixels @ torch.linalg.inv(intrinsics).transpose(-1, -2)
    camera = rays * depth.reshape(views, -1, 1)
    world = camera @ pose[:, :3, :3].transpose(-1, -2) + pose[:, None, :3, 3]
    return world.reshape(views, height, width, 3)
