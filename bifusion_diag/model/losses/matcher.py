"""Which query is responsible for which object.

Legend: Q queries · G objects · M elements of a mask · K instance classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bifusion_diag.config.settings import InstanceLossSettings
from bifusion_diag.model.losses.masks import pairwise_bce, pairwise_dice


class Matches(NamedTuple):
    """Matched pairs of a scene."""

    queries: Tensor  # (P,) int64
    objects: Tensor  # (P,) int64


@torch.no_grad()
def match(
    classes: Tensor, masks: Tensor, labels: Tensor, targets: Tensor, allowed: Tensor, settings: InstanceLossSettings
) -> Matches:
    """Match each object with its cheapest queries among those that lie inside it.

    As ESAM's sparse matcher does: a query is taken if its cost is strictly below the object's (k+1)-th smallest cost.
    So an object stays without a match if no query lies inside it, or if more than k queries tie for the k-th place.

    Args:
        classes: (Q, K + 1) logits.
        masks: (Q, M) logits.
        labels: (G,) int64 in 0..K-1.
        targets: (G, M) bool.
        allowed: (Q, G) bool: the query may be matched with the object.
        settings: costs, and k = ``match_topk``.

    Returns:
        The pairs; a query may be in several if it is allowed for several objects.
    """
    if len(labels) == 0:
        return Matches(labels.new_empty(0), labels.new_empty(0))
    truth = targets.to(masks.dtype)
    cost = (
        settings.match_class * -classes.softmax(dim=1)[:, labels]
        + settings.match_bce * pairwise_bce(masks, truth)
        + settings.match_dice * pairwise_dice(masks, truth)
    )
    cost = cost.masked_fill(~allowed, float("inf"))
    k = settings.match_topk
    if len(cost) > k:
        limit = cost.topk(k + 1, dim=0, largest=False, sorted=True).values[-1]
    else:
        limit = cost.new_full((len(labels),), float("inf"))
    pairs = (cost < limit).nonzero()
    return Matches(pairs[:, 0], pairs[:, 1])


def queries_inside(query_superpoints: Tensor, superpoint_masks: Tensor) -> Tensor:
    """Which queries may be matched with which objects.

    Args:
        query_superpoints: (Q,) int64, -1 = a learnable query, which may take any object.
        superpoint_masks: (G, S) bool.

    Returns:
        (Q, G) bool.
    """
    learnable = (query_superpoints < 0)[:, None]
    return superpoint_masks.T.index_select(0, query_superpoints.clamp(min=0)) | learnable
