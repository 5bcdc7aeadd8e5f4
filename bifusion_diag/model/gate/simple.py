"""SimpleFusion: the mean of both branches, nothing learned (document 001, plan A)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bifusion_diag.model.outputs import GateOutput


class SimpleFusion(nn.Module):
    """(f2D + f3D) / 2 at valid points, f3D elsewhere.

    α is ½ and 0 accordingly and every channel weighs 1, so that instruments read it like a gate.
    """

    def forward(self, f2d: Tensor, f3d: Tensor, valid: Tensor, point_counts: Sequence[int], xyz: Tensor) -> GateOutput:
        """Fuse; the arguments are those of :meth:`LearnedGate.forward`."""
        seen = valid[:, None]
        return GateOutput(
            fused=torch.where(seen, (f2d + f3d) / 2, f3d),
            alpha=0.5 * seen.to(f3d.dtype),
            channel_weight=f3d.new_ones(len(point_counts), f3d.shape[1]),
        )
