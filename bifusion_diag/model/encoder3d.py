"""The 3D baseline's encoder: the sparse U-Net alone."""

from __future__ import annotations

from torch import nn

from bifusion_diag.config.settings import BackboneSettings
from bifusion_diag.data.batch import Batch
from bifusion_diag.model.outputs import EncoderOutput, Scales
from bifusion_diag.model.sparse import Engine
from bifusion_diag.model.unet import Res16UNet


class Encoder3D(nn.Module):
    """Colours of the points → U-Net → features of the points, as wide as the U-Net's last level.

    Args:
        settings: of the U-Net.
        engine: who convolves.
        scales: hand on the features of every scale too.

    Attributes:
        out_channels: width of the fused features.
    """

    def __init__(self, settings: BackboneSettings, *, engine: Engine, scales: bool = False) -> None:
        super().__init__()
        self.scales = scales
        self.backbone = Res16UNet(settings, in_channels=3, engine=engine)
        self.out_channels = self.backbone.out_channels

    def forward(self, batch: Batch) -> EncoderOutput:
        """Encode the augmented points of every scene."""
        voxels = self.backbone.voxelize(batch.coords, batch.color, batch.scene_index)
        if not self.scales:
            features = voxels.slice(self.backbone(voxels.tensor))
            return EncoderOutput(fused=features, f3d=features)
        tensors = self.backbone(voxels.tensor, every_scale=True)
        features = voxels.slice(tensors[-1])
        return EncoderOutput(fused=features, f3d=features, scales=Scales(tensors, voxels.inverse))

    def provenance(self) -> dict[str, str]:
        """What convolves, for the run record."""
        return {"sparse_engine": f"{self.backbone.engine.name} {self.backbone.engine.version}"}
