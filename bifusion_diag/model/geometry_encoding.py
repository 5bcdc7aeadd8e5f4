"""64 geometric signals a point, from which FiLM modulates the features (document 003, part 3).

Legend: B scenes · V views a scene · N points in the batch · S superpoints in the batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bifusion_diag.model.outputs import Projection

FREQUENCIES = 8
SIGNALS = 3 + 3 + 9 + 1 + 2 * 3 * FREQUENCIES


class GeometricEncoding(nn.Module):
    """Where a point is, how large its superpoint is, and how its camera stands.

    All of it is in units of the scene, so that it does not depend on where the world's origin is:

    ======== ===================================================================================
    columns  signal
    ======== ===================================================================================
    0–2      p = (xyz − centre of the scene's bounding box) / diagonal of that box
    3–5      size of the bounding box of the point's superpoint / diagonal
    6–14     rotation of the camera that sees the point, camera-to-world, row by row; the identity
             where no camera does
    15       height above the scene's lowest point / diagonal
    16–39    sin(p · 2^w · π): x, y, z for the first frequency, then for the next
    40–63    cos(p · 2^w · π), likewise
    ======== ===================================================================================

    A scene without extent (one point) has diagonal 1.

    Attributes:
        log_w: (8,) learnable exponents w, 0..7 at the start.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_w = nn.Parameter(torch.arange(FREQUENCIES, dtype=torch.float32))

    def forward(
        self,
        xyz: Tensor,
        scene_index: Tensor,
        superpoint: Tensor,
        *,
        scenes: int,
        superpoints: int,
        rotation: Tensor,
    ) -> Tensor:
        """Encode every point.

        Args:
            xyz: (N, 3) world coordinates as captured, in the frame of the poses [m].
            scene_index: (N,) int64 in 0..scenes-1.
            superpoint: (N,) int64 in 0..superpoints-1.
            scenes: B.
            superpoints: S.
            rotation: (N, 3, 3) see :func:`camera_rotation`.

        Returns:
            (N, 64).
        """
        low, high = _bounds(xyz, scene_index, scenes)
        diagonal = torch.linalg.vector_norm(high - low, dim=1, keepdim=True)
        diagonal = torch.where(diagonal > 0, diagonal, 1.0)[scene_index]
        position = (xyz - (low + high)[scene_index] / 2) / diagonal
        height = (xyz[:, 2:] - low[scene_index, 2:]) / diagonal
        part_low, part_high = _bounds(xyz, superpoint, superpoints)
        size = (part_high - part_low)[superpoint] / diagonal

        angle = (position[:, None, :] * (torch.exp2(self.log_w) * math.pi)[:, None]).flatten(1)
        return torch.cat([position, size, rotation.flatten(1), height, angle.sin(), angle.cos()], dim=1)


def camera_rotation(pose: Tensor, projection: Projection, scene_index: Tensor) -> Tensor:
    """Rotation of the camera that sees each point, relative to the scene's axes.

    Args:
        pose: (B, V, 4, 4) camera-to-world.
        projection: of the N points.
        scene_index: (N,) int64.

    Returns:
        (N, 3, 3); the identity for points that no view sees.
    """
    rotation = pose[scene_index, projection.view, :3, :3]
    usable = projection.valid & torch.isfinite(rotation).all(dim=(1, 2))
    return torch.where(usable[:, None, None], rotation, torch.eye(3, dtype=pose.dtype, device=pose.device))


def _bounds(xyz: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest corner of each group's points, (groups, 3) each; 0 for a group without points."""
    index = group[:, None].expand(-1, 3)
    empty = xyz.new_zeros(groups, 3)
    low = empty.scatter_reduce(0, index, xyz, "amin", include_self=False)
    high = empty.scatter_reduce(0, index, xyz, "amax", include_self=False)
    return low, high
