"""Losses between a predicted and a true mask, for pairs and for all combinations.

Legend: P matched pairs · Q queries · G objects · M elements of a mask (points or superpoints).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def mask_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy, mean over all elements of all pairs: (P, M) logits, (P, M) in {0, 1} → ().

    NaN for P = 0.
    """
    return F.binary_cross_entropy_with_logits(logits, targets)


def mask_dice(logits: Tensor, targets: Tensor) -> Tensor:
    """1 − (2|p∩t| + 1) / (|p| + |t| + 1), mean over the pairs: (P, M), (P, M) → ().

    Source: Milletari et al., "V-Net", 3DV 2016, with the +1 of Mask2Former. NaN for P = 0.
    """
    share = logits.sigmoid()
    overlap = (share * targets).sum(dim=1)
    return (1 - (2 * overlap + 1) / (share.sum(dim=1) + targets.sum(dim=1) + 1)).mean()


def pairwise_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of every query with every object, mean over the elements: (Q, M), (G, M) → (Q, G)."""
    # −t log σ(x) − (1 − t) log(1 − σ(x)) = softplus(x) − t x
    return (F.softplus(logits).sum(dim=1, keepdim=True) - logits @ targets.T) / logits.shape[1]


def pairwise_dice(logits: Tensor, targets: Tensor) -> Tensor:
    """Dice loss of every query with every object: (Q, M), (G, M) → (Q, G)."""
    share = logits.sigmoid()
    total = share.sum(dim=1)[:, None] + targets.sum(dim=1)[None, :]
    return 1 - (2 * share @ targets.T + 1) / (total + 1)


@torch.no_grad()
def mask_iou(logits: Tensor, targets: Tensor) -> Tensor:
    """Intersection over union of the binarised masks: (P, M), (P, M) → (P,)."""
    inside, truth = logits.sigmoid() >= 0.5, targets > 0.5
    union = (inside | truth).sum(dim=1)
    return (inside & truth).sum(dim=1) / (union + 1e-6)
