"""BiFusion's encoder: a frozen CLIP branch and a sparse U-Net, fused point by point (document 003).

Legend: B scenes · V views a scene · N points in the batch · C common width · D width of CLIP's tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bifusion_diag.config.settings import ModelSettings
from bifusion_diag.data.batch import Batch
from bifusion_diag.model.clip import ClipVisual
from bifusion_diag.model.film import FiLM
from bifusion_diag.model.gate import LearnedGate, SimpleFusion, make_gate
from bifusion_diag.model.geometry_encoding import SIGNALS, GeometricEncoding, camera_rotation
from bifusion_diag.model.heads import L2Normalize, ProjectionHead, VoxelHead
from bifusion_diag.model.outputs import ClipTokens, EncoderOutput, GateOutput, Projection
from bifusion_diag.model.projection import PointProjection, PointSampling
from bifusion_diag.model.sparse import Engine
from bifusion_diag.model.unet import Res16UNet


class _ImageFeatures(NamedTuple):
    """What the 2D branch knows of a batch."""

    f2d: Tensor  # (N, C)
    global2d: Tensor  # (B, C), L2-normalised
    projection: Projection


class BiFusionEncoder(nn.Module):
    """Images and points → fused features of the points.

    Where the 2D features are L2-normalised is a setting. ``before_sampling`` normalises the map, so that a sampled
    feature is at most 1 long and a point out of view is 0 without a gradient. ``after_sampling`` normalises what was
    sampled, and so divides the zero vectors of points out of view by 1e-12: their gradient, before the sampling
    discards it, is 1e12 times what came in.

    Without CLIP (``clip.use: false``; 001, plan A) there is no 2D branch, no projection and no gate: the fused feature
    is the 3D feature after FiLM, whose encoding then has no camera, and the 2D outputs are None.

    Args:
        settings: of the model.
        early_share: share of the run for which the gate is held at ½.
        engine: who convolves.

    Attributes:
        out_channels: C.
        sees_images: there is a 2D branch.
    """

    clip: ClipVisual
    spatial_head: ProjectionHead
    global_head: ProjectionHead
    projection: PointProjection
    sampling: PointSampling
    gate: LearnedGate | SimpleFusion

    def __init__(self, settings: ModelSettings, *, early_share: float, engine: Engine) -> None:
        super().__init__()
        width = settings.common_width
        self.out_channels = width
        self.sees_images = settings.uses_clip
        # in the order of their execution, which is the order instruments list them in
        if self.sees_images:
            self._add_image_branch(settings)
        self.backbone = Res16UNet(settings.backbone, in_channels=3, engine=engine)
        self.head3d = VoxelHead(self.backbone.out_channels, width)
        self.normalize3d = L2Normalize(dim=1)
        self.geometry = GeometricEncoding()
        self.film = FiLM(SIGNALS, settings.film_hidden, width)
        if self.sees_images:
            self.gate = make_gate(settings, early_share=early_share)

    def _add_image_branch(self, settings: ModelSettings) -> None:
        clip, width = settings.clip, settings.common_width
        self.normalize_map = settings.projection.normalize == "before_sampling"
        self.projects_augmented = settings.projection.coordinates == "augmented"  # a mistake, on purpose
        self.clip = ClipVisual(clip)
        self.spatial_head = ProjectionHead(
            clip.width, clip.head_hidden, width, dropout=clip.head_dropout, batchnorm=clip.head_batchnorm
        )
        # no BatchNorm: the global tokens of a batch are too few rows for it, often a single one
        self.global_head = ProjectionHead(clip.width, clip.head_hidden, width, dropout=clip.head_dropout)
        self.normalize_global = L2Normalize(dim=1)
        self.projection = PointProjection(settings.projection)
        self.sampling = PointSampling(settings.projection)
        self.normalize2d = L2Normalize(dim=1)

    def forward(self, batch: Batch) -> EncoderOutput:
        """Encode. The U-Net sees the augmented points; everything that meets the images, the captured ones."""
        image = self._image_features(batch) if self.sees_images else None
        voxels = self.backbone.voxelize(batch.coords, batch.color, batch.scene_index)
        f3d = self.normalize3d(voxels.slice(self.head3d(self.backbone(voxels.tensor))))

        encoding = self.geometry(
            batch.xyz,
            batch.scene_index,
            batch.superpoint,
            scenes=batch.batch_size,
            superpoints=sum(batch.superpoint_counts),
            rotation=_rotation(batch, image),
        )
        if image is None:
            return EncoderOutput(fused=self.film(encoding, f3d)[0], f3d=f3d)
        valid = image.projection.valid
        gate: GateOutput = self.gate(*self.film(encoding, image.f2d, f3d), valid, batch.point_counts, batch.xyz)
        return EncoderOutput(
            fused=gate.fused, f3d=f3d, f2d=image.f2d, alpha=gate.alpha, valid=valid, global2d=image.global2d
        )

    def provenance(self) -> dict[str, str]:
        """Which CLIP weights, and what convolves, for the run record."""
        engine = self.backbone.engine
        weights = {"clip_weights": self.clip.provenance} if self.sees_images else {}
        return weights | {"sparse_engine": f"{engine.name} {engine.version}"}

    def _image_features(self, batch: Batch) -> _ImageFeatures:
        """The 2D branch."""
        clip: ClipTokens = self.clip(batch.images)
        global2d = self.global_head(clip.pooled).unflatten(0, batch.images.shape[:2]).mean(1)
        xyz = batch.coords if self.projects_augmented else batch.xyz
        projection: Projection = self.projection(xyz, batch.point_counts, batch.depth, batch.intrinsics, batch.pose)
        f2d = self._point_features(clip.tokens, projection, batch)
        return _ImageFeatures(f2d=f2d, global2d=self.normalize_global(global2d), projection=projection)

    def _point_features(self, tokens: Tensor, projection: Projection, batch: Batch) -> Tensor:
        """CLIP tokens (B·V, D, h, w) → 2D features at the points (N, C)."""
        images, _, height, width = tokens.shape
        rows = self.spatial_head(tokens.permute(0, 2, 3, 1).flatten(0, 2))
        if self.normalize_map:
            rows = self.normalize2d(rows)
        maps = rows.unflatten(0, (images, height, width)).permute(0, 3, 1, 2)
        frame_height, frame_width = batch.depth.shape[-2:]
        sampled: Tensor = self.sampling(maps, projection, batch.scene_index, (frame_height, frame_width))
        return sampled if self.normalize_map else self.normalize2d(sampled)


def _rotation(batch: Batch, image: _ImageFeatures | None) -> Tensor:
    """(N, 3, 3) rotation of the camera that sees each point; the identity where there is none."""
    if image is None:
        return torch.eye(3, dtype=batch.pose.dtype, device=batch.pose.device).expand(len(batch.xyz), 3, 3)
    return camera_rotation(batch.pose, image.projection, batch.scene_index)
