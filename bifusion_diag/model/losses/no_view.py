"""Points that no view sees learn from near points that the gate trusts (document 003).

The pseudo-label of a point without a view is the 2D feature it would have had: the mean direction of the 2D features of
its nearest neighbours with α above a threshold. Its 3D feature is pulled towards it, as ``clip_align`` does at points
that have a view: 1 − cos, in the common space before FiLM. The label is detached, so that confident points do not move
towards unseen ones. While the gate is frozen at α = 0.5 there is no confident point and the term is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bifusion_diag.config.settings import NoViewSettings
from bifusion_diag.data.batch import Batch
from bifusion_diag.model.heads import L2_ROWS
from bifusion_diag.model.neighbours import draw, neighbourhoods
from bifusion_diag.model.outputs import EncoderOutput

_NEIGHBOURS = 8  # as many as the spatial consistency of document 003 looks at


def no_view_loss(
    encoder: EncoderOutput, batch: Batch, settings: NoViewSettings, normalize3d: nn.Module = L2_ROWS
) -> Tensor:
    """Pull the 3D features of unseen points to the 2D features of confident neighbours.

    Args:
        encoder: output of a fused encoder.
        batch: neighbours are found in its un-augmented coordinates.
        settings: threshold of α, radius [m], and how many unseen points are drawn a step.
        normalize3d: the L2 normalisation of the 3D features, a module of the criterion's that instruments can watch.

    Returns:
        (), in [0, 2]; 0 if no unseen point has a confident neighbour within the radius.
    """
    assert encoder.f2d is not None
    assert encoder.alpha is not None
    assert encoder.valid is not None
    confident = encoder.valid & (encoder.alpha.detach()[:, 0] > settings.confidence)
    unseen = draw((~encoder.valid).nonzero()[:, 0], settings.max_points)
    losses = []
    for found in neighbourhoods(
        batch.xyz, batch.point_counts, unseen, confident.cpu().numpy(), k=_NEIGHBOURS, radius=settings.radius
    ):
        near = (found.neighbours >= 0).any(axis=1)
        points, rows = (
            torch.from_numpy(part[near]).to(encoder.f3d.device) for part in (found.points, found.neighbours)
        )
        label = _mean_direction(encoder.f2d.detach(), rows)
        losses.append(1 - (normalize3d(encoder.f3d.index_select(0, points)) * label).sum(dim=1))
    if not losses or not sum(len(loss) for loss in losses):
        return encoder.f3d[:0].sum()
    return torch.cat(losses).mean()


def _mean_direction(features: Tensor, rows: Tensor) -> Tensor:
    """Direction of the mean of unit features: (N, C), (A, k) rows with -1 = none → (A, C)."""
    unit = F.normalize(features[rows.clamp(min=0)], dim=2)
    return F.normalize((unit * (rows >= 0)[:, :, None]).sum(dim=1), dim=1)
