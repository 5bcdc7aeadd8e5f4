"""Mean intersection over union of the semantic classes.

Legend: N points · K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SemanticIoU:
    """IoU of a class = points that are and are called it ÷ points that are or are called it, over all scenes together.

    The mean is over the classes that occur in the ground truth of the scenes seen, as a class that is nowhere has no
    IoU. Points without a label take no part, whatever they are called. "Background" is a wrong answer for every class.

    Args:
        classes: K.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self._counts = torch.zeros(classes + 1, classes + 1, dtype=torch.int64)  # truth × answer; the last = background

    def update(self, answer: Tensor, truth: Tensor) -> None:
        """Add points.

        Args:
            answer: (N,) int64 in 0..K-1, -1 = background.
            truth: (N,) int64 in 0..K-1, -1 = unlabelled.
        """
        # On the CPU: a GPU has no deterministic count but the comparison of every point with every pair of classes.
        answer, truth = torch.where(answer < 0, self.classes, answer).cpu(), truth.cpu()
        pairs = (truth * (self.classes + 1) + answer)[truth >= 0]
        self._counts += torch.bincount(pairs, minlength=self._counts.numel()).view_as(self._counts)

    def by_class(self) -> Tensor:
        """(K,) float64 IoU; NaN where the class is not in the ground truth."""
        counts = self._counts.double()
        both = counts.diagonal()
        iou = both / (counts.sum(0) + counts.sum(1) - both)
        return iou.masked_fill(counts.sum(1) == 0, torch.nan)[: self.classes]

    def mean(self) -> float | None:
        """Mean IoU over the classes that occur; None where no point has a label."""
        iou = self.by_class()
        return float(iou.nanmean()) if (~iou.isnan()).any() else None
