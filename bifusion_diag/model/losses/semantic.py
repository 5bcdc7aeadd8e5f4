"""Cross-entropy over the semantic classes on superpoint queries.

Legend: Q queries of a scene · S superpoints of a scene · K semantic classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def semantic_loss(logits: Sequence[Tensor], query_superpoints: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """Mean over the queries of a scene that have a label, then over the scenes that have such a query.

    Args:
        logits: per scene (Q_i, K + 1); the last column ("unlabelled") takes no part.
        query_superpoints: per scene (Q_i,) int64, -1 = a learnable query, which has no label.
        labels: per scene (S_i,) int64 in 0..K-1, -1 = ignore.

    Returns:
        (); 0 if no query has a label (a mean over nothing would be NaN).
    """
    losses = []
    for scene_logits, superpoints, scene_labels in zip(logits, query_superpoints, labels, strict=True):
        label = scene_labels.index_select(0, superpoints.clamp(min=0)).masked_fill(superpoints < 0, -1)
        if (label >= 0).any():
            losses.append(F.cross_entropy(scene_logits[:, :-1], label, ignore_index=-1))
    return torch.stack(losses).mean() if losses else logits[0][:0].sum()
