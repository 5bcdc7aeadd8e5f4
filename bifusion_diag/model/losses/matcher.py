"""Which query is responsible for which object.

Legend: Q queries · G objects · M elements of a mask · K instance classes.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from bifusion_diag.config.settings import InstanceLossSettings
from bifusion_diag.model.losses.masks import pairwise_bce, pairwise_dice
from bifusion_diag.model.losses.targets import SceneTargets
from bifusion_diag.model.outputs import Matches


@torch.no_grad()
def match(
    classes: Tensor, masks: Tensor, labels: Tensor, targets: Tensor, allowed: Tensor, settings: InstanceLossSettings
) -> Matches:
    """Match objects with queries.

    ``sparse``: each object with its cheapest queries among those that lie inside it. As ESAM's sparse matcher does, a
    query is taken if its cost is strictly below the object's (k+1)-th smallest cost. So an object stays without a match
    if no query lies inside it, or if more than k queries tie for the k-th place.

    ``hungarian``: the one-to-one assignment with the smallest total cost (Carion et al., "DETR", ECCV 2020). It is
    found on the host. A query whose cost is not finite is matched with nothing.

    Args:
        classes: (Q, K + 1) logits.
        masks: (Q, M) logits.
        labels: (G,) int64 in 0..K-1.
        targets: (G, M) bool.
        allowed: (Q, G) bool: the query may be matched with the object.
        settings: matcher, costs, and k = ``match_topk``.

    Returns:
        The pairs. With ``sparse``, a query may be in several if it is allowed for several objects.
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
    return (
        _cheapest_assignment(cost) if settings.matcher == "hungarian" else _cheapest_queries(cost, settings.match_topk)
    )


def _cheapest_queries(cost: Tensor, k: int) -> Matches:
    """The pairs whose cost (Q, G) is strictly below the object's (k+1)-th smallest."""
    if len(cost) > k:
        limit = cost.topk(k + 1, dim=0, largest=False, sorted=True).values[-1]
    else:
        limit = cost.new_full((cost.shape[1],), float("inf"))
    pairs = (cost < limit).nonzero()
    return Matches(pairs[:, 0], pairs[:, 1])


def _cheapest_assignment(cost: Tensor) -> Matches:
    """The one-to-one pairs of the smallest total cost (Q, G); pairs whose cost is not finite are left out."""
    values = cost.double().cpu()
    possible = values.isfinite()
    spread = float(values[possible].max() - values[possible].min()) if bool(possible.any()) else 0.0
    # More than all that the rest of an assignment can save: as many possible pairs as there can be are taken.
    forbidden = values.masked_fill(~possible, 0.0).amax() + (spread + 1.0) * (min(values.shape) + 1)
    queries, objects = linear_sum_assignment(values.where(possible, forbidden).numpy())
    pairs = torch.stack([torch.as_tensor(queries), torch.as_tensor(objects)], dim=1)
    pairs = pairs[possible[pairs[:, 0], pairs[:, 1]]].to(cost.device)
    return Matches(pairs[:, 0], pairs[:, 1])


def allowed_pairs(
    query_superpoints: Tensor, query_classes: Tensor | None, target: SceneTargets, matcher: str
) -> Tensor:
    """Which queries may be matched with which objects.

    A superpoint query takes objects that it lies inside, unless the matcher is hungarian: then any. A text query takes
    objects of its semantic class, wherever they are. Every other query takes any object.

    Args:
        query_superpoints: (Q,) int64, -1 = not a superpoint.
        query_classes: (Q,) int64 class of a text query, -1 = not a text query; None = there are none.
        target: of the scene, with G objects.
        matcher: "sparse" or "hungarian".

    Returns:
        (Q, G) bool.
    """
    if matcher == "sparse":
        allowed = queries_inside(query_superpoints, target.superpoint_masks)
    else:
        allowed = target.superpoint_masks.new_ones(len(query_superpoints), len(target.superpoint_masks))
    if query_classes is None:
        return allowed
    return allowed & ((query_classes[:, None] == target.object_semantic[None, :]) | (query_classes < 0)[:, None])


def queries_inside(query_superpoints: Tensor, superpoint_masks: Tensor) -> Tensor:
    """Which queries lie inside which objects.

    Args:
        query_superpoints: (Q,) int64, -1 = not a superpoint: it counts as inside every object.
        superpoint_masks: (G, S) bool.

    Returns:
        (Q, G) bool.
    """
    anywhere = (query_superpoints < 0)[:, None]
    return superpoint_masks.T.index_select(0, query_superpoints.clamp(min=0)) | anywhere
