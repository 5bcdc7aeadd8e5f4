"""Classification of queries as an object or as no object.

Legend: Q queries of a scene · K instance classes; class K is "no object".
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def no_object_cross_entropy(logits: Tensor, labels: Tensor, no_object_weight: float) -> Tensor:
    """Cross-entropy in which "no object" counts less: weighted mean over the queries.

    Args:
        logits: (Q, K + 1).
        labels: (Q,) int64 in 0..K; queries of several scenes may be concatenated.
        no_object_weight: weight of queries whose label is K; the others have 1.

    Returns:
        (); 0 if every weight is 0.
    """
    weights = logits.new_ones(logits.shape[1])
    weights[-1] = no_object_weight
    losses = F.cross_entropy(logits, labels, weights, reduction="none")
    return losses.sum() / weights[labels].sum().clamp(min=1e-12)


def focal_loss(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """−α_t (1 − p_t)^γ log p_t over the softmax, mean over the queries.

    α_t = α for an object and 1 − α for "no object". Source: Lin et al., "Focal Loss", ICCV 2017, equation 5.

    Args:
        logits: (Q, K + 1).
        labels: (Q,) int64 in 0..K.
        alpha: α.
        gamma: γ; 0 gives a cross-entropy weighted by α_t.

    Returns:
        ().
    """
    log_p = -F.cross_entropy(logits, labels, reduction="none")
    alpha_t = log_p.new_full(log_p.shape, alpha).masked_fill(labels == logits.shape[1] - 1, 1 - alpha)
    return -(alpha_t * (-log_p.expm1()).clamp(min=0) ** gamma * log_p).mean()
