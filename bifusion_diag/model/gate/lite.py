"""LiteFusionGate: how much of each point's feature comes from the image (document 003, part 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bifusion_diag.config.settings import GateSettings
from bifusion_diag.model.gate.learned import LearnedGate


class LiteFusionGate(LearnedGate):
    """α from the point's own features: σ(MLP([f2D ‖ f3D])).

    Args:
        settings: hidden width, and α of points without a view.
        width: C.
        early_share: share of the run, 0..1.
    """

    def __init__(self, settings: GateSettings, width: int, *, early_share: float) -> None:
        super().__init__(settings, early_share=early_share)
        self.point_mlp = nn.Sequential(nn.Linear(2 * width, settings.hidden), nn.ReLU(), nn.Linear(settings.hidden, 1))
        self.channel = nn.Linear(width, width)

    def score(self, f2d: Tensor, f3d: Tensor, point_counts: Sequence[int], xyz: Tensor) -> Tensor:
        """Logits of α, (N, 1). Neither scenes nor places matter."""
        logits: Tensor = self.point_mlp(torch.cat([f2d, f3d], 1))
        return logits
