"""What the learned gates share: the early phase, the mix, and the weights of the channels (document 003, part 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bifusion_diag.config.settings import GateSettings
from bifusion_diag.model.outputs import GateOutput


class LearnedGate(nn.Module):
    """A weight α a point, then a weight for each channel of each scene (squeeze and excitation; Hu et al., 2018).

    α = σ(:meth:`score`), lowered to ``invalid_alpha`` for points that no view sees; fused = w ⊙ (α f2D + (1−α) f3D)
    with w = σ(Linear(mean over the scene's points)). Document 003 names a last L2 normalisation of the fused feature
    in its log but not in its formula of the gate; the formula is what is built.

    For the first ``early_share`` of a run, α is the constant ½ and all that makes it is frozen. Until
    :meth:`set_progress` is called, the gate is past that phase.

    Args:
        settings: α of points without a view.
        early_share: share of the run, 0..1.

    Attributes:
        channel: Linear(C → C) of w. A subclass sets it, after the parts that make α.
    """

    channel: nn.Linear

    def __init__(self, settings: GateSettings, *, early_share: float) -> None:
        super().__init__()
        self.invalid_alpha = settings.invalid_alpha
        self.early_share = early_share
        self.early = False

    def score(self, f2d: Tensor, f3d: Tensor, point_counts: Sequence[int], xyz: Tensor) -> Tensor:
        """Logits of α, (N, 1); the arguments are those of :meth:`forward`."""
        raise NotImplementedError

    def released_at(self, total_steps: int) -> int:
        """The first step after the early phase."""
        at_least = 1 if self.early_share > 0 and total_steps > 1 else 0  # a short run visits the phase too
        return max(at_least, round(self.early_share * total_steps))

    def set_progress(self, step: int, total_steps: int) -> None:
        """Enter or leave the early phase; ``requires_grad`` is only written when that changes."""
        early = step < self.released_at(total_steps)
        if early != self.early:
            for part in self.children():
                if part is not self.channel:
                    part.requires_grad_(not early)
            self.early = early

    def forward(self, f2d: Tensor, f3d: Tensor, valid: Tensor, point_counts: Sequence[int], xyz: Tensor) -> GateOutput:
        """Fuse.

        Args:
            f2d: (N, C), 0 or arbitrary where not valid.
            f3d: (N, C).
            valid: (N,) bool.
            point_counts: points of each scene, B numbers whose sum is N.
            xyz: (N, 3) world coordinates as captured [m], finite.
        """
        seen = valid[:, None]
        alpha = f2d.new_full((len(f2d), 1), 0.5) if self.early else self.score(f2d, f3d, point_counts, xyz).sigmoid()
        alpha = torch.where(seen, alpha, self.invalid_alpha)
        mixed = alpha * f2d + (1 - alpha) * f3d
        scenes = mixed.split(list(point_counts))  # scene by scene: a NaN in one scene stays there
        means = torch.stack([scene.sum(0) / max(len(scene), 1) for scene in scenes])
        channel_weight = self.channel(means).sigmoid()
        fused = torch.cat([weight * scene for weight, scene in zip(channel_weight, scenes, strict=True)])
        return GateOutput(fused=fused, alpha=alpha, channel_weight=channel_weight)
