"""What reaches what: each finding where it belongs and not elsewhere, each number by another way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from bifusion_diag.data import Scene
from bifusion_diag.diagnosis.quantity import number
from bifusion_diag.experiments.audit import Audit
from bifusion_diag.experiments.audit.bench import Bench, part_of
from bifusion_diag.experiments.audit.declared_flow import declared_flow
from bifusion_diag.experiments.audit.gradient_flow import gradient_flow
from bifusion_diag.experiments.audit.optimiser import optimiser
from bifusion_diag.experiments.audit.result import Section
from bifusion_diag.training.stages import StageSwitch

Make = Callable[..., Bench]


def rules(section: Section) -> list[str]:
    return [finding.rule for finding in section.findings]


def value(section: Section, key: str) -> float | None:
    (found,) = [one.reading for one in section.numbers if one.key == key]
    return number(found)


def test_the_table_is_what_a_plain_backward_of_the_term_gives(bench: Make) -> None:
    own = bench()
    section = gradient_flow(own)
    assert rules(section) == ["trainable-without-gradient"]  # the global head: target is 'point'
    assert section.findings[0].module == "encoder.global_head"
    own.model.zero_grad(set_to_none=True)
    own.step.output.loss.terms["clip_align"].backward(retain_graph=True)
    for part in ("encoder.backbone", "encoder.spatial_head"):
        grads = [p.grad for name, p in own.model.named_parameters() if part_of(name) == part and p.grad is not None]
        expected = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        assert value(section, f"flow/{part}/clip_align") == pytest.approx(expected, rel=1e-5)
    assert not [one for one in section.numbers if one.key.startswith("flow/encoder.clip/")]  # frozen: no path
    table = {row[0]: row for row in section.tables[0].rows}
    assert table["encoder.clip"][-1] == "never"
    assert table["encoder.backbone"][-1] == "S1–S2"


def test_every_part_is_reached_where_the_target_is_global(bench: Make) -> None:
    assert rules(gradient_flow(bench(losses__clip_align__target="global"))) == []


def test_clip_that_was_unfrozen_behind_the_stages_back_is_an_error(bench: Make) -> None:
    own = bench()
    for parameter in own.model.encoder.clip.parameters():
        parameter.requires_grad_(True)
    own.optimizer.add_param_group({"params": list(own.model.encoder.clip.parameters())})
    (found,) = [one for one in gradient_flow(own).findings if one.rule == "clip-leak"]
    assert (found.severity, found.module) == ("error", "encoder.clip")


def test_a_part_that_was_released_too_early_is_an_error(bench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    own = bench()
    entered = StageSwitch.enter

    def enter(switch: StageSwitch, step: int) -> object:
        stage = entered(switch, step)
        for parameter in own.model.encoder.film.parameters():
            parameter.requires_grad_(True)  # as a hook of a user's might
        return stage

    monkeypatch.setattr(StageSwitch, "enter", enter)
    (found,) = [one for one in gradient_flow(own).findings if one.rule == "frozen-with-gradient"]
    assert (found.severity, found.module) == ("error", "encoder.film")


def test_a_loss_and_a_gradient_that_are_not_finite_are_errors(bench: Make) -> None:
    def spoilt(scene: Scene) -> Scene:
        points = scene.points.copy()
        points[:, 3:] = np.nan
        return replace(scene, points=points)

    found = gradient_flow(bench(change=spoilt)).findings
    assert {"nonfinite-loss", "nonfinite-gradient"} <= {one.rule for one in found}


def test_the_declared_share_arrives_and_the_documents_formula_lets_95_percent_through(bench: Make) -> None:
    section = declared_flow(bench())
    assert rules(section) == []
    assert value(section, "declared_flow/measured") == pytest.approx(0.05, rel=1e-4)
    assert value(section, "declared_flow/documents_formula/0.05") == pytest.approx(0.95, rel=1e-5)
    assert value(section, "declared_flow/ours/0.05") == pytest.approx(0.05, rel=1e-5)


def test_what_arrives_is_not_what_was_declared(bench: Make) -> None:
    written = declared_flow(bench(losses__clip_align__gradient_formula="as_written"))
    assert value(written, "declared_flow/measured") == pytest.approx(0.95, rel=1e-4)
    assert written.findings[0].remedy == {"losses.clip_align.gradient_formula": "as_declared"}
    around = declared_flow(bench("bifusion-fragile"))
    assert value(around, "declared_flow/encoder.global_head") == pytest.approx(0.02, rel=1e-4)
    assert value(around, "declared_flow/encoder.spatial_head") == pytest.approx(1.0, rel=1e-4)
    assert around.findings[0].rule == "declared-vs-measured-flow"
    assert around.findings[0].remedy == {"losses.clip_align.target": "point"}


def test_without_a_2d_side_there_is_nothing_to_measure(bench: Make) -> None:
    assert declared_flow(bench("baseline-5cm")).not_measured is not None


def test_an_optimiser_that_does_not_hold_what_learns(bench: Make) -> None:
    own = bench()
    assert rules(optimiser(own)) == []
    group = own.optimizer.param_groups[0]
    kept = {id(p) for p in own.model.pool.parameters()}
    gone = sum(p.numel() for p in own.model.pool.parameters())
    group["params"] = [p for p in group["params"] if id(p) not in kept]
    section = optimiser(own)
    assert [(one.rule, one.severity, one.module) for one in section.findings] == [("not-in-optimiser", "error", "pool")]
    assert value(section, "optimiser/outside") == gone


def test_an_optimiser_that_holds_what_never_learns(bench: Make) -> None:
    own = bench()
    frozen = next(own.model.encoder.clip.parameters())
    own.optimizer.add_param_group({"params": [frozen, torch.nn.Parameter(torch.zeros(3))]})
    section = optimiser(own)
    assert rules(section) == ["frozen-in-optimiser"]
    assert value(section, "optimiser/never_learn") == frozen.numel()
    assert value(section, "optimiser/strangers") == 1


def test_a_healthy_preset_has_no_error(clean: Audit) -> None:
    assert clean.count("error") == 0
    assert all(one.not_measured is None for one in clean.sections)
