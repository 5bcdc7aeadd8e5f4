"""Every preset trains through the real trainer with every probe on, and what learns is what its documents let learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bifusion_diag.config import Settings, preset_names
from bifusion_diag.probes import PROBES
from bifusion_diag.record import Run
from bifusion_diag.training import Trainer

STEPS = 10

ESAM = ("semantic", "instance_class", "instance_bce", "instance_dice")
FUSED = (
    "semantic",
    "instance_class",
    "instance_mask",
    "instance_score",
    "clip_align",
    "spatial_consistency",
    "no_view",
)
TERMS = {
    "baseline": ESAM,
    "baseline-5cm": ESAM,
    "oneformer3d": ESAM,
    "mask3d": ESAM[1:],
    "bifusion": FUSED,
    "bifusion-lite": FUSED,
    "bifusion-safe": FUSED,
    "bifusion-fragile": (*ESAM, "instance_score", "clip_align"),
    "bifusion-phase1": (*ESAM, "instance_score"),
    "bifusion-phase2": (*ESAM, "instance_score", "clip_align"),
    "bifusion-phase3": (*ESAM, "instance_score", "clip_align"),
    "bifusion-simple": ("semantic",),
}

# Parts that no gradient reaches. CLIP is frozen; the global token's head learns from nothing but a CLIP loss against
# that token which lets a gradient through.
UNREACHED = {
    "bifusion": {"encoder.clip", "encoder.global_head"},
    "bifusion-lite": {"encoder.clip", "encoder.global_head"},
    "bifusion-safe": {"encoder.clip", "encoder.global_head"},
    "bifusion-fragile": {"encoder.clip"},
    "bifusion-phase1": {"encoder.clip", "encoder.global_head"},
    "bifusion-phase2": {"encoder.clip", "encoder.global_head"},
    "bifusion-phase3": {"encoder.global_head"},  # tunes CLIP
}
WITHOUT_CLIP = ("baseline", "baseline-5cm", "oneformer3d", "mask3d", "bifusion-simple")

# ESAM's mean over an empty match, which they inherit: where an object is left without a query, these terms are NaN
NAN_TERMS = {"instance_bce", "instance_dice", "instance_score"}
MAY_BE_NAN = ("bifusion-fragile", "bifusion-phase1", "bifusion-phase2", "bifusion-phase3")


def series(run: Run, name: str) -> list[float]:
    found = run.series(name)
    assert found is not None, name
    return list(found.value.tolist())


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_trains(preset: str, tiny: Callable[..., Settings], quiet: Console, tmp_path: Path) -> None:
    settings = tiny(preset, steps=STEPS)
    trainer = Trainer(settings, tmp_path / "run.json", ("all",), (), quiet)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    run = trainer.run()

    assert (run.status, list(run.steps)) == ("completed", list(range(STEPS)))
    assert run.settings["preset"] == run.header.preset == preset
    assert run.provenance["labels"] == "ground truth (synthetic)"
    assert run.provenance.get("clip_weights") == (None if preset in WITHOUT_CLIP else "random")
    assert run.measures["readings"]
    recorded = {name.partition("/")[0] for name in run.names()}
    of_2d = {"clip", "projection", "gate"}
    every = {"train"} | {probe.prefix for probe in PROBES.values()}
    of_instances = (
        {"matching", "loss_gradients"} if preset == "bifusion-simple" else set()
    )  # one term, nothing to match
    of_alignment = set() if "clip_align" in TERMS[preset] else {"flow"}
    assert recorded == every - of_instances - of_alignment - (of_2d if preset in WITHOUT_CLIP else set())

    terms = {name.split("/")[1] for name in run.names("loss/") if name.endswith("/raw")}
    assert terms == set(TERMS[preset])
    for term in terms:
        raw = series(run, f"loss/{term}/raw")
        assert all(map(math.isfinite, raw)) or (preset in MAY_BE_NAN and term in NAN_TERMS), (term, raw)
    if preset not in MAY_BE_NAN:
        assert all(map(math.isfinite, series(run, "loss/total")))
    # with an empty match the loss is NaN and the gradient is not (spec of the mechanism, section 6)
    assert all(math.isfinite(norm) and norm > 0 for norm in series(run, "train/grad_norm"))

    after = dict(trainer.model.named_parameters())
    assert all(torch.isfinite(parameter).all() for parameter in after.values())
    parts = [name for name in run.parameters if name != "total"]
    unchanged = {
        part
        for part in parts
        if all(torch.equal(before[name], after[name]) for name in before if name.startswith(f"{part}."))
    }
    assert unchanged == UNREACHED.get(preset, set())


def test_fusions_that_are_no_preset_train_and_repeat_bit_by_bit(
    tiny: Callable[..., Settings], quiet: Console, tmp_path: Path
) -> None:
    def run(fusion: str, name: str) -> tuple[Run, dict[str, torch.Tensor]]:
        settings = tiny("bifusion", f"model.fusion={fusion}", steps=3)
        trainer = Trainer(settings, tmp_path / f"{name}.json", ("all",), (), quiet)
        return trainer.run(), trainer.model.state_dict()

    (one, weights), (_, again) = run("enhanced", "one"), run("enhanced", "two")
    assert all(map(math.isfinite, series(one, "loss/total")))
    assert all(torch.equal(weights[name], again[name]) for name in weights)

    simple, _ = run("simple", "simple")
    half = [share / 2 for share in series(simple, "projection/valid_share")]
    assert series(simple, "gate/mean") == pytest.approx(half, rel=1e-6)  # its α is ½ where a view sees the point
    assert half != [0.0] * 3


def test_an_empty_match_is_nan_under_the_states_that_inherit_it_and_harms_nothing(
    tiny: Callable[..., Settings], quiet: Console, tmp_path: Path
) -> None:
    """Scenes with one object, and so few queries that at times none of them lies on it."""
    found = {}
    for preset in ("bifusion-phase2", "bifusion-safe"):
        rare = ("data.flaws.single_instance=1", "model.decoder.query_share=0")
        trainer = Trainer(tiny(preset, *rare, steps=6), tmp_path / f"{preset}.json", (), (), quiet)
        run = trainer.run()
        found[preset] = sum(not math.isfinite(loss) for loss in series(run, "loss/total"))
        assert all(map(math.isfinite, series(run, "train/grad_norm")))
        assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    assert found["bifusion-phase2"] > 0
    assert found["bifusion-safe"] == 0


@pytest.mark.parametrize(("sanitize", "harm"), [("clamp", False), ("none", True)])
def test_a_lost_pose_in_a_whole_run(
    sanitize: str, harm: bool, tiny: Callable[..., Settings], quiet: Console, tmp_path: Path
) -> None:
    """ScanNet's −inf pose: clamped, it is finite and behind the camera; left alone, its pixels are ∞/∞ = NaN."""
    settings = tiny("bifusion", "data.flaws.lost_tracking=1", f"model.projection.sanitize={sanitize}", steps=2)
    run = Trainer(settings, tmp_path / "run.json", ("projection",), (), quiet).run()
    assert series(run, "projection/inf") == series(run, "projection/points")
    assert series(run, "projection/nan") == [0.0, 0.0]
    assert [math.isfinite(loss) for loss in series(run, "loss/total")] == [not harm] * 2
    assert [math.isfinite(norm) for norm in series(run, "train/grad_norm")] == [not harm] * 2
