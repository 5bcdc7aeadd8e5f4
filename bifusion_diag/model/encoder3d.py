"""The 3D baseline's encoder: the sparse U-Net alone."""

from __future__ import annotations

from torch import nn

from bifusion_diag.config.settings import BackboneSettings
from bifusion_diag.data.batch import Batch
from bifusion_diag.model.outputs import EncoderOutput
from bifusion_diag.model.sparse import Engine
from bifusion_diag.model.unet import Res16UNet


class Encoder3D(nn.Module):
    """Colours of the points → U-Net → features of the points, as wide as the U-Net's last level.

    Attributes:
        out_channels: width of the fused features.
    """

    def __init__(self, settings: BackboneSettings, *, engine: Engine) -> None:
        super().__init__()
        self.backbone = Res16UNet(settings, in_channels=3, engine=engine)
        self.out_channels = self.backbone.out_channels

    def forward(self, batch: Batch) -> EncoderOutput:
        """Encode the augmented points of every scene."""
        voxels = self.backbone.voxelize(batch.coords, batch.color, batch.scene_index)
        features = voxels.slice(self.backbone(voxels.tensor))
        return EncoderOutput(fused=features, f3d=features)

    def provenance(self) -> dict[str, str]:
        """What convolves, for the run record."""
        return {"sparse_engine": f"{self.backbone.engine.name} {self.backbone.engine.version}"}
