"""The instance loss in its three styles, as named terms summed over the decoder's layers.

``esam``: cross-entropy, BCE, Dice, score regression and box IoU of ESAM's ``MixedInstanceCriterion`` (OneFormer3D's has
the same terms and means, without boxes).
``mask3d``: cross-entropy, BCE and Dice as Mask3D's ``SetCriterion`` averages them.
``unified``: focal classification, one mask loss and objectness of document 003.

Legend: B scenes · Q queries · G objects · P matched pairs · M elements of a mask · K object classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bifusion_diag.config.settings import InstanceLossSettings
from bifusion_diag.model.losses.boxes import box_iou_loss, object_boxes, query_centres
from bifusion_diag.model.losses.classification import focal_loss, no_object_cross_entropy
from bifusion_diag.model.losses.masks import mask_bce, mask_dice, mask_iou
from bifusion_diag.model.losses.matcher import allowed_pairs, match
from bifusion_diag.model.losses.targets import SceneTargets
from bifusion_diag.model.outputs import LayerPrediction, Matches

#: Names of the terms of each style in the order of ``InstanceLossSettings.parts``.
INSTANCE_TERMS: dict[str, tuple[str, ...]] = {
    "unified": ("instance_class", "instance_mask", "instance_score"),
    "esam": ("instance_class", "instance_bce", "instance_dice", "instance_score", "instance_box"),
    "mask3d": ("instance_class", "instance_bce", "instance_dice"),
}

_GOOD_MASK = 0.5  # ESAM's score learns the IoU of masks above this IoU only


class InstanceTerms(NamedTuple):
    """The instance loss, and the matching that it rests on."""

    terms: dict[str, Tensor]  # by name, in the order of INSTANCE_TERMS
    matches: list[Matches]  # one entry a scene, of the last layer


class _Scene(NamedTuple):
    """One scene at one layer."""

    classes: Tensor  # (Q, K + 1) logits
    labels: Tensor  # (Q,) int64, K = no object
    matches: Matches
    all_masks: Tensor  # (Q, M) logits
    masks: Tensor  # (P, M) logits of the matched queries
    truth: Tensor  # (P, M) 0 or 1
    scores: Tensor | None  # (Q, 1)
    counts: bool  # the scene's masks enter the mean over scenes


def instance_terms(
    layers: Sequence[LayerPrediction],
    query_superpoints: Sequence[Tensor],
    targets: Sequence[SceneTargets],
    settings: InstanceLossSettings,
    query_classes: Sequence[Tensor] | None = None,
) -> InstanceTerms:
    """All instance terms, unweighted, each the sum over the layers; every layer is matched on its own.

    Args:
        layers: predictions from the initial queries to the last layer.
        query_superpoints: per scene (Q_i,) int64, -1 = not a superpoint.
        targets: ground truth of each scene.
        settings: style, matching costs, and what an empty match does.
        query_classes: per scene (Q_i,) int64 class of a text query, -1 = not a text query; None = there are none.

    Returns:
        The terms, of which ``instance_score`` and ``instance_box`` are there only if the decoder predicts them, and the
        last layer's matches.
    """
    classes = [None] * len(targets) if query_classes is None else query_classes
    allowed = [
        allowed_pairs(queries, texts, scene, settings.matcher)
        for queries, texts, scene in zip(query_superpoints, classes, targets, strict=True)
    ]
    total: dict[str, Tensor] = {}
    scenes: list[_Scene] = []
    for layer in layers:
        scenes = [_scene(layer, i, targets[i], allowed[i], settings) for i in range(len(targets))]
        if settings.style == "unified":
            terms = _unified_layer(scenes, settings)
        elif settings.style == "mask3d":
            terms = _mask3d_layer(scenes, settings)
        else:
            terms = _esam_layer(scenes, settings, last=layer is layers[-1])
            if layer.boxes is not None:
                terms["instance_box"] = _box_term(layer.boxes, scenes, query_superpoints, targets)
        total = {name: total[name] + term if total else term for name, term in terms.items()}
    return InstanceTerms(total, [scene.matches for scene in scenes])


def _scene(
    layer: LayerPrediction, index: int, target: SceneTargets, allowed: Tensor, settings: InstanceLossSettings
) -> _Scene:
    """Match one scene and gather its pairs."""
    classes, masks, truth = layer.classes[index], layer.masks[index], target.masks(layer.level)
    matches = match(classes, masks, target.labels, truth, allowed, settings)
    return _Scene(
        classes=classes,
        labels=_query_labels(matches, target.labels, len(classes), no_object=classes.shape[1] - 1),
        matches=matches,
        all_masks=masks,
        masks=masks.index_select(0, matches.queries),
        truth=truth.index_select(0, matches.objects).to(masks.dtype),
        scores=None if layer.scores is None else layer.scores[index],
        # ESAM skips a scene without objects, but not one whose objects found no query: there BCE and Dice are means
        # over nothing, the loss is NaN and every gradient is finite.
        counts=len(truth) > 0 if settings.empty_match == "nan" else len(matches.queries) > 0,
    )


def _query_labels(matches: Matches, labels: Tensor, queries: int, *, no_object: int) -> Tensor:
    """(Q,) int64: the class of each query's object; of several objects, that of the first."""
    first = labels.new_full((queries,), len(labels)).scatter_reduce(0, matches.queries, matches.objects, "amin")
    return torch.cat([labels, labels.new_tensor([no_object])]).index_select(0, first)


def _unified_layer(scenes: Sequence[_Scene], settings: InstanceLossSettings) -> dict[str, Tensor]:
    """Focal class, one mask loss, objectness: each a mean over scenes."""
    share = settings.mask_bce_share
    classes = [focal_loss(s.classes, s.labels, settings.focal_alpha, settings.focal_gamma) for s in scenes]
    masks = [share * mask_bce(s.masks, s.truth) + (1 - share) * mask_dice(s.masks, s.truth) for s in scenes if s.counts]
    terms = {"instance_class": _mean(classes), "instance_mask": _mean_over_counted(scenes, masks)}
    objectness = [
        F.binary_cross_entropy_with_logits(s.scores[:, 0], (s.labels < s.classes.shape[1] - 1).to(s.scores.dtype))
        for s in scenes
        if s.scores is not None
    ]
    if objectness:
        terms["instance_score"] = _mean(objectness)
    return terms


def _esam_layer(scenes: Sequence[_Scene], settings: InstanceLossSettings, *, last: bool) -> dict[str, Tensor]:
    """Cross-entropy, BCE, Dice and score as ESAM averages them."""
    # `fix_dice_loss_weight` of ESAM's config multiplies Dice by 4/B, yet the sum over scenes of the last layer is not
    # divided by B before: the last layer's Dice counts 4-fold whatever the batch, the others' 4/B-fold.
    dice_factor = 4.0 if last else 4.0 / len(scenes)
    classes = [no_object_cross_entropy(s.classes, s.labels, settings.no_object_weight) for s in scenes]
    bce = [mask_bce(s.masks, s.truth) for s in scenes if s.counts]
    dice = [mask_dice(s.masks, s.truth) for s in scenes if s.counts]
    terms = {
        "instance_class": _mean(classes),
        "instance_bce": _mean_over_counted(scenes, bce),
        "instance_dice": dice_factor * _mean_over_counted(scenes, dice),
    }
    if scenes[0].scores is not None:
        terms["instance_score"] = _mean([_score_regression(scene) for scene in scenes])
    return terms


def _mask3d_layer(scenes: Sequence[_Scene], settings: InstanceLossSettings) -> dict[str, Tensor]:
    """Class: a mean over the queries of all scenes. Masks: a mean over the pairs of a scene, summed over the scenes."""
    classes, labels = torch.cat([s.classes for s in scenes]), torch.cat([s.labels for s in scenes])
    counted = [s for s in scenes if s.counts]
    return {
        "instance_class": no_object_cross_entropy(classes, labels, settings.no_object_weight),
        "instance_bce": _sum_over_counted(scenes, [mask_bce(s.masks, s.truth) for s in counted]),
        "instance_dice": _sum_over_counted(scenes, [mask_dice(s.masks, s.truth) for s in counted]),
    }


def _score_regression(scene: _Scene) -> Tensor:
    """Squared error between the scores of well-fitting masks and their IoU; 0 if no mask fits well."""
    assert scene.scores is not None
    iou = mask_iou(scene.masks, scene.truth)
    good = (iou > _GOOD_MASK).nonzero()[:, 0]
    scores = scene.scores.index_select(0, scene.matches.queries.index_select(0, good))[:, 0]
    return F.mse_loss(scores, iou.index_select(0, good)) if len(good) else scores.sum()


def _box_term(
    boxes: Sequence[Tensor],
    scenes: Sequence[_Scene],
    query_superpoints: Sequence[Tensor],
    targets: Sequence[SceneTargets],
) -> Tensor:
    """Box loss of the matched queries, summed over the counted scenes and divided by B, as in ESAM."""
    losses = []
    for scene, scene_boxes, queries, target in zip(scenes, boxes, query_superpoints, targets, strict=True):
        if not scene.counts:
            losses.append(scene_boxes[:0].sum())
            continue
        centres = query_centres(target.coords, target.superpoint, target.superpoint_masks.shape[1], queries)
        predicted = torch.cat([centres + scene_boxes[:, :3], scene_boxes[:, 3:]], dim=1)
        truth = object_boxes(target.coords, target.point_masks)
        losses.append(
            box_iou_loss(predicted.index_select(0, scene.matches.queries), truth.index_select(0, scene.matches.objects))
        )
    return _mean(losses)


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


def _sum_over_counted(scenes: Sequence[_Scene], values: Sequence[Tensor]) -> Tensor:
    """Sum of the counted scenes' values, 0 if there are none; what is left out as in :func:`_mean_over_counted`."""
    return _mean_over_counted(scenes, values) * max(1, len(values))


def _mean_over_counted(scenes: Sequence[_Scene], values: Sequence[Tensor]) -> Tensor:
    """Mean of the counted scenes' values, 0 if there are none.

    A scene that is left out adds 0 times its logits: nothing, unless they are not finite, which must not go unseen
    (non-finite masks match no object).
    """
    left_out = [0.0 * scene.all_masks.sum() for scene in scenes if not scene.counts]
    mean = _mean(values) if values else scenes[0].all_masks[:0].sum()
    return torch.stack([mean, *left_out]).sum()
