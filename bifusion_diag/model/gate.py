"""LiteFusionGate: how much of each point's feature comes from the image (document 003, part 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bifusion_diag.config.settings import GateSettings
from bifusion_diag.model.outputs import GateOutput


class LiteFusionGate(nn.Module):
    """A weight α a point, then a weight for each channel of each scene (squeeze and excitation; Hu et al., 2018).

    α = σ(MLP([f2D ‖ f3D])), lowered to ``invalid_alpha`` for points that no view sees; fused = w ⊙ (α f2D + (1−α) f3D)
    with w = σ(Linear(mean over the scene's points)). Document 003 names a last L2 normalisation of the fused feature
    in its log but not in its formula of the gate; the formula is what is built.

    For the first ``early_share`` of a run, α is the constant ½ and its MLP is frozen. Until :meth:`set_progress` is
    called, the gate is past that phase.

    Args:
        settings: hidden width, and α of points without a view.
        width: C.
        early_share: share of the run, 0..1.
    """

    def __init__(self, settings: GateSettings, width: int, *, early_share: float) -> None:
        super().__init__()
        self.invalid_alpha = settings.invalid_alpha
        self.early_share = early_share
        self.early = False
        self.point_mlp = nn.Sequential(nn.Linear(2 * width, settings.hidden), nn.ReLU(), nn.Linear(settings.hidden, 1))
        self.channel = nn.Linear(width, width)

    def set_progress(self, step: int, total_steps: int) -> None:
        """Enter or leave the early phase; ``requires_grad`` of the MLP is only written when that changes."""
        at_least = 1 if self.early_share > 0 and total_steps > 1 else 0  # a short run visits the phase too
        early = step < max(at_least, round(self.early_share * total_steps))
        if early != self.early:
            self.point_mlp.requires_grad_(not early)
            self.early = early

    def forward(self, f2d: Tensor, f3d: Tensor, valid: Tensor, point_counts: Sequence[int]) -> GateOutput:
        """Fuse.

        Args:
            f2d: (N, C), 0 or arbitrary where not valid.
            f3d: (N, C).
            valid: (N,) bool.
            point_counts: points of each scene, B numbers whose sum is N.
        """
        seen = valid[:, None]
        alpha = f2d.new_full((len(f2d), 1), 0.5) if self.early else self.point_mlp(torch.cat([f2d, f3d], 1)).sigmoid()
        alpha = torch.where(seen, alpha, self.invalid_alpha)
        mixed = alpha * f2d + (1 - alpha) * f3d
        scenes = mixed.split(list(point_counts))  # scene by scene: a NaN in one scene stays there
        means = torch.stack([scene.sum(0) / max(len(scene), 1) for scene in scenes])
        channel_weight = self.channel(means).sigmoid()
        fused = torch.cat([weight * scene for weight, scene in zip(channel_weight, scenes, strict=True)])
        return GateOutput(fused=fused, alpha=alpha, channel_weight=channel_weight)
