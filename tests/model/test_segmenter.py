"""The whole model, built from presets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bifusion_diag.config.presets import load_settings
from bifusion_diag.data.batch import Batch
from bifusion_diag.data.scannet200 import class_id
from bifusion_diag.errors import UserError
from bifusion_diag.model.build import build_model

PRESETS = ["baseline", "baseline-5cm", "bifusion", "bifusion-fragile"]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_train_a_step(preset: str, batch_of_two: Callable[..., Batch]) -> None:
    model = build_model(load_settings(preset, scale="small"))
    model.set_progress(150, 200)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    out = model(batch_of_two())
    loss = out.loss
    weighted = sum(loss.weights[name] * term.detach() for name, term in loss.terms.items())
    torch.testing.assert_close(loss.total.detach(), weighted)
    assert out.predictions.superpoints.shape == (48, model.encoder.out_channels)
    loss.total.backward()
    optimizer.step()
    for part in ("encoder.backbone", "pool", "decoder"):
        moved = [name for name in before if name.startswith(part) and not before[name].equal(model.get_parameter(name))]
        assert moved, part


@pytest.mark.parametrize("preset", ["baseline-5cm", "bifusion"])
def test_pooling_and_decoder_get_the_fused_features_at_the_augmented_coordinates(
    preset: str, batch_of_two: Callable[..., Batch]
) -> None:
    model = build_model(load_settings(preset, scale="small"))
    batch = batch_of_two()
    batch = replace(batch, coords=batch.xyz + 0.7)
    given: dict[str, tuple[Tensor, ...]] = {}
    model.pool.register_forward_pre_hook(lambda module, args: given.update(pool=args))
    model.decoder.register_forward_pre_hook(lambda module, args: given.update(decoder=args))
    predictions = model(batch).predictions
    features, coords, superpoint, superpoints = given["pool"]
    assert features is predictions.encoder.fused
    assert coords is batch.coords
    assert (superpoint is batch.superpoint, superpoints) == (True, sum(batch.superpoint_counts))
    assert given["decoder"][0] is predictions.superpoints
    assert given["decoder"][2] is predictions.encoder.fused
    assert given["decoder"][3] is batch.coords


def test_baseline_has_esams_size_to_the_parameter() -> None:
    with torch.device("meta"):  # counting needs no numbers
        sizes = build_model(load_settings("baseline")).part_sizes()
    assert sizes == {
        "encoder.backbone": (37_854_112, 37_854_112),
        "pool": (28_896, 28_896),
        "decoder": (3_576_779, 3_576_779),
        "total": (41_459_787, 41_459_787),
    }


def test_the_other_baselines_have_the_sizes_of_their_configurations() -> None:
    """The decoders are counted from their configurations in test_decoder and test_mask3d."""
    with torch.device("meta"):
        oneformer3d = build_model(load_settings("oneformer3d")).part_sizes()
        mask3d = build_model(load_settings("mask3d")).part_sizes()
    assert oneformer3d == {
        "encoder.backbone": (37_854_112, 37_854_112),
        "decoder": (6_696_336, 6_696_336),
        "total": (44_550_448, 44_550_448),
    }
    assert mask3d == {
        "encoder.backbone": (37_854_112, 37_854_112),
        "decoder": (1_784_009, 1_784_009),
        "total": (39_638_121, 39_638_121),
    }


@pytest.mark.parametrize(
    ("preset", "logit_scores", "first_object_class"),
    [
        ("bifusion", True, None),  # objectness by cross-entropy: a logit
        ("bifusion-fragile", False, None),  # ESAM's regression of the IoU
        ("oneformer3d", False, 2),  # 198 object classes, after wall and floor
        ("mask3d", False, 0),
    ],
)
def test_predictions_are_read_as_they_were_trained(
    preset: str, logit_scores: bool, first_object_class: int | None
) -> None:
    inference = build_model(load_settings(preset, scale="small")).inference
    assert (inference.logit_scores, inference.first_object_class) == (logit_scores, first_object_class)


TEXT = ("model.decoder.text_queries=true", "model.decoder.semantic_classes=5")


def test_text_queries_train_and_predict(batch_of_two: Callable[..., Batch]) -> None:
    model = build_model(load_settings("baseline-5cm", scale="small", overrides=TEXT))
    batch = batch_of_two()
    out = model(batch)
    classes = out.predictions.query_classes
    assert classes is not None
    assert [c[:5].tolist() for c in classes] == [[0, 1, 2, 3, 4]] * 2
    out.loss.total.backward()
    assert model.decoder.text_projection.weight.grad.abs().sum() > 0
    assert set(model.provenance()) == {"sparse_engine", "text_features"}
    for prediction in model.predict(batch):
        assert prediction.semantic.shape == (192,)
        assert prediction.masks.shape[1] == 192


def test_the_semantic_loss_alone_teaches_the_text_projection(batch_of_two: Callable[..., Batch]) -> None:
    model = build_model(load_settings("baseline-5cm", scale="small", overrides=TEXT))
    out = model(batch_of_two())
    out.loss.terms["semantic"].backward()
    assert model.decoder.text_projection.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("preset", ["oneformer3d", "mask3d"])
def test_object_classes_reach_the_loss(preset: str, batch_of_two: Callable[..., Batch]) -> None:
    """Every object is a table: of all objects' classes, that of tables alone is asked for."""
    table, first = class_id("table"), {"oneformer3d": 2, "mask3d": 0}[preset]
    batch = batch_of_two()
    batch = replace(batch, semantic=torch.full_like(batch.semantic, table))
    model = build_model(load_settings(preset, scale="small"))
    loss = model(batch).loss
    assert loss.terms["instance_bce"] > 0
    loss.terms["instance_class"].backward()
    head = model.decoder.classes if preset == "mask3d" else model.decoder.heads.classes[-1]
    asked_for = (head.bias.grad[:-1] < 0).nonzero()[:, 0] + first
    assert asked_for.tolist() == [table]
    assert model.criterion.decoder.first_object_class == first


def test_classes_without_a_name_cannot_be_asked_for() -> None:
    settings = load_settings("baseline", scale="small", overrides=[TEXT[0], "model.decoder.semantic_classes=201"])
    with pytest.raises(UserError, match=r"200 have one \(ScanNet200\), but model\.decoder\.semantic_classes is 201"):
        build_model(settings)


def test_bifusion_parts_add_up_and_clip_is_not_trainable() -> None:
    with torch.device("meta"):
        model = build_model(load_settings("bifusion"))
    sizes = model.part_sizes()
    assert list(sizes) == [
        *(f"encoder.{name}" for name in ("clip", "spatial_head", "global_head", "backbone", "head3d", "geometry")),
        "encoder.film",
        "encoder.gate",
        "pool",
        "decoder",
        "total",
    ]
    assert sizes["encoder.clip"] == (86_192_640, 0)
    assert sizes["encoder.backbone"].total == 15_491_232
    assert sizes["encoder.gate"].total == 98_689
    total = sizes.pop("total")
    assert total.total == sum(size.total for size in sizes.values())
    assert total.trainable == total.total - 86_192_640

    model.set_progress(0, 100)  # the gate's early phase
    assert model.part_sizes()["encoder.gate"].trainable == 65_792


def test_progress_reaches_gate_and_losses(batch_of_two: Callable[..., Batch]) -> None:
    model = build_model(load_settings("bifusion", scale="small"))
    batch = batch_of_two()
    model.set_progress(0, 110)
    first = model(batch)
    model.set_progress(10, 110)  # 3000 of 33000 steps
    second = model(batch)
    model.set_progress(109, 110)
    last = model(batch)
    valid = first.predictions.encoder.valid
    assert (first.predictions.encoder.alpha[valid] == 0.5).all()
    assert not (second.predictions.encoder.alpha[valid] == 0.5).any()
    assert first.loss.weights["clip_align"] == 0.2  # staged: 0.2 at the start, 0.04 at the end
    assert last.loss.weights["clip_align"] == 0.04


def test_baseline_does_not_import_open_clip() -> None:
    code = (
        "import sys; from bifusion_diag.config.presets import load_settings;"
        "from bifusion_diag.model.build import build_model;"
        "build_model(load_settings('baseline', scale='small')); print('open_clip' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"
