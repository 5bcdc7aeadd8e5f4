"""From 3D points to pixels, and from pixels to features.

Camera frame: x right, y down, z forward [m]. A whole number u is the centre of pixel column u, so the image covers
−0.5 ≤ u < W − 0.5, as in :mod:`bifusion_diag.data.geometry`.

Legend: B scenes · V views a scene · N points in the batch · C width of the features · H, W image size · h, w map size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bifusion_diag.config.settings import ProjectionSettings
from bifusion_diag.data.geometry import project, to_camera
from bifusion_diag.model.outputs import Projection


class PointProjection(nn.Module):
    """Where each point lands in each view of its scene, and which view sees it best.

    A point is visible in a view if it is in front of the camera, inside the image, and the depth image at the nearest
    pixel has a reading within ε of the point's z. No gradient passes.

    Non-finite camera coordinates (a lost pose) are not in front of any camera under ``sanitize: strict``. Under
    ``replace``, document 000's remedy is followed to the letter: if a single coordinate of a view is non-finite, that
    whole view goes on with the untransformed world coordinates, which are finite and wrong.
    """

    def __init__(self, settings: ProjectionSettings) -> None:
        super().__init__()
        self.depth_tolerance = settings.depth_tolerance
        self.replace = settings.sanitize == "replace"

    @torch.no_grad()
    def forward(
        self, xyz: Tensor, point_counts: Sequence[int], depth: Tensor, intrinsics: Tensor, pose: Tensor
    ) -> Projection:
        """Project every scene's points into its own views.

        Args:
            xyz: (N, 3) world coordinates as captured (not augmented) [m], scene after scene.
            point_counts: points of each scene, B numbers whose sum is N.
            depth: (B, V, H, W) [m], 0 = no reading.
            intrinsics: (B, V, 3, 3) [px].
            pose: (B, V, 4, 4) camera-to-world; may be non-finite.
        """
        scenes = [
            self._scene(*scene) for scene in zip(xyz.split(list(point_counts)), depth, intrinsics, pose, strict=True)
        ]
        return Projection(*(torch.cat(parts) for parts in zip(*scenes, strict=True)))

    def _scene(self, xyz: Tensor, depth: Tensor, intrinsics: Tensor, pose: Tensor) -> Projection:
        """One scene: (N_i, 3), (V, H, W), (V, 3, 3), (V, 4, 4)."""
        raw = to_camera(xyz, pose)  # (V, N_i, 3)
        camera = raw
        if self.replace:
            broken = ~torch.isfinite(raw).all(dim=(1, 2), keepdim=True)
            camera = torch.where(broken, xyz, raw)
        z = camera[..., 2]
        uv = project(camera, intrinsics)
        height, width = depth.shape[-2:]
        in_front = torch.isfinite(camera).all(-1) & (z > 0)
        bound = uv.new_tensor([width, height]) - 0.5
        inside = in_front & ((uv >= -0.5) & (uv < bound)).all(-1)

        column, row = torch.where(inside[..., None], uv + 0.5, 0).long().unbind(-1)  # floor(u + ½) is the nearest pixel
        reading = depth.flatten(1).gather(1, row * width + column)
        difference = (reading - z).abs()
        visible = inside & (reading > 0) & (difference < self.depth_tolerance)
        # argmin takes the first of equal values
        view = torch.where(visible, difference, torch.inf).argmin(0)
        return Projection(
            camera_xyz=raw.transpose(0, 1),
            uv=uv.transpose(0, 1),
            in_front=in_front.T,
            inside=inside.T,
            visible=visible.T,
            view=view,
            valid=visible.any(0),
        )


class PointSampling(nn.Module):
    """2D feature maps → one feature a point: bilinear, at the point's pixel in its chosen view, 0 where none is valid.

    Pixel u of a W wide image lies at (u + ½)·w/W − ½ of a w wide map; beyond the outermost cells the map's border
    goes on. The backward pass sums in a fixed order (embedding_bag sorts by cell), so reruns are bit-identical.
    """

    def forward(self, maps: Tensor, projection: Projection, scene_index: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Sample (N, C) features.

        Args:
            maps: (B·V, C, h, w), view after view, scene after scene.
            projection: of the N points.
            scene_index: (N,) int64.
            image_size: H, W of the images that ``projection.uv`` counts in.
        """
        height, width = maps.shape[-2:]
        views = projection.uv.shape[1]
        valid = projection.valid[:, None]
        points = torch.arange(len(scene_index), device=scene_index.device)
        uv = torch.where(valid, projection.uv[points, projection.view], 0.0)
        x0, x1, right = _cells(uv[:, 0], image_size[1], width)
        y0, y1, down = _cells(uv[:, 1], image_size[0], height)

        first = (scene_index * views + projection.view) * height
        cells = torch.stack([(first + y) * width + x for y in (y0, y1) for x in (x0, x1)], dim=1)  # (N, 4)
        weights = torch.stack([a * b for a in (1 - down, down) for b in (1 - right, right)], dim=1).to(maps.dtype)
        rows = maps.permute(0, 2, 3, 1).flatten(0, 2)
        sampled = F.embedding_bag(cells, rows, per_sample_weights=weights, mode="sum")
        return torch.where(valid, sampled, 0.0)


def _cells(pixel: Tensor, image_length: int, map_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis: the two cells between which a pixel coordinate (N,) lies, and the weight of the second."""
    position = ((pixel + 0.5) * (map_length / image_length) - 0.5).clamp(0, map_length - 1)
    low = position.floor()
    return low.long(), (low.long() + 1).clamp(max=map_length - 1), position - low
