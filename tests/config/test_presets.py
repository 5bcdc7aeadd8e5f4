"""Presets, config files and overrides."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bifusion_diag.config import ConfigError, load_settings, preset_description, preset_names, settings_from_dict


def test_every_preset_loads_at_both_scales_and_says_what_it_is() -> None:
    assert {"bifusion", "bifusion-fragile", "baseline", "baseline-5cm"} <= set(preset_names())
    for name in preset_names():
        assert preset_description(name)
        for scale in ("full", "small"):
            settings = load_settings(name, scale=scale)
            assert (settings.preset, settings.scale) == (name, scale)


def test_the_baseline_has_esams_documented_settings() -> None:
    settings = load_settings("baseline")
    assert settings.model.backbone.layers == (2, 3, 4, 6, 2, 2, 2, 2)
    assert settings.model.backbone.planes == (32, 64, 128, 256, 256, 128, 96, 96)
    assert settings.model.backbone.voxel_size == 0.02
    assert settings.losses.instance.parts == (0.5, 1.0, 1.0, 0.5, 0.5)
    assert (settings.optim.lr, settings.optim.weight_decay, settings.optim.clip_grad) == (1e-4, 0.05, 10.0)


def test_the_controlled_twin_differs_from_the_baseline_in_the_grid_alone() -> None:
    twin = load_settings("baseline-5cm").model_dump()
    twin["preset"] = "baseline"
    twin["model"]["backbone"]["voxel_size"] = 0.02
    assert twin == load_settings("baseline").model_dump()


def test_bifusion_has_the_numbers_of_003() -> None:
    settings = load_settings("bifusion")
    losses, instance, clip = settings.losses, settings.losses.instance, settings.losses.clip_align
    assert (settings.model.common_width, settings.model.backbone.voxel_size) == (256, 0.05)
    assert settings.model.backbone.planes == (32, 64, 128, 256, 128, 128, 96, 96)
    assert (settings.model.projection.sanitize, settings.model.projection.normalize) == ("strict", "before_sampling")
    assert (settings.model.gate.early_steps, settings.model.gate.invalid_alpha) == (3000, 0.1)
    assert (losses.schedule, instance.style, instance.parts) == ("staged", "unified", (1.0, 0.8, 0.2))
    assert (instance.focal_alpha, instance.focal_gamma, instance.mask_bce_share) == (0.25, 2.0, 0.6)
    assert (clip.target, clip.temperature, clip.gradient_flow) == ("point", 0.07, 0.05)
    assert (losses.spatial_consistency.neighbours, losses.no_view.confidence) == (8, 0.8)
    assert (settings.optim.lr, settings.optim.clip_grad) == (2e-4, 10.0)


def test_bifusion_fragile_has_the_numbers_of_the_failing_state() -> None:
    settings = load_settings("bifusion-fragile")
    losses, instance, clip = settings.losses, settings.losses.instance, settings.losses.clip_align
    assert (settings.model.projection.sanitize, settings.model.projection.normalize) == ("replace", "after_sampling")
    assert (losses.schedule, losses.semantic.weight, instance.weight) == ("constant", 0.4, 1.0)
    assert (instance.style, instance.parts, instance.no_object_weight) == ("esam", (1.0, 0.8, 0.6, 0.3, 0.0), 0.05)
    assert (clip.weight, clip.target, clip.temperature, clip.gradient_flow) == (0.05, "global", 0.07, 0.02)
    assert settings.optim.clip_grad == 10.0
    assert settings.model.decoder.score_head, "its instance weights have a score"


def test_oneformer3d_has_the_numbers_of_its_scannet200_configuration() -> None:
    settings, baseline = load_settings("oneformer3d"), load_settings("baseline")
    decoder, losses = settings.model.decoder, settings.losses
    assert (decoder.layers, decoder.width, decoder.heads, decoder.hidden, decoder.dropout) == (6, 256, 8, 1024, 0.0)
    assert (decoder.instance_classes, decoder.semantic_classes, decoder.first_object_class) == (198, 200, 2)
    assert (decoder.masks, decoder.score_head, decoder.query_share) == ("superpoint", False, 0.5)
    assert settings.model.pooling == "mean"
    assert (losses.semantic.weight, losses.instance.parts) == (0.5, (0.5, 1.0, 1.0, 0.5, 0.0))
    assert (losses.instance.matcher, losses.instance.match_topk) == ("sparse", 1)
    assert (losses.instance.match_class, losses.instance.match_bce, losses.instance.match_dice) == (0.5, 1.0, 1.0)
    assert losses.instance.no_object_weight == 0.1
    assert (settings.optim, settings.model.backbone) == (baseline.optim, baseline.model.backbone)


def test_mask3d_has_the_numbers_of_its_configuration() -> None:
    settings = load_settings("mask3d")
    decoder, losses = settings.model.decoder, settings.losses
    assert (decoder.kind, decoder.layers, decoder.width, decoder.heads, decoder.hidden) == ("mask3d", 3, 128, 8, 1024)
    assert (decoder.mask3d.queries, decoder.mask3d.keys) == (100, (200, 800, 3200, 12800))
    assert (decoder.mask3d.gauss_scale, decoder.instance_classes, decoder.first_object_class) == (1.0, 200, 0)
    instance = losses.instance
    assert (instance.style, instance.parts, instance.matcher) == ("mask3d", (2.0, 5.0, 2.0), "hungarian")
    assert (instance.match_class, instance.match_bce, instance.match_dice) == instance.parts
    assert (instance.no_object_weight, losses.semantic.weight) == (0.1, 0.0)
    assert settings.model.backbone == load_settings("baseline").model.backbone


def test_small_keeps_the_architecture_and_divides_the_widths() -> None:
    full, small = load_settings("bifusion"), load_settings("bifusion", scale="small")
    assert small.model.backbone.layers == full.model.backbone.layers
    assert [4 * width for width in small.model.backbone.planes] == list(full.model.backbone.planes)
    assert full.model.clip.width / full.model.clip.heads == small.model.clip.width / small.model.clip.heads
    assert small.model.common_width * 4 == full.model.common_width
    assert small.losses == full.losses


def test_each_layer_wins_over_the_one_before(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("preset: baseline\nscale: small\noptim: {lr: 0.5, weight_decay: 0.25}\n")
    settings = load_settings(config=config, overrides=["optim.lr=1e-3", "optim.clip_grad=null"])
    assert (settings.preset, settings.scale) == ("baseline", "small")
    assert (settings.optim.lr, settings.optim.weight_decay, settings.optim.clip_grad) == (1e-3, 0.25, None)
    assert load_settings("bifusion", config=config).preset == "bifusion"


def test_a_stored_dump_gives_the_same_settings_back(tmp_path: Path) -> None:
    settings = load_settings("bifusion-fragile", scale="small", overrides=["losses.instance.empty_match=nan"])
    assert settings_from_dict(settings.model_dump(mode="json"), "run.json") == settings
    config = tmp_path / "dump.yaml"
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    assert load_settings(config=config) == settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "biffusion"}, r"unknown preset 'biffusion'. Did you mean 'bifusion'"),
        ({"overrides": ["optim.lrr=3"]}, r"unknown key 'optim.lrr'. Did you mean 'optim.lr'"),
        ({"overrides": ["temperature=3"]}, r"Did you mean 'losses.clip_align.temperature'"),
        ({"overrides": ["optim.lr=-3"]}, r"optim.lr: Input should be greater than 0 \(got -3\)"),
        ({"overrides": ["optim=3"]}, r"'optim' holds the settings lr, weight_decay"),
        ({"overrides": ["optim.lr"]}, r"--set takes key=value, for example optim.lr=1e-4; got 'optim.lr'"),
        ({"overrides": ["optim=1", "optim.lr=1"]}, r"'optim' was given a value before"),
        ({"overrides": ["losses.instance.style=esam"]}, r"has 3 weights; style 'esam' takes 5"),
        ({"overrides": ["scale=tiny"]}, r"unknown scale 'tiny'"),
        ({"overrides": ["data.augment.scale=[1.2, 0.8]"]}, r"augment.scale .* the smallest factor, then the largest"),
        ({"overrides": ["data.augment.scale=[0, 1]"]}, r"data.augment.scale.0: Input should be greater than 0"),
        (
            {"overrides": ["training.seed=99999999999999999999"]},
            r"training.seed: Input should be less than 9223",
        ),
        (
            {"overrides": ["model.decoder.heads=7"]},
            r"model.decoder: decoder.width 256 is not a multiple of decoder.heads 7$",  # and not a dump of the section
        ),
        (
            {"overrides": ["model.decoder.instance_classes=18"]},
            r"instance_classes 18 must be 1 \(class-agnostic\), 200 \(every semantic class\) or 198",
        ),
        ({"preset": "baseline", "overrides": ["model.clip.tune=lora"]}, r"'lora' lets .* this model has no CLIP"),
        ({"preset": "bifusion-simple", "overrides": ["model.clip.tune=blocks"]}, r"this model has no CLIP"),
        ({"overrides": ["model.decoder.kind=mask3d"]}, r"'mask3d' has masks over superpoints"),
        (
            {"preset": "mask3d", "overrides": ["model.decoder.text_queries=true", "model.decoder.score_head=true"]},
            r"decoder.kind 'mask3d' has no text_queries and no score_head: switch it off",
        ),
        ({"preset": "mask3d", "overrides": ["model.fusion=lite"]}, r"mask3d.* set model.fusion=none"),
        ({"preset": "mask3d", "overrides": ["model.decoder.mask3d.keys=[]"]}, r"mask3d.keys"),
        ({"overrides": ["losses.instance.style=mask3d", "losses.instance.parts=[1, 1]"]}, r"'mask3d' takes 3"),
        ({"overrides": ["optim.clip_grad=.inf"]}, r"optim.clip_grad: Input should be a finite number"),
    ],
)
def test_bad_settings_say_where_and_what_was_meant(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "message"),
    [("- a\n- b\n", "must hold a mapping"), ("a: [1", "is not YAML"), ("optimm: {lr: 1}", "Did you mean 'optim'")],
)
def test_bad_config_files_name_the_file(tmp_path: Path, content: str, message: str) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text(content)
    with pytest.raises(ConfigError, match=f"bad.yaml.*{message}"):
        load_settings(config=config)


def test_a_missing_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the config file .*none.yaml"):
        load_settings(config=tmp_path / "none.yaml")
