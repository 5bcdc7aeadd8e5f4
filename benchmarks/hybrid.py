"""A model that nobody tuned for this project: torchvision's ResNet-50 below PyTorch's own transformer encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models import resnet50


class ConvTransformer(nn.Module):
    """ResNet-50 without its head, a 1×1 convolution to 512 channels, six encoder layers over the grid, a linear head.

    43.5 M parameters in 174 leaf modules.
    """

    def __init__(self, classes: int = 100) -> None:
        super().__init__()
        net = resnet50()
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.stages = nn.Sequential(net.layer1, net.layer2, net.layer3, net.layer4)
        self.neck = nn.Conv2d(2048, 512, 1)
        layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(512, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, classes)."""
        grid: Tensor = self.neck(self.stages(self.stem(images)))
        logits: Tensor = self.head(self.encoder(grid.flatten(2).transpose(1, 2)).mean(1))
        return logits


def random_batch(size: int, pixels: int, classes: int = 100) -> tuple[Tensor, Tensor]:
    """Noise and labels: images (size, 3, pixels, pixels), (size,) int64."""
    return torch.randn(size, 3, pixels, pixels), torch.randint(0, classes, (size,))
