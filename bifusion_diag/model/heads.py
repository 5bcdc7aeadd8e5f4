"""Small modules between the two backbones and the common feature space."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from bifusion_diag.model.sparse import BatchNorm, Conv3d, ReLU


class ProjectionHead(nn.Module):
    """CLIP token → common width: LayerNorm → GELU → Linear → GELU → Linear (document 003).

    The linear layers start from Xavier's uniform distribution (Glorot & Bengio, AISTATS 2010) and zero biases.

    Args:
        in_width: D, width of CLIP's tokens.
        hidden: width between the two linear layers.
        out_width: C, the common width.
        dropout: share of the hidden signals dropped in training.
        batchnorm: normalise the first linear layer's output over all tokens of the batch.
    """

    def __init__(
        self, in_width: int, hidden: int, out_width: int, *, dropout: float = 0.0, batchnorm: bool = False
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.LayerNorm(in_width), nn.GELU(), nn.Linear(in_width, hidden)]
        if batchnorm:
            layers.append(nn.BatchNorm1d(hidden))
        layers.append(nn.GELU())
        if dropout:
            layers.append(nn.Dropout(dropout))
        layers.append(nn.Linear(hidden, out_width))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens (n, D) to (n, C)."""
        projected: Tensor = self.layers(tokens)
        return projected


class VoxelHead(nn.Sequential):
    """1×1 sparse convolution → BatchNorm → ReLU on the voxels of the 3D backbone: (M, in_width) → (M, out_width)."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.conv = Conv3d(in_width, out_width, 1)
        self.norm = BatchNorm(out_width)
        self.relu = ReLU()


class L2Normalize(nn.Module):
    """x / max(‖x‖₂, 1e-12) along one dimension.

    A module rather than a call, so that instruments can watch what goes in and what comes back: at a zero vector the
    backward gain is 1 / 1e-12.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` along ``dim``; the shape stays."""
        return F.normalize(x, dim=self.dim)


#: For rows of features (N, C), where no instrument is to look.
L2_ROWS = L2Normalize(dim=1)
