"""From predictions to instances and semantics, as ESAM's evaluation does.

Legend: Q queries of a scene · N points of a scene · S superpoints of a scene · I instances · K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bifusion_diag.config.settings import InferenceSettings
from bifusion_diag.data.batch import Batch
from bifusion_diag.model.diffusion import diffuse_semantics
from bifusion_diag.model.outputs import Predictions
from bifusion_diag.model.segments import split_rows, starts


class ScenePrediction(NamedTuple):
    """What the model says of a scene."""

    semantic: Tensor  # (N,) int64, -1 = background
    masks: Tensor  # (I, N) bool, by descending score; they may overlap
    scores: Tensor  # (I,)
    classes: Tensor  # (I,) int64 instance classes; all 0 for a class-agnostic decoder


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


class Inference:
    """Reads instances and semantics out of predictions.

    An instance's score is the probability of its class, times the predicted score where the decoder has one, times the
    mean probability of its mask's points; matrix NMS (Wang et al., "SOLOv2", NeurIPS 2020, section 3.3, linear kernel)
    lowers it by how much the mask overlaps better ones, a copy's to 0.

    Args:
        settings: how many instances, and thresholds.
        diffusion_radius: how far semantics spread [m]; 0 = not at all.
        first_object_class: semantic class of the decoder's class 0; None = its classes are agnostic.
        logit_scores: the score head was trained as a logit (``losses.instance.style`` 'unified'), not as an IoU.
    """

    def __init__(
        self,
        settings: InferenceSettings,
        *,
        diffusion_radius: float,
        first_object_class: int | None,
        logit_scores: bool,
    ) -> None:
        self.settings = settings
        self.diffusion_radius = diffusion_radius
        self.first_object_class = first_object_class
        self.logit_scores = logit_scores

    def __call__(
        self, predictions: Predictions, batch: Batch, *, class_agnostic: bool = False
    ) -> list[ScenePrediction]:
        """One entry a scene of the batch.

        Args:
            predictions: of the model.
            batch: what they are of.
            class_agnostic: a query is one instance, with the probability of being any object, instead of one a class;
                all instances then have class 0.
        """
        locals_ = [
            ids - first
            for ids, first in zip(
                split_rows(batch.superpoint, batch.point_counts), starts(batch.superpoint_counts), strict=True
            )
        ]
        coords = split_rows(batch.coords, batch.point_counts)
        return [
            self._scene(
                predictions, scene, locals_[scene], coords[scene], batch.superpoint_counts[scene], class_agnostic
            )
            for scene in range(batch.batch_size)
        ]

    def _scene(
        self,
        predictions: Predictions,
        scene: int,
        superpoint: Tensor,
        coords: Tensor,
        superpoints: int,
        class_agnostic: bool,
    ) -> ScenePrediction:
        last = predictions.layers[-1]
        logits = last.masks[scene]
        if last.level == "superpoint":
            logits = logits.index_select(1, superpoint)
        classes = last.classes[scene].softmax(1)[:, :-1]
        if predictions.query_classes is not None and self.first_object_class is not None:
            classes = _of_own_class(classes, predictions.query_classes[scene], self.first_object_class)
        if predictions.semantic is not None:
            semantic = _of_superpoints(
                predictions.semantic[scene],
                predictions.query_superpoints[scene],
                superpoints,
                self.settings.semantic_confidence,
            ).index_select(0, superpoint)
        else:
            semantic = self._of_masks(classes, logits)
        semantic = diffuse_semantics(semantic, coords, superpoint, superpoints, self.diffusion_radius)
        scores = None if last.scores is None else self._predicted(last.scores[scene])
        if class_agnostic:
            classes = classes.sum(1, keepdim=True)
        return ScenePrediction(semantic, *self._instances(classes, logits, scores))

    def _predicted(self, scores: Tensor) -> Tensor:
        return scores.sigmoid() if self.logit_scores else scores.clamp(0, 1)

    def _instances(self, classes: Tensor, logits: Tensor, predicted: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Masks (I, N), scores (I,) and classes (I,).

        Args:
            classes: (Q, K) probabilities.
            logits: (Q, N).
            predicted: (Q, 1) or None.
        """
        options = self.settings
        weighted = classes if predicted is None else classes * predicted
        scores, order = weighted.flatten().sort(descending=True, stable=True)
        scores, order = scores[: options.candidates], order[: options.candidates]
        query = torch.div(order, classes.shape[1], rounding_mode="floor")
        labels = order % classes.shape[1]
        probability = logits.index_select(0, query).sigmoid()
        masks = probability > options.mask_threshold
        scores = scores * (probability * masks).sum(1) / masks.sum(1).clamp(min=1)
        order, scores = matrix_nms(masks, labels, scores)
        masks, labels = masks.index_select(0, order), labels.index_select(0, order)
        keep = ((scores > options.min_score) & (masks.sum(1) >= options.min_points)).nonzero()[:, 0]
        keep = keep[: options.max_instances]
        return masks.index_select(0, keep), scores.index_select(0, keep), labels.index_select(0, keep)

    def _of_masks(self, classes: Tensor, logits: Tensor) -> Tensor:
        """(N,) class with the largest sum over queries of class times mask probability (Cheng et al., "MaskFormer",
        NeurIPS 2021, section 3.4); -1 where no mask covers the point, or the queries' classes are agnostic.
        """
        if self.first_object_class is None:
            return torch.full((logits.shape[1],), -1, dtype=torch.int64, device=logits.device)
        best = (classes.T @ logits.sigmoid()).argmax(0) + self.first_object_class
        return best.masked_fill(~(logits > 0).any(0), -1)


def _of_own_class(classes: Tensor, query_classes: Tensor, first_object_class: int) -> Tensor:
    """Probabilities (Q, K) in which a text query has its own class alone, and one of stuff none.

    Args:
        classes: (Q, K).
        query_classes: (Q,) int64 semantic class of a text query, -1 = not a text query.
        first_object_class: semantic class of object class 0.
    """
    semantic = first_object_class + torch.arange(classes.shape[1], device=classes.device)
    others = semantic[None, :] != query_classes[:, None]
    return classes.masked_fill(others & (query_classes >= 0)[:, None], 0.0)


def _of_superpoints(logits: Tensor, query_superpoints: Tensor, superpoints: int, confidence: float) -> Tensor:
    """Semantics (S,) of the superpoints, -1 where the answer is less probable than ``confidence`` or no query is the
    superpoint's.

    Args:
        logits: (Q, K + 1). The last, "unlabelled", takes no part in the loss, and so none here.
        query_superpoints: (Q,) int64, -1 = a query that is no superpoint's.
        superpoints: S.
        confidence: least probability of an answer.
    """
    probability, answer = logits[:, :-1].softmax(1).max(1)
    answer = answer.masked_fill(probability < confidence, -1)
    own = query_superpoints >= 0
    return answer.new_full((superpoints,), -1).index_copy(0, query_superpoints[own], answer[own])


def matrix_nms(masks: Tensor, labels: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix NMS with the linear kernel.

    The score of a mask j is multiplied by the smallest, over better masks i of its class, of
    (1 − IoU(i, j)) / (1 − the largest IoU of i with a better one).

    Args:
        masks: (I, N) bool.
        labels: (I,) int64.
        scores: (I,).

    Returns:
        (I,) int64 the order by the new score, descending, and (I,) the new scores in it.
    """
    scores, order = scores.sort(descending=True, stable=True)
    if not len(scores):
        return order, scores
    labels = labels.index_select(0, order)
    ones = masks.index_select(0, order).float()
    common, areas = ones @ ones.T, ones.sum(1)
    iou = common / (areas[:, None] + areas[None, :] - common).clamp(min=1)
    iou = (iou * (labels[:, None] == labels[None, :])).triu(diagonal=1)  # [better, worse]
    covered = iou.max(0).values  # of every mask, its largest IoU with a better one
    decay = ((1 - iou) / (1 - covered[:, None]).clamp(min=1e-6)).min(0).values.clamp(max=1)
    scores, again = (scores * decay).sort(descending=True, stable=True)
    return order.index_select(0, again), scores
