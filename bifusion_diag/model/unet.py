"""Res16UNet: the residual sparse U-Net of MinkowskiNet (Choy et al., CVPR 2019) as ESAM uses it.

Module and parameter names are those of the public Res16UNet family, so that its checkpoints fit.
"""

from __future__ import annotations

from torch import Tensor, nn

from bifusion_diag.config.settings import BackboneSettings
from bifusion_diag.model.sparse import (
    BatchNorm,
    Conv3d,
    ConvTranspose3d,
    Engine,
    Geometry,
    ReLU,
    SparseTensor,
    Voxels,
    concatenate,
    voxelize,
)

# ESAM passes its BatchNorm momentum to every norm but those inside the residual blocks, which keep the default.
BLOCK_BN_MOMENTUM = 0.1

# Names of (convolution, norm, residual blocks) of the scales, in order of execution.
DOWN = (
    ("conv1p1s2", "bn1", "block1"),
    ("conv2p2s2", "bn2", "block2"),
    ("conv3p4s2", "bn3", "block3"),
    ("conv4p8s2", "bn4", "block4"),
)
UP = (
    ("convtr4p16s2", "bntr4", "block5"),
    ("convtr5p8s2", "bntr5", "block6"),
    ("convtr6p4s2", "bntr6", "block7"),
    ("convtr7p2s2", "bntr7", "block8"),
)


class BasicBlock(nn.Module):
    """conv - norm - relu - conv - norm, plus the input (through a 1×1 conv and norm where the width changes), relu."""

    def __init__(self, in_channels: int, channels: int, *, shortcut_momentum: float) -> None:
        super().__init__()
        self.conv1 = Conv3d(in_channels, channels, 3)
        self.norm1 = BatchNorm(channels, momentum=BLOCK_BN_MOMENTUM)
        self.conv2 = Conv3d(channels, channels, 3)
        self.norm2 = BatchNorm(channels, momentum=BLOCK_BN_MOMENTUM)
        self.relu = ReLU()
        self.downsample = None
        if in_channels != channels:
            shortcut = Conv3d(in_channels, channels, 1)
            self.downsample = nn.Sequential(shortcut, BatchNorm(channels, momentum=shortcut_momentum))

    def forward(self, x: SparseTensor) -> SparseTensor:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(out.with_feats(out.feats + shortcut.feats))


def _blocks(in_channels: int, channels: int, count: int, momentum: float) -> nn.Sequential:
    widths = [in_channels] + [channels] * (count - 1)
    return nn.Sequential(*(BasicBlock(width, channels, shortcut_momentum=momentum) for width in widths))


class Res16UNet(nn.Module):
    """Features of voxels: four scales down, four up.

    Args:
        settings: widths, depths, first kernel, voxel size.
        in_channels: channels of the voxels' features.
        engine: who convolves.
    """

    def __init__(self, settings: BackboneSettings, in_channels: int = 3, *, engine: Engine) -> None:
        super().__init__()
        planes, layers, momentum = settings.planes, settings.layers, settings.bn_momentum
        first = settings.init_dim
        self.voxel_size = settings.voxel_size
        self.engine = engine
        self.out_channels = planes[-1]
        self.conv0p1s1 = Conv3d(in_channels, first, settings.first_kernel)
        self.bn0 = BatchNorm(first, momentum=momentum)
        width = first
        for (conv, norm, block), channels, count in zip(DOWN, planes[:4], layers[:4], strict=True):
            self.add_module(conv, Conv3d(width, width, 2, stride=2))
            self.add_module(norm, BatchNorm(width, momentum=momentum))
            self.add_module(block, _blocks(width, channels, count, momentum))
            width = channels
        skips = (planes[2], planes[1], planes[0], first)
        for (conv, norm, block), channels, count, skip in zip(UP, planes[4:], layers[4:], skips, strict=True):
            self.add_module(conv, ConvTranspose3d(width, channels, 2, stride=2))
            self.add_module(norm, BatchNorm(channels, momentum=momentum))
            self.add_module(block, _blocks(channels + skip, channels, count, momentum))
            width = channels
        self.relu = ReLU()

    def voxelize(self, coords: Tensor, feats: Tensor, scene_index: Tensor) -> Voxels:
        """Put points into this network's voxels.

        Args:
            coords: (N, 3) [m].
            feats: (N, in_channels).
            scene_index: (N,) int64, 0..B-1.

        Returns:
            Voxels whose ``tensor`` goes in here, and whose ``slice`` takes what comes out back to the points.

        Raises:
            UserError: no points, or coordinates that cannot be voxelised.
        """
        voxels = voxelize(coords, feats, scene_index, self.voxel_size, self.engine)
        voxels.tensor.maps.prepare(self.geometries())
        return voxels

    def geometries(self) -> list[Geometry]:
        """Those of all layers, finer scales first."""
        found = [Geometry(1, self.conv0p1s1.kernel_size), Geometry(1, 3)]
        for stride in (1, 2, 4, 8):
            found += [Geometry(stride, 2, stride=2), Geometry(2 * stride, 3)]
        return found

    def forward(self, x: SparseTensor, *, every_scale: bool = False) -> SparseTensor | list[SparseTensor]:
        """Features of the voxels.

        Args:
            x: (M, in_channels) on the finest voxels.
            every_scale: return the features of every scale of the way up.

        Returns:
            (M, out_channels) on the same voxels; or five tensors, coarsest first: after ``block4`` (stride 16),
            ``block5`` (8), ``block6`` (4), ``block7`` (2), and ``block8`` (1), which is the one returned otherwise.
        """
        x = self.relu(self.bn0(self.conv0p1s1(x)))
        skips = []
        for conv, norm, block in DOWN:
            skips.append(x)
            x = self.relu(self.get_submodule(norm)(self.get_submodule(conv)(x)))
            x = self.get_submodule(block)(x)
        scales = [x]
        for conv, norm, block in UP:
            x = self.relu(self.get_submodule(norm)(self.get_submodule(conv)(x)))
            x = self.get_submodule(block)(concatenate([x, skips.pop()]))
            scales.append(x)
        return scales if every_scale else x
