"""The instance loss in both styles against slow twins, and scenes in which nothing matches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bifusion_diag.config.settings import DecoderSettings, InstanceLossSettings
from bifusion_diag.data.batch import Batch
from bifusion_diag.model.losses.instance import INSTANCE_TERMS, instance_terms
from bifusion_diag.model.losses.matcher import match, queries_inside
from bifusion_diag.model.losses.targets import SceneTargets, scene_targets
from bifusion_diag.model.outputs import LayerPrediction, Predictions

ESAM = InstanceLossSettings(style="esam", parts=(0.5, 1.0, 1.0, 0.5, 0.5))
UNIFIED = InstanceLossSettings()
DECODER = DecoderSettings(semantic_classes=7)


def _terms(predictions: Predictions, batch: Batch, settings: InstanceLossSettings) -> dict[str, Tensor]:
    targets = scene_targets(batch, DECODER)
    return instance_terms(predictions.layers, predictions.query_superpoints, targets, settings).terms


def _pairs(layer: LayerPrediction, scene: int, target: SceneTargets, queries: Tensor) -> list[tuple[int, int]]:
    truth = target.masks(layer.level)
    allowed = queries_inside(queries, target.superpoint_masks)
    found = match(layer.classes[scene], layer.masks[scene], torch.zeros(len(truth)).long(), truth, allowed, ESAM)
    return list(zip(found.queries.tolist(), found.objects.tolist(), strict=True))


def _dice(logits: Tensor, truth: Tensor) -> Tensor:
    p = logits.sigmoid()
    return 1 - (2 * (p * truth).sum() + 1) / (p.sum() + truth.sum() + 1)


def _iou(logits: Tensor, truth: Tensor) -> float:
    inside = logits >= 0
    return ((inside & truth).sum() / (inside | truth).sum()).item()


def _grads(predictions: Predictions) -> list[Tensor]:
    leaves = [t for layer in predictions.layers for field in (layer.classes, layer.masks) for t in field]
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def test_esam_style_against_a_slow_twin(batch_of: Callable[..., Batch], predict: Callable[..., Predictions]) -> None:
    batch = batch_of([60, 40, 30], [12, 9, 6], [3, 0, 2])
    predictions = predict(batch)
    expected = dict.fromkeys(("instance_class", "instance_bce", "instance_dice", "instance_score"), 0.0)
    good = 0
    for number, layer in enumerate(predictions.layers):
        assert layer.scores is not None
        for scene, target in enumerate(scene_targets(batch, DECODER)):
            pairs = _pairs(layer, scene, target, predictions.query_superpoints[scene])
            matched = {q for q, _ in pairs}
            logits = layer.classes[scene]
            nll = [-row.log_softmax(0)[0 if q in matched else 1] for q, row in enumerate(logits)]
            weight = [1.0 if q in matched else 0.1 for q in range(len(logits))]
            expected["instance_class"] += sum(w * x.item() for w, x in zip(weight, nll, strict=True)) / sum(weight) / 3
            if not pairs:
                continue
            truth = target.masks(layer.level)
            masks = [(layer.masks[scene][q], truth[g]) for q, g in pairs]
            bce = [F.binary_cross_entropy_with_logits(m, t.float()).item() for m, t in masks]
            dice = [_dice(m, t).item() for m, t in masks]
            expected["instance_bce"] += sum(bce) / len(bce) / 2  # mean over the two scenes with objects
            factor = 4 if number == len(predictions.layers) - 1 else 4 / 3
            expected["instance_dice"] += factor * sum(dice) / len(dice) / 2
            errors = [
                (layer.scores[scene][q].item() - _iou(*pair)) ** 2
                for (q, _), pair in zip(pairs, masks, strict=True)
                if _iou(*pair) > 0.5
            ]
            good += len(errors)
            expected["instance_score"] += sum(errors) / len(errors) / 3 if errors else 0.0

    terms = _terms(predictions, batch, ESAM)
    assert good > 0
    assert list(terms) == list(expected)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-4), name


def test_unified_style_against_a_slow_twin(batch_of: Callable[..., Batch], predict: Callable[..., Predictions]) -> None:
    batch = batch_of([60, 40, 30], [12, 9, 6], [3, 0, 2])
    predictions = predict(batch)
    expected = dict.fromkeys(INSTANCE_TERMS["unified"], 0.0)
    for layer in predictions.layers:
        assert layer.scores is not None
        for scene, target in enumerate(scene_targets(batch, DECODER)):
            pairs = _pairs(layer, scene, target, predictions.query_superpoints[scene])
            matched = {q for q, _ in pairs}
            queries = len(layer.classes[scene])
            for q in range(queries):
                p = layer.classes[scene][q].softmax(0)[0 if q in matched else 1].item()
                alpha = 0.25 if q in matched else 0.75
                expected["instance_class"] -= alpha * (1 - p) ** 2 * torch.tensor(p).log().item() / queries / 3
                objectness = layer.scores[scene][q].sigmoid().item()
                hit = objectness if q in matched else 1 - objectness
                expected["instance_score"] -= torch.tensor(hit).log().item() / queries / 3
            truth = target.masks(layer.level)
            for q, g in pairs:
                bce = F.binary_cross_entropy_with_logits(layer.masks[scene][q], truth[g].float()).item()
                dice = _dice(layer.masks[scene][q], truth[g]).item()
                expected["instance_mask"] += (0.6 * bce + 0.4 * dice) / len(pairs) / 2

    terms = _terms(predictions, batch, UNIFIED)
    assert list(terms) == list(expected)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("settings", [ESAM, UNIFIED])
def test_objects_that_no_query_matches(
    batch_of: Callable[..., Batch], predict: Callable[..., Predictions], settings: InstanceLossSettings
) -> None:
    # Superpoint 0 is the only one of the only object, and no query is drawn from it.
    batch = batch_of([20, 40], [2, 9], [1, 3])
    lonely = batch_of([20], [2], [1])
    for both in (True, False):
        scenes = batch if both else lonely
        mask_terms = ("instance_mask",) if settings is UNIFIED else ("instance_bce", "instance_dice")

        torch.manual_seed(1)
        predictions = predict(scenes, boxes=True, skip=1)
        terms = _terms(predictions, scenes, settings.model_copy(update={"empty_match": "nan"}))
        assert all(terms[name].isnan() for name in mask_terms)
        assert torch.isfinite(terms["instance_class"])
        torch.stack(list(terms.values())).sum().backward()
        gradients = _grads(predictions)
        assert len(gradients) >= 4
        assert all(torch.isfinite(gradient).all() for gradient in gradients), "the loss is NaN, the gradients are not"

        predictions = predict(scenes, boxes=True, skip=1)
        terms = _terms(predictions, scenes, settings)
        assert all(torch.isfinite(term) for term in terms.values())
        assert all(bool(terms[name] == 0) is not both for name in mask_terms)
        torch.stack(list(terms.values())).sum().backward()
        assert all(torch.isfinite(gradient).all() for gradient in _grads(predictions))


@pytest.mark.parametrize("settings", [ESAM, UNIFIED])
def test_a_skipped_scene_does_not_hide_masks_that_are_not_finite(
    batch_of: Callable[..., Batch], predict: Callable[..., Predictions], settings: InstanceLossSettings
) -> None:
    batch = batch_of([30, 30], [4, 4], [2, 2])
    predictions = predict(batch)
    with torch.no_grad():
        predictions.layers[1].masks[1].fill_(float("nan"))
    terms = _terms(predictions, batch, settings)
    assert any(term.isnan() for term in terms.values())


@pytest.mark.parametrize("settings", [ESAM, UNIFIED])
@pytest.mark.parametrize(
    ("points", "superpoints", "objects"),
    [([1], [1], [1]), ([1], [1], [0]), ([12], [4], [0]), ([12, 1], [4, 1], [1, 0])],
)
def test_tiny_scenes_have_finite_losses_and_gradients(
    batch_of: Callable[..., Batch],
    predict: Callable[..., Predictions],
    settings: InstanceLossSettings,
    points: list[int],
    superpoints: list[int],
    objects: list[int],
) -> None:
    batch = batch_of(points, superpoints, objects)
    predictions = predict(batch, boxes=True)
    terms = _terms(predictions, batch, settings)
    torch.stack(list(terms.values())).sum().backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert all(torch.isfinite(gradient).all() for gradient in _grads(predictions))
    if not any(objects):
        assert all(terms[name] == 0 for name in ("instance_mask", "instance_bce", "instance_dice") if name in terms)
        assert terms["instance_class"] > 0


def test_learnable_queries_may_take_any_object(
    batch_of: Callable[..., Batch], predict: Callable[..., Predictions]
) -> None:
    batch = batch_of([20], [2], [1])
    predictions = predict(batch, boxes=True, learnable=3, skip=1)
    terms = _terms(predictions, batch, ESAM)
    assert terms["instance_bce"] > 0
    assert terms["instance_box"] > 0
    torch.stack(list(terms.values())).sum().backward()
    assert all(torch.isfinite(gradient).all() for gradient in _grads(predictions))


def test_box_term_is_one_minus_iou_of_the_matched_queries(
    batch_of: Callable[..., Batch], predict: Callable[..., Predictions]
) -> None:
    batch = batch_of([60, 40], [12, 9], [3, 0])
    predictions = predict(batch, boxes=True)
    target = scene_targets(batch, DECODER)[0]
    queries = predictions.query_superpoints[0]
    expected = 0.0
    for layer in predictions.layers:
        assert layer.boxes is not None
        pairs = _pairs(layer, 0, target, queries)
        for q, g in pairs:
            centre = target.coords[target.superpoint == queries[q]].mean(0)
            box = layer.boxes[0][q]
            points = target.coords[target.point_masks[g]]
            low = torch.maximum(centre + box[:3] - box[3:] / 2, points.amin(0))
            high = torch.minimum(centre + box[:3] + box[3:] / 2, points.amax(0))
            overlap = (high - low).clamp(min=0).prod().item()
            union = box[3:].prod().item() + (points.amax(0) - points.amin(0)).prod().item() - overlap
            expected += (
                (1 - overlap / union) / len(pairs) / 2
            )  # ESAM divides by the batch size, not by the scenes with objects
    assert _terms(predictions, batch, ESAM)["instance_box"].item() == pytest.approx(expected, rel=1e-4)


def _with_classes(predictions: Predictions, classes: int) -> Predictions:
    """The same predictions with random logits over several object classes."""
    layers = [
        layer._replace(classes=[torch.randn(len(c), classes + 1, requires_grad=True) for c in layer.classes])
        for layer in predictions.layers
    ]
    return predictions._replace(layers=layers)


@pytest.mark.parametrize("style", ["esam", "unified", "mask3d"])
@pytest.mark.parametrize("matcher", ["sparse", "hungarian"])
def test_object_classes_against_a_slow_twin(
    batch_of: Callable[..., Batch], predict: Callable[..., Predictions], style: str, matcher: str
) -> None:
    batch = batch_of([60, 40, 30], [12, 9, 6], [3, 2, 0])
    decoder = DECODER.model_copy(update={"instance_classes": 5})
    targets = scene_targets(batch, decoder)
    assert {label for target in targets for label in target.labels.tolist()} - {0}
    predictions = _with_classes(predict(batch), 5)
    parts = {"esam": (1.0,) * 5, "unified": (1.0,) * 3, "mask3d": (1.0,) * 3}[style]
    settings = InstanceLossSettings.model_validate({"style": style, "matcher": matcher, "parts": parts})
    expected_class = expected_bce = expected_dice = 0.0
    for layer in predictions.layers:
        nll, weight, bce, dice = [], [], [], []
        for scene, target in enumerate(targets):
            logits, masks = layer.classes[scene], layer.masks[scene]
            truth = target.masks(layer.level)
            allowed = queries_inside(predictions.query_superpoints[scene], target.superpoint_masks)
            if matcher == "hungarian":
                allowed = torch.ones_like(allowed)
            found = match(logits, masks, target.labels, truth, allowed, settings)
            of_query = dict(zip(found.queries.tolist(), found.objects.tolist(), strict=True))
            labels = [target.labels[of_query[q]].item() if q in of_query else 5 for q in range(len(logits))]
            nll.append([-logits[q].log_softmax(0)[label].item() for q, label in enumerate(labels)])
            weight.append([0.1 if label == 5 else 1.0 for label in labels])
            if of_query:
                of_pair = [(masks[q], truth[g].float()) for q, g in of_query.items()]
                bce.append([F.binary_cross_entropy_with_logits(m, t).item() for m, t in of_pair])
                dice.append([_dice(m, t).item() for m, t in of_pair])
        flat_nll, flat_weight = [list(itertools.chain(*rows)) for rows in (nll, weight)]
        if style == "mask3d":
            expected_class += sum(n * w for n, w in zip(flat_nll, flat_weight, strict=True)) / sum(flat_weight)
            expected_bce += sum(sum(rows) / len(rows) for rows in bce)
            expected_dice += sum(sum(rows) / len(rows) for rows in dice)
        elif style == "esam":
            expected_class += sum(
                sum(n * w for n, w in zip(rows, weights, strict=True)) / sum(weights) / len(nll)
                for rows, weights in zip(nll, weight, strict=True)
            )
        else:
            for rows, weights in zip(nll, weight, strict=True):
                focal = [
                    (0.75 if w == 0.1 else 0.25) * (1 - math.exp(-n)) ** 2 * n
                    for n, w in zip(rows, weights, strict=True)
                ]
                expected_class += sum(focal) / len(focal) / len(nll)
    terms = instance_terms(predictions.layers, predictions.query_superpoints, targets, settings).terms
    assert terms["instance_class"].item() == pytest.approx(expected_class, rel=1e-4)
    if style == "mask3d":
        assert list(terms) == list(INSTANCE_TERMS["mask3d"])
        assert terms["instance_bce"].item() == pytest.approx(expected_bce, rel=1e-4)
        assert terms["instance_dice"].item() == pytest.approx(expected_dice, rel=1e-4)


def test_objectness_does_not_ask_for_the_class(
    batch_of: Callable[..., Batch], predict: Callable[..., Predictions]
) -> None:
    """A matched query is an object, whatever its class is."""
    batch = batch_of([60], [12], [3])
    predictions = predict(batch)
    settings = InstanceLossSettings(match_class=0.0)  # the same pairs for agnostic and other classes
    agnostic = instance_terms(
        predictions.layers, predictions.query_superpoints, scene_targets(batch, DECODER), settings
    ).terms
    (target,) = scene_targets(batch, DECODER)
    shifted = [target._replace(labels=torch.tensor([4, 1, 3]))]
    classes = _with_classes(predictions, 5)
    others = instance_terms(classes.layers, predictions.query_superpoints, shifted, settings).terms
    assert torch.equal(agnostic["instance_score"], others["instance_score"])


def test_a_query_with_several_objects_has_the_class_of_the_first(
    batch_of: Callable[..., Batch], predict: Callable[..., Predictions]
) -> None:
    batch = batch_of([60], [12], [3])
    predictions = _with_classes(predict(batch, learnable=1), 5)
    (target,) = scene_targets(batch, DECODER)
    masks, logits = torch.full((1, 12), 5.0), torch.zeros(1, 6)
    logits[0, 4] = 3.0
    layer = predictions.layers[0]._replace(classes=[logits], masks=[masks], scores=None)
    settings = InstanceLossSettings(style="mask3d", parts=(1.0, 1.0, 1.0))
    targets = [target._replace(labels=torch.tensor([4, 1, 3]))]
    terms = instance_terms([layer], [torch.tensor([-1])], targets, settings).terms  # the only query takes all three
    assert terms["instance_class"].item() == pytest.approx(-logits[0].log_softmax(0)[4].item())


@pytest.mark.parametrize("style", ["esam", "unified", "mask3d"])
def test_masks_that_are_not_finite_are_seen_by_the_hungarian_matcher_too(
    batch_of: Callable[..., Batch], predict: Callable[..., Predictions], style: str
) -> None:
    """They match nothing, and the solver must not refuse them; the loss says so."""
    batch = batch_of([60], [12], [3])
    predictions = predict(batch)
    layer = predictions.layers[0]._replace(masks=[torch.full_like(predictions.layers[0].masks[0], math.nan)])
    parts = {"esam": (1.0,) * 5, "unified": (1.0,) * 3, "mask3d": (1.0,) * 3}[style]
    settings = InstanceLossSettings.model_validate({"style": style, "matcher": "hungarian", "parts": parts})
    targets = scene_targets(batch, DECODER)
    terms = instance_terms([layer], predictions.query_superpoints, targets, settings).terms
    assert torch.isfinite(terms["instance_class"])
    assert all(terms[name].isnan() for name in ("instance_bce", "instance_dice", "instance_mask") if name in terms)
