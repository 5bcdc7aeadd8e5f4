"""Neighbouring points should have similar 3D features: mean of 1 − cos over pairs of neighbours (document 003).

Both sides of a pair are pulled, and nothing is pushed apart.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from bifusion_diag.config.settings import SpatialConsistencySettings
from bifusion_diag.data.batch import Batch
from bifusion_diag.model.heads import L2_ROWS
from bifusion_diag.model.neighbours import draw, neighbourhoods


def spatial_consistency_loss(
    features: Tensor, batch: Batch, settings: SpatialConsistencySettings, normalize3d: nn.Module = L2_ROWS
) -> Tensor:
    """Compare drawn points with their k nearest neighbours among all points of the scene.

    Args:
        features: (N, C) 3D features.
        batch: neighbours are found in its un-augmented coordinates.
        settings: k, and how many points are drawn a step.
        normalize3d: the L2 normalisation of the features, a module of the criterion's that instruments can watch.

    Returns:
        (), in [0, 2]; 0 if no scene has two points.
    """
    points = draw(torch.arange(len(features)), settings.max_points)
    everywhere = np.ones(len(features), dtype=bool)
    left, right = [], []
    for found in neighbourhoods(batch.xyz, batch.point_counts, points, everywhere, k=settings.neighbours):
        left.append(np.repeat(found.points, found.neighbours.shape[1]))
        right.append(found.neighbours.ravel())
    if not left:
        return features[:0].sum()
    unit = normalize3d(features)
    one, other = (torch.from_numpy(np.concatenate(rows)).to(features.device) for rows in (left, right))
    return (1 - (unit.index_select(0, one) * unit.index_select(0, other)).sum(dim=1)).mean()
