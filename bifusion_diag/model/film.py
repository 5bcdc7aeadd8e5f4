"""FiLM: feature-wise linear modulation (Perez et al., AAAI 2018)."""

from __future__ import annotations

from torch import Tensor, nn


class FiLM(nn.Module):
    """(1 + γ) ⊙ f + β, with γ and β from the geometric encoding: Linear → SiLU → Linear.

    The last layer starts at zero, so that the modulation starts as the identity. One γ and β serve all branches.

    Args:
        in_width: signals of the encoding.
        hidden: width between the linear layers.
        width: C, width of the features.
    """

    def __init__(self, in_width: int, hidden: int, width: int) -> None:
        super().__init__()
        last = nn.Linear(hidden, 2 * width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(nn.Linear(in_width, hidden), nn.SiLU(), last)

    def forward(self, encoding: Tensor, *features: Tensor) -> tuple[Tensor, ...]:
        """Modulate each of the features, (N, C), by the encoding (N, in_width)."""
        gamma, beta = self.mlp(encoding).chunk(2, dim=1)
        return tuple((1 + gamma) * branch + beta for branch in features)
