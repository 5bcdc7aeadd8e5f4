"""The criterion: which terms exist, their weights, their sum, and degenerate batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from bifusion_diag.config import load_settings
from bifusion_diag.config.settings import DecoderSettings, LossSettings
from bifusion_diag.data.batch import Batch
from bifusion_diag.errors import UserError
from bifusion_diag.model.losses import Criterion
from bifusion_diag.model.losses.matcher import allowed_pairs, match
from bifusion_diag.model.losses.targets import scene_targets
from bifusion_diag.model.outputs import LossOutput, Predictions

DECODER = DecoderSettings(semantic_classes=7, score_head=True)
ALL_TERMS = (
    "semantic", "instance_class", "instance_mask", "instance_score", "clip_align", "spatial_consistency", "no_view",
)  # fmt: skip


def _criterion(*, fused: bool = True, decoder: DecoderSettings = DECODER, **settings: Any) -> Criterion:
    return Criterion(LossSettings.model_validate(settings), decoder, fused=fused)


def _sum(loss: LossOutput) -> float:
    return sum(loss.weights[name] * term.item() for name, term in loss.terms.items() if loss.weights[name])


def _leaves(predictions: Predictions) -> list[torch.Tensor]:
    leaves = [t for layer in predictions.layers for t in (*layer.classes, *layer.masks, *(layer.scores or []))]
    return [*leaves, *predictions.semantic, predictions.encoder.f3d, predictions.encoder.fused]


BASELINE_TERMS = ("semantic", "instance_class", "instance_bce", "instance_dice")


@pytest.mark.parametrize(
    ("preset", "terms"),
    [
        ("baseline", BASELINE_TERMS),
        ("bifusion", ALL_TERMS),
        ("bifusion-fragile", (*BASELINE_TERMS, "instance_score", "clip_align")),
        ("oneformer3d", BASELINE_TERMS),
        ("mask3d", BASELINE_TERMS[1:]),
    ],
)
def test_presets_have_their_terms_in_fixed_order(preset: str, terms: tuple[str, ...]) -> None:
    settings = load_settings(preset)
    criterion = Criterion(settings.losses, settings.model.decoder, fused=settings.model.uses_clip)
    assert criterion.term_names == terms


def test_without_2d_features_the_terms_that_compare_with_them_are_missing_and_no_others() -> None:
    criterion = _criterion(fused=False)
    assert criterion.term_names == (*ALL_TERMS[:4], "spatial_consistency")
    bare = load_settings("bifusion-simple")  # 001's plan A names the semantic loss alone
    assert Criterion(bare.losses, bare.model.decoder, fused=bare.model.uses_clip).term_names == ("semantic",)


def test_total_is_the_weighted_sum_and_follows_the_schedule(
    batch_of: Callable[..., Batch], predict: Callable[..., Predictions]
) -> None:
    batch = batch_of([60, 40], [12, 9], [3, 2])
    predictions = predict(batch)
    criterion = _criterion(schedule="staged")
    assert list(criterion(predictions, batch).terms) == list(ALL_TERMS)
    for step, semantic, instance, clip, aux in ((0, 0.3, 0.4, 0.2, 0.1), (5, 0.4, 0.5, 0.08, 0.02)):
        criterion.set_progress(step, 10)
        loss = criterion(predictions, batch)
        expected = [semantic, instance * 1.0, instance * 0.8, instance * 0.2, clip, aux / 2, aux / 2]
        assert list(loss.weights.values()) == pytest.approx(expected)
        assert list(loss.weights) == list(loss.terms)
        assert loss.total.item() == pytest.approx(_sum(loss), rel=1e-5)


def test_a_term_weighted_zero_now_is_measured_but_cannot_spoil_the_total(
    batch_of: Callable[..., Batch], predict: Callable[..., Predictions]
) -> None:
    batch = batch_of([30], [6], [2])
    predictions = predict(batch)
    assert predictions.encoder.f2d is not None
    with torch.no_grad():
        predictions.encoder.f2d.fill_(float("nan"))
    criterion = _criterion(schedule="progressive_clip", no_view={"weight": 0})
    criterion.set_progress(0, 128)
    loss = criterion(predictions, batch)
    assert loss.weights["clip_align"] == 0.0
    assert loss.terms["clip_align"].isnan()
    assert torch.isfinite(loss.total)
    criterion.set_progress(60, 128)
    assert criterion(predictions, batch).total.isnan()


def test_only_a_term_that_is_off_for_now_still_gives_a_total_with_a_graph(
    batch_of: Callable[..., Batch], predict: Callable[..., Predictions]
) -> None:
    off = {"weight": 0}
    criterion = _criterion(
        schedule="progressive_clip", semantic=off, instance=off, spatial_consistency=off, no_view=off
    )  # fmt: skip
    batch = batch_of([30], [6], [2])
    predictions = predict(batch)
    loss = criterion(predictions, batch)
    loss.total.backward()
    assert criterion.term_names == ("clip_align",)
    assert loss.total.item() == 0.0


@pytest.mark.parametrize("matcher", ["sparse", "hungarian"])
@pytest.mark.parametrize("style", ["unified", "esam", "mask3d"])
@pytest.mark.parametrize(
    ("points", "superpoints", "objects"),
    [([1], [1], [0]), ([1], [1], [1]), ([30, 1], [6, 1], [0, 1]), ([30, 20], [6, 4], [1, 0])],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_degenerate_batches_train(
    batch_of: Callable[..., Batch],
    predict: Callable[..., Predictions],
    style: str,
    matcher: str,
    points: list[int],
    superpoints: list[int],
    objects: list[int],
    labelled: bool,
) -> None:
    batch = batch_of(points, superpoints, objects)
    if not labelled:
        batch = replace(batch, semantic=torch.full_like(batch.semantic, -1))
    predictions = predict(batch)
    parts = {"unified": (1.0, 0.8, 0.2), "esam": (0.5, 1.0, 1.0, 0.5, 0.5), "mask3d": (2.0, 5.0, 2.0)}[style]
    instance = {"style": style, "parts": parts, "matcher": matcher}
    loss = _criterion(schedule="constant", instance=instance)(predictions, batch)
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert bool(loss.terms["semantic"] == 0) is not labelled
    for leaf in _leaves(predictions):
        assert leaf.grad is None or torch.isfinite(leaf.grad).all()


def test_the_batch_is_left_alone_and_a_rerun_gives_the_same_bits(
    batch_of: Callable[..., Batch], predict: Callable[..., Predictions]
) -> None:
    batch = batch_of([300, 200], [12, 9], [3, 2])
    before = {name: value.clone() for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    predictions = predict(batch)
    criterion = _criterion(schedule="constant", spatial_consistency={"max_points": 50}, no_view={"max_points": 20})
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        loss = criterion(predictions, batch)
        leaves = [leaf for leaf in _leaves(predictions) if leaf.requires_grad]
        grads = torch.autograd.grad(loss.total, leaves, allow_unused=True)
        runs.append([loss.total, *loss.terms.values(), *(g for g in grads if g is not None)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
    assert all(torch.equal(getattr(batch, name), value) for name, value in before.items())


def test_the_matches_of_the_last_layer_are_told(
    batch_of: Callable[..., Batch], predict: Callable[..., Predictions]
) -> None:
    batch = batch_of([300, 200], [12, 9], [3, 0])
    predictions = predict(batch)
    settings = LossSettings().instance
    loss = _criterion()(predictions, batch)
    last, target = predictions.layers[-1], scene_targets(batch, DECODER)[0]
    allowed = allowed_pairs(predictions.query_superpoints[0], None, target, settings.matcher)
    expected = match(last.classes[0], last.masks[0], target.labels, target.masks(last.level), allowed, settings)
    assert loss.objects == [3, 0]
    assert loss.matches is not None
    assert len(expected.queries) > 0
    assert torch.equal(loss.matches[0].queries, expected.queries)
    assert torch.equal(loss.matches[0].objects, expected.objects)
    assert len(loss.matches[1].queries) == 0
    unmatched = _criterion(instance={"weight": 0})(predictions, batch)
    assert (unmatched.matches, unmatched.objects) == (None, None)


def test_bad_settings_are_explained() -> None:
    with pytest.raises(UserError, match="every term that this model can have has weight 0"):
        _criterion(fused=False, semantic={"weight": 0}, instance={"weight": 0}, spatial_consistency={"weight": 0})


def test_text_queries_are_matched_by_class_and_labelled_by_class(
    batch_of: Callable[..., Batch], predict: Callable[..., Predictions]
) -> None:
    batch = batch_of([60], [12], [3])
    predictions = predict(batch, learnable=12)
    superpoints = torch.full((24,), -1)
    criterion = _criterion(fused=False, schedule="constant")
    free = criterion(predictions._replace(query_superpoints=[superpoints]), batch).terms
    absent = next(c for c in range(7) if c not in scene_targets(batch, DECODER)[0].object_semantic.tolist())
    texts = [torch.full((24,), absent)]
    bound = criterion(predictions._replace(query_superpoints=[superpoints], query_classes=texts), batch).terms
    assert free["instance_mask"] > 0
    assert free["semantic"] == 0
    assert bound["instance_mask"] == 0
    torch.testing.assert_close(bound["semantic"], -predictions.semantic[0][:, :-1].log_softmax(1)[:, absent].mean())


def test_mask3ds_decoder_has_no_semantic_term() -> None:
    decoder = DecoderSettings(kind="mask3d", masks="superpoint", semantic_classes=7)
    assert "semantic" not in _criterion(decoder=decoder, semantic={"weight": 1.0}).term_names
