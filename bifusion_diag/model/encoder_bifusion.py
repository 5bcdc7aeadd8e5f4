"""BiFusion's encoder: a frozen CLIP branch and a sparse U-Net, fused point by point (document 003).

Legend: B scenes · V views a scene · N points in the batch · C common width · D width of CLIP's tokens.
"""

from __future__ import annotations

from torch import Tensor, nn

from bifusion_diag.config.settings import ModelSettings
from bifusion_diag.data.batch import Batch
from bifusion_diag.model.clip import ClipVisual
from bifusion_diag.model.film import FiLM
from bifusion_diag.model.gate import LiteFusionGate
from bifusion_diag.model.geometry_encoding import SIGNALS, GeometricEncoding, camera_rotation
from bifusion_diag.model.heads import L2Normalize, ProjectionHead, VoxelHead
from bifusion_diag.model.outputs import ClipTokens, EncoderOutput, Projection
from bifusion_diag.model.projection import PointProjection, PointSampling
from bifusion_diag.model.sparse import Engine
from bifusion_diag.model.unet import Res16UNet


class BiFusionEncoder(nn.Module):
    """Images and points → fused features of the points.

    Where the 2D features are L2-normalised is a setting. ``before_sampling`` normalises the map, so that a sampled
    feature is at most 1 long and a point out of view is 0 without a gradient. ``after_sampling`` normalises what was
    sampled, and so divides the zero vectors of points out of view by 1e-12: their gradient, before the sampling
    discards it, is 1e12 times what came in.

    Args:
        settings: of the model.
        early_share: share of the run for which the gate is held at ½.
        engine: who convolves.

    Attributes:
        out_channels: C.
    """

    def __init__(self, settings: ModelSettings, *, early_share: float, engine: Engine) -> None:
        super().__init__()
        width, clip = settings.common_width, settings.clip
        self.out_channels = width
        self.normalize_map = settings.projection.normalize == "before_sampling"
        # in the order of their execution, which is the order instruments list them in
        self.clip = ClipVisual(clip)
        self.spatial_head = ProjectionHead(
            clip.width, clip.head_hidden, width, dropout=clip.head_dropout, batchnorm=clip.head_batchnorm
        )
        # no BatchNorm: the global tokens of a batch are too few rows for it, often a single one
        self.global_head = ProjectionHead(clip.width, clip.head_hidden, width, dropout=clip.head_dropout)
        self.normalize_global = L2Normalize(dim=1)
        self.projection = PointProjection(settings.projection)
        self.sampling = PointSampling()
        self.normalize2d = L2Normalize(dim=1)
        self.backbone = Res16UNet(settings.backbone, in_channels=3, engine=engine)
        self.head3d = VoxelHead(self.backbone.out_channels, width)
        self.normalize3d = L2Normalize(dim=1)
        self.geometry = GeometricEncoding()
        self.film = FiLM(SIGNALS, settings.film_hidden, width)
        self.gate = LiteFusionGate(settings.gate, width, early_share=early_share)

    def forward(self, batch: Batch) -> EncoderOutput:
        """Encode. The U-Net sees the augmented points; everything that meets the images, the captured ones."""
        clip: ClipTokens = self.clip(batch.images)
        global2d = self.global_head(clip.pooled).unflatten(0, batch.images.shape[:2]).mean(1)
        projection: Projection = self.projection(
            batch.xyz, batch.point_counts, batch.depth, batch.intrinsics, batch.pose
        )
        f2d = self._point_features(clip.tokens, projection, batch)
        voxels = self.backbone.voxelize(batch.coords, batch.color, batch.scene_index)
        f3d = self.normalize3d(voxels.slice(self.head3d(self.backbone(voxels.tensor))))

        encoding = self.geometry(
            batch.xyz,
            batch.scene_index,
            batch.superpoint,
            scenes=batch.batch_size,
            superpoints=sum(batch.superpoint_counts),
            rotation=camera_rotation(batch.pose, projection, batch.scene_index),
        )
        gate = self.gate(*self.film(encoding, f2d, f3d), projection.valid, batch.point_counts)
        return EncoderOutput(
            fused=gate.fused,
            f3d=f3d,
            f2d=f2d,
            alpha=gate.alpha,
            valid=projection.valid,
            global2d=self.normalize_global(global2d),
        )

    def provenance(self) -> dict[str, str]:
        """Which CLIP weights, and what convolves, for the run record."""
        engine = self.backbone.engine
        return {"clip_weights": self.clip.provenance, "sparse_engine": f"{engine.name} {engine.version}"}

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
