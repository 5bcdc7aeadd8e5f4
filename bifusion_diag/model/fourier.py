"""Fourier features of positions: Tancik et al., "Fourier features let networks learn high frequency functions in low
dimensional domains", NeurIPS 2020, section 5 (Gaussian mapping).

Legend: M positions · d width of the code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class FourierEncoding(nn.Module):
    """[sin(2π x B), cos(2π x B)] with B drawn once from a normal distribution; B is stored and never trained.

    Args:
        width: d, even.
        scale: standard deviation of B.
    """

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(3, width // 2) * scale)
        self.frequencies: Tensor

    def forward(self, positions: Tensor) -> Tensor:
        """(M, 3) in [0, 1] → (M, d)."""
        angles = 2 * math.pi * positions @ self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def within_box(positions: Tensor, box: Tensor) -> Tensor:
    """Positions in units of the box around some points: (M, 3), (M', 3) → (M, 3); 0 along a side without length."""
    low, high = box.amin(dim=0), box.amax(dim=0)
    side = high - low
    return (positions - low) / torch.where(side > 0, side, 1.0)
