"""The presets of the documents' states: each differs from what it extends in the settings that its document names."""

from __future__ import annotations

from importlib import resources
from typing import Any

import pytest
import yaml

from bifusion_diag.config import ConfigError, load_settings, preset_names

# spec.md, section 5, with the documents it cites. Keys that are not here are the parent's.
STATES: dict[str, tuple[str, dict[str, Any]]] = {
    "bifusion-fragile": (
        "bifusion",
        {
            "losses.schedule": "constant",
            "losses.instance.style": "esam",
            "losses.instance.parts": (1.0, 0.8, 0.6, 0.3, 0.0),
            "losses.instance.no_object_weight": 0.05,
            "losses.instance.empty_match": "nan",
            "losses.clip_align.weight": 0.05,
            "losses.clip_align.target": "global",
            "losses.clip_align.gradient_flow": 0.02,
            "losses.spatial_consistency.weight": 0.0,
            "losses.no_view.weight": 0.0,
            "model.projection.sanitize": "replace",
            "model.projection.normalize": "after_sampling",
        },
    ),
    "bifusion-phase1": (
        "bifusion-fragile",
        {
            "losses.clip_align.weight": 0.0,
            "losses.clip_align.gradient_flow": 0.0,
            "optim.clip_grad": 1.0,
            "model.projection.sanitize": "strict",
        },
    ),
    "bifusion-phase2": (
        "bifusion-phase1",
        {
            "losses.schedule": "progressive_clip",
            "losses.instance.parts": (0.5, 1.0, 1.0, 0.5, 0.5),
            "losses.instance.no_object_weight": 0.1,
            "losses.clip_align.weight": 0.01,
        },
    ),
    "bifusion-phase3": (
        "bifusion-phase2",
        {"model.common_width": 128, "model.clip.tune": "blocks", "training.stages": "three_phase"},
    ),
    "bifusion-lite": ("bifusion", {"model.common_width": 128}),
    "bifusion-simple": (
        "bifusion",
        {
            "model.fusion": "simple",
            "model.clip.use": False,
            "losses.instance.weight": 0.0,
            "losses.clip_align.weight": 0.0,
            "losses.spatial_consistency.weight": 0.0,
            "losses.no_view.weight": 0.0,
        },
    ),
    "bifusion-safe": (
        "bifusion",
        {
            "optim.lr": 1e-5,
            "optim.weight_decay": 1e-6,
            "optim.clip_grad": 1.0,
            "losses.clip_align.clamp": 10.0,
            "losses.clip_align.temperature": 0.1,
        },
    ),
}

# What a state still has of the failing one, and what all of them share: typed once more as whole values, so that a
# change of a parent does not go unseen.
KEPT: dict[str, dict[str, Any]] = {
    "bifusion-fragile": {"losses.semantic.weight": 0.4, "losses.clip_align.temperature": 0.07, "optim.clip_grad": 10.0},
    "bifusion-phase1": {
        "losses.instance.parts": (1.0, 0.8, 0.6, 0.3, 0.0),
        "losses.instance.empty_match": "nan",
        "model.projection.normalize": "after_sampling",
    },
    "bifusion-phase2": {
        "losses.clip_align.gradient_flow": 0.0,
        "losses.instance.empty_match": "nan",
        "model.projection.sanitize": "strict",
        "optim.clip_grad": 1.0,
    },
    "bifusion-phase3": {
        "losses.schedule": "progressive_clip",
        "model.fusion": "lite",
        "optim.clip_lr_scale": 0.01,
        "optim.clip_grad": 1.0,
    },
    "bifusion-lite": {"model.fusion": "lite", "losses.schedule": "staged", "optim.lr": 2e-4},
    "bifusion-simple": {"losses.semantic.weight": 0.4},
    "bifusion-safe": {"model.projection.sanitize": "strict", "losses.schedule": "staged"},
}


def flat(preset: str) -> dict[str, Any]:
    """Every setting by its dotted key."""

    def walk(values: dict[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in values.items():
            found |= walk(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return found

    return walk(load_settings(preset).model_dump(), "")


@pytest.mark.parametrize("preset", STATES)
def test_a_state_differs_from_its_parent_in_what_its_document_names(preset: str) -> None:
    parent, expected = STATES[preset]
    own, above = flat(preset), flat(parent)
    assert {key: value for key, value in own.items() if value != above[key]} == expected | {"preset": preset}
    assert {key: own[key] for key in KEPT[preset]} == KEPT[preset]


def test_every_documented_state_is_here() -> None:
    fused = {name for name in preset_names() if name.startswith("bifusion")}
    assert fused == {"bifusion", *STATES}


@pytest.mark.parametrize("preset", STATES)
def test_a_preset_holds_only_differences_and_names_its_document(preset: str) -> None:
    text = (resources.files("bifusion_diag.config") / "presets" / f"{preset}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert any(document in text.split("description:")[0] for document in ("000", "001", "002", "003"))
    assert yaml.safe_load(text)["extends"] == STATES[preset][0]


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("bifusion", ["model.clip.use=false"], "fusion 'lite' weighs CLIP's features, and clip.use is false"),
        ("bifusion", ["model.clip.use=false", "model.fusion=enhanced"], "fusion 'enhanced' weighs CLIP's features"),
        ("bifusion-simple", ["model.fusion=lite"], "take fusion 'simple' or 'none', or set clip.use to true"),
        (
            "bifusion",
            ["model.fusion=enhanced", "model.gate.heads=7"],
            "common_width 256 is not a multiple of gate.heads 7",
        ),
        ("bifusion", ["model.projection.sanitize=clip"], "'strict', 'replace', 'clamp' or 'none'"),
        ("bifusion", ["losses.clip_align.clamp=0"], "losses.clip_align.clamp: Input should be greater than 0"),
    ],
)
def test_what_does_not_fit_together_is_refused(preset: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(preset, overrides=overrides)


def test_variants_that_are_no_preset_are_reached_by_set() -> None:
    assert load_settings("bifusion-simple", overrides=["model.clip.use=true"]).model.uses_clip
    assert not load_settings("bifusion-simple").model.uses_clip
    assert not load_settings("baseline").model.uses_clip
    for scale in ("full", "small"):
        model = load_settings("bifusion-lite", scale=scale, overrides=["model.fusion=enhanced"]).model
        assert model.common_width % model.gate.heads == 0
