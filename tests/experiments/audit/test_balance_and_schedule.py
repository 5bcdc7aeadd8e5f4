"""Weights against the baseline, and the calendar of the run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bifusion_diag.diagnosis.quantity import number
from bifusion_diag.experiments.audit import Audit
from bifusion_diag.experiments.audit.balance import background_share, balance
from bifusion_diag.experiments.audit.bench import Bench
from bifusion_diag.experiments.audit.calendar import phases_of
from bifusion_diag.experiments.audit.schedule import schedule
from bifusion_diag.model.losses.schedule import group_weights
from bifusion_diag.training.stages import stage_at, stages_of
from tests.experiments.audit.conftest import tiny

Make = Callable[..., Bench]


def test_the_failing_states_weights_are_not_the_baselines(clean: Audit, fragile: Audit) -> None:
    found = fragile.section("balance").findings
    weights = [one for one in found if one.rule == "loss-weights-vs-baseline"]
    assert [one.remedy for one in weights] == [
        {"losses.instance.parts": [0.5, 1.0, 1.0, 0.5, 0.5]},
        {"losses.instance.no_object_weight": 0.1},
    ]
    assert {one.severity for one in weights} == {"note"}  # as the rule of records has it
    assert not {one.rule for one in clean.section("balance").findings} & {"background-weight"}
    shares = [number(one.reading) or 0.0 for one in clean.section("balance").numbers if "/share/" in one.key]
    assert sum(shares) == pytest.approx(1.0, abs=1e-6)


def test_a_background_is_judged_by_the_bounds_of_the_rule(bench: Make) -> None:
    """Its share of the weights, by the closed form; the weight that is proposed gives both the same."""
    own = bench("baseline-5cm", losses__instance__no_object_weight=1e-3)
    (found,) = [one for one in balance(own).findings if one.rule == "background-weight"]
    matches, layers = own.step.output.loss.matches, own.step.output.predictions.layers
    assert matches is not None
    free, taken = sum(map(len, layers[-1].classes)), sum(len(one.queries) for one in matches)
    free -= taken
    share = number(found.evidence[0].reading)
    assert share == pytest.approx(1e-3 * free / (1e-3 * free + taken))
    assert share < own.thresholds.background_low
    assert found.remedy is not None
    assert found.remedy["losses.instance.no_object_weight"] == pytest.approx(taken / free, rel=0.05)
    assert not [one for one in balance(bench("baseline-5cm")).findings if one.rule == "background-weight"]


def test_no_object_weighs_what_it_weighs_in_the_gradient(bench: Make) -> None:
    usual = background_share(bench("baseline-5cm"))
    light = background_share(bench("baseline-5cm", losses__instance__no_object_weight=0.01))
    assert usual is not None
    assert light is not None
    assert light < usual / 3


@pytest.mark.parametrize("preset", ["bifusion", "bifusion-phase2", "bifusion-phase3", "baseline"])
@pytest.mark.parametrize("steps", [1, 7, 200, 33_000])
def test_the_calendar_is_what_every_single_step_says(preset: str, steps: int) -> None:
    settings = tiny(preset, training__steps=steps)
    phases = phases_of(settings)
    stages = stages_of(settings)
    for step in {0, steps - 1, *(place for one in phases for place in (one.begin, one.end - 1)), steps // 3}:
        (phase,) = [one for one in phases if one.begin <= step < one.end]
        assert phase.stage is stage_at(stages, step, steps) or phase.stage == stage_at(stages, step, steps)
        assert dict(phase.weights) == group_weights(settings.losses, step, steps)
    assert [one.begin for one in phases[1:]] == [one.end for one in phases[:-1]]
    assert phases[-1].end == steps


def test_collisions_of_the_calendar(bench: Make) -> None:
    together = schedule(bench("bifusion-phase3", training__steps=300)).findings
    assert any("change together" in one.title for one in together)
    never = schedule(bench(model__gate__early_steps=33_000)).findings
    assert [one.rule for one in never if one.severity == "warning"] == ["schedule-fights-warm-up"]
    late = schedule(bench(optim__poly_power=100.0, training__steps=600)).findings
    assert any("learning rate" in one.title for one in late)
    calm = schedule(bench(training__steps=900)).findings
    assert [one for one in calm if one.severity != "note"] == []


def test_a_stage_of_a_few_steps_is_noted(bench: Make) -> None:
    assert "stage-too-short" in [one.rule for one in schedule(bench(training__steps=30)).findings]
    assert "stage-too-short" not in [one.rule for one in schedule(bench(training__steps=900)).findings]
    assert "stage-too-short" not in [one.rule for one in schedule(bench("baseline-5cm", training__steps=5)).findings]
