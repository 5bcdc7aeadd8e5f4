"""Axis-aligned boxes as (centre, size) [m].

Legend: P matched pairs · N points · S superpoints · G objects · Q queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bifusion_diag.model.segments import segment_mean


def object_boxes(coords: Tensor, masks: Tensor) -> Tensor:
    """Boxes around the points of each object.

    Args:
        coords: (N, 3) [m].
        masks: (G, N) bool, no row all False.

    Returns:
        (G, 6).
    """
    inside = masks[:, :, None]
    low = coords.masked_fill(~inside, float("inf")).amin(dim=1)
    high = coords.masked_fill(~inside, float("-inf")).amax(dim=1)
    return torch.cat([(low + high) / 2, high - low], dim=1)


def query_centres(coords: Tensor, superpoint: Tensor, superpoints: int, query_superpoints: Tensor) -> Tensor:
    """Where each query sits: its superpoint's mean, or the scene's for a learnable query (-1): (Q, 3)."""
    centres = segment_mean(coords, superpoint, superpoints)
    learnable = (query_superpoints < 0)[:, None]
    return torch.where(learnable, coords.mean(dim=0), centres.index_select(0, query_superpoints.clamp(min=0)))


def box_iou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 − IoU, mean over the pairs: (P, 6), (P, 6) → (). NaN for P = 0."""
    low = torch.maximum(predicted[:, :3] - predicted[:, 3:] / 2, target[:, :3] - target[:, 3:] / 2)
    high = torch.minimum(predicted[:, :3] + predicted[:, 3:] / 2, target[:, :3] + target[:, 3:] / 2)
    overlap = (high - low).clamp(min=0).prod(dim=1)
    union = predicted[:, 3:].prod(dim=1) + target[:, 3:].prod(dim=1) - overlap
    return (1 - overlap / union.clamp(min=1e-6)).mean()
