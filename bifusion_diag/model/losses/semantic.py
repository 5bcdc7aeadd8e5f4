"""Cross-entropy over the semantic classes on superpoint and text queries.

Legend: Q queries of a scene · S superpoints of a scene · K semantic classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def semantic_loss(
    logits: Sequence[Tensor],
    query_superpoints: Sequence[Tensor],
    labels: Sequence[Tensor],
    query_classes: Sequence[Tensor] | None = None,
) -> Tensor:
    """Mean over the superpoint queries of a scene that have a label, then over the scenes that have such a query.

    A text query's label is its own class: that teaches the projection of the text features to keep the classes apart.
    The text queries' mean is added to the superpoints' mean, so that what the superpoints weigh does not depend on the
    number of classes.

    Args:
        logits: per scene (Q_i, K + 1); the last column ("unlabelled") takes no part.
        query_superpoints: per scene (Q_i,) int64, -1 = not a superpoint.
        labels: per scene (S_i,) int64 in 0..K-1, -1 = ignore.
        query_classes: per scene (Q_i,) int64 in 0..K-1, -1 = not a text query; None = there are no text queries.

    Returns:
        (); 0 if no query has a label (a mean over nothing would be NaN).
    """
    of_superpoints = _of_superpoints(logits, query_superpoints, labels)
    if query_classes is None:
        return of_superpoints
    of_texts = [
        F.cross_entropy(scene[:, :-1], classes, ignore_index=-1)
        for scene, classes in zip(logits, query_classes, strict=True)
    ]
    return of_superpoints + torch.stack(of_texts).mean()


def _of_superpoints(logits: Sequence[Tensor], query_superpoints: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """The superpoint queries' mean; 0 if none of them has a label."""
    losses = []
    for scene_logits, superpoints, scene_labels in zip(logits, query_superpoints, labels, strict=True):
        label = scene_labels.index_select(0, superpoints.clamp(min=0)).masked_fill(superpoints < 0, -1)
        if (label >= 0).any():
            losses.append(F.cross_entropy(scene_logits[:, :-1], label, ignore_index=-1))
    return torch.stack(losses).mean() if losses else logits[0][:0].sum()
