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

#: Ways of ``sanitize`` under which a point without a finite place in front of the camera has no pixel.
GUARDED = ("strict", "replace")
#: The documents' bound of camera coordinates [m].
FARTHEST = 1e6


class PointProjection(nn.Module):
    """Where each point lands in each view of its scene, and which view sees it best.

    A point is visible in a view if it is in front of the camera, inside the image, and the depth image at the nearest
    pixel has a reading within ε of the point's z. No gradient passes.

    What becomes of non-finite camera coordinates (a lost pose) is a setting. Only ``strict`` is right; the others
    follow the documents to the letter, view by view: if a single coordinate of a view is non-finite, all of it is
    treated.

    ==========  ==================================================================================================
    sanitize    a view with a non-finite coordinate
    ==========  ==================================================================================================
    strict      its non-finite points are not in front of the camera and have no pixel
    replace     goes on with the untransformed world coordinates, which are finite and wrong (000, "NaN detection")
    clamp       its coordinates are clamped to ±1e6 m, which makes ±∞ finite and leaves NaN as it is (000, phase 1)
    none        goes on as it is
    ==========  ==================================================================================================

    Under ``clamp`` and ``none`` the division by z is not guarded either: points may have a NaN pixel. Every comparison
    with NaN is false, so they are not valid; :class:`PointSampling` tells how they spoil the features all the same.
    """

    def __init__(self, settings: ProjectionSettings) -> None:
        super().__init__()
        self.depth_tolerance = settings.depth_tolerance
        self.sanitize = settings.sanitize

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
        camera, uv, in_front = self._sanitized(xyz, raw, intrinsics)
        z = camera[..., 2]
        height, width = depth.shape[-2:]
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

    def _sanitized(self, xyz: Tensor, raw: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Camera coordinates (V, N_i, 3) to go on with, their pixels (V, N_i, 2), and which are in front (V, N_i)."""
        broken = ~torch.isfinite(raw).all(dim=(1, 2), keepdim=True)
        if self.sanitize in GUARDED:
            camera = torch.where(broken, xyz, raw) if self.sanitize == "replace" else raw
            in_front = torch.isfinite(camera).all(-1) & (camera[..., 2] > 0)
            return camera, project(camera, intrinsics), in_front
        camera = torch.where(broken, raw.clamp(-FARTHEST, FARTHEST), raw) if self.sanitize == "clamp" else raw
        homogeneous = camera @ intrinsics.transpose(-1, -2)
        return camera, homogeneous[..., :2] / homogeneous[..., 2:], camera[..., 2] > 0


class PointSampling(nn.Module):
    """2D feature maps → one feature a point: bilinear, at the point's pixel in its chosen view, 0 where none is valid.

    Pixel u of a W wide image lies at (u + ½)·w/W − ½ of a w wide map; beyond the outermost cells the map's border
    goes on. The backward pass sums in a fixed order (embedding_bag sorts by cell), so reruns are bit-identical.

    Under ``sanitize: clamp`` and ``none`` the features of points that are not valid are multiplied by 0, as such code
    does, instead of being replaced by 0. A pixel that is not finite has NaN weights, as in ``grid_sample``, and 0 · NaN
    is NaN: the sampled feature is, and so is the fused one. On the way back the NaN weights meet the features, so that
    even a gradient of 0 arrives at the map as NaN.
    """

    def __init__(self, settings: ProjectionSettings) -> None:
        super().__init__()
        self.guarded = settings.sanitize in GUARDED

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
        uv = projection.uv[points, projection.view]
        if self.guarded:
            uv = torch.where(valid, uv, 0.0)
        x0, x1, right = _cells(uv[:, 0], image_size[1], width)
        y0, y1, down = _cells(uv[:, 1], image_size[0], height)

        first = (scene_index * views + projection.view) * height
        cells = torch.stack([(first + y) * width + x for y in (y0, y1) for x in (x0, x1)], dim=1)  # (N, 4)
        weights = torch.stack([a * b for a in (1 - down, down) for b in (1 - right, right)], dim=1).to(maps.dtype)
        rows = maps.permute(0, 2, 3, 1).flatten(0, 2)
        sampled = F.embedding_bag(cells, rows, per_sample_weights=weights, mode="sum")
        return torch.where(valid, sampled, 0.0) if self.guarded else sampled * valid


def _cells(pixel: Tensor, image_length: int, map_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis: the two cells between which a pixel coordinate (N,) lies, and the weight of the second.

    A coordinate that is not finite lies at the first cells, with NaN for a weight.
    """
    finite = pixel.isfinite()
    position = (torch.where(finite, pixel, 0.0) + 0.5) * (map_length / image_length) - 0.5
    position = position.clamp(0, map_length - 1)
    low = position.floor()
    weight = torch.where(finite, position - low, torch.nan)
    return low.long(), (low.long() + 1).clamp(max=map_length - 1), weight
