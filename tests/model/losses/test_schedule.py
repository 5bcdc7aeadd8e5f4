"""Weight schedules at their boundaries."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from bifusion_diag.config.settings import LossSettings
from bifusion_diag.model.losses.schedule import group_weights


def _groups(step: int, total: int, **settings: Any) -> dict[str, float]:
    return group_weights(LossSettings.model_validate(settings), step, total)


@pytest.mark.parametrize("total", [10, 200, 33_000])
def test_staged_changes_at_30_and_70_percent(total: int) -> None:
    low, high = 3 * total // 10, 7 * total // 10
    table = {
        (0, low - 1): (0.3, 0.4, 0.2, 0.1),
        (low, high - 1): (0.4, 0.5, 0.08, 0.02),
        (high, total - 1, total): (0.45, 0.5, 0.04, 0.01),
    }
    for steps, (semantic, instance, clip, aux) in table.items():
        for step in steps:
            groups = _groups(step, total, schedule="staged")
            assert groups == pytest.approx(
                {
                    "semantic": semantic,
                    "instance": instance,
                    "clip_align": clip,
                    "spatial_consistency": aux / 2,
                    "no_view": aux / 2,
                }
            )


def test_staged_auxiliary_terms_keep_their_proportion() -> None:
    groups = _groups(0, 10, schedule="staged", spatial_consistency={"weight": 0.03}, no_view={"weight": 0.01})
    assert groups["spatial_consistency"] == pytest.approx(0.075)
    assert groups["no_view"] == pytest.approx(0.025)


def test_progressive_clip_changes_at_epochs_11_and_21_of_128() -> None:
    for steps_per_epoch in (1, 7):
        total = 128 * steps_per_epoch
        for epoch, clip in ((0, 0.0), (10, 0.0), (11, 0.001), (20, 0.001), (21, 0.01), (127, 0.01)):
            for step in (epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch - 1):
                groups = _groups(step, total, schedule="progressive_clip", semantic={"weight": 0.4})
                assert groups["clip_align"] == clip
                assert groups["semantic"] == 0.4


@pytest.mark.parametrize("total", [55, 101, 199, 1000])
def test_a_step_is_in_the_phase_of_the_share_of_the_run_that_is_done(total: int) -> None:
    for step in range(total):
        share = Fraction(step, total)
        staged = 0.2 if share < Fraction(30, 100) else 0.08 if share < Fraction(70, 100) else 0.04
        by_epoch = 0.0 if share < Fraction(11, 128) else 0.001 if share < Fraction(21, 128) else 0.01
        assert _groups(step, total, schedule="staged")["clip_align"] == staged
        assert _groups(step, total, schedule="progressive_clip")["clip_align"] == by_epoch


def test_both_schedules_at_the_documents_own_boundaries() -> None:
    """003: 30 and 70 % of S0 3k + S1 20k + S2 10k iterations. 000 and 002: epochs "0-10", "11-20", "21+"."""
    staged = {step: _groups(step, 33_000, schedule="staged")["clip_align"] for step in (9_899, 9_900, 23_099, 23_100)}
    assert staged == {9_899: 0.2, 9_900: 0.08, 23_099: 0.08, 23_100: 0.04}
    epochs = [_groups(epoch, 128, schedule="progressive_clip")["clip_align"] for epoch in range(128)]
    assert epochs == [0.0] * 11 + [0.001] * 10 + [0.01] * 107


@pytest.mark.parametrize(
    ("schedule", "phases"), [("staged", [0.2, 0.08, 0.04]), ("progressive_clip", [0, 0.001, 0.01])]
)
@pytest.mark.parametrize("total", [3, 4, 5, 7, 11, 12, 13, 64])
def test_a_short_run_visits_every_phase_in_order(schedule: str, phases: list[float], total: int) -> None:
    weights = [_groups(step, total, schedule=schedule)["clip_align"] for step in range(total)]
    assert list(dict.fromkeys(weights)) == phases
    assert weights == sorted(weights, key=phases.index)


@pytest.mark.parametrize("total", [1, 2])
def test_a_run_with_fewer_steps_than_phases_takes_the_first_ones(total: int) -> None:
    weights = [_groups(step, total, schedule="staged")["clip_align"] for step in range(total)]
    assert weights == [0.2, 0.08][:total]


def test_progressive_clip_changes_nothing_but_clip() -> None:
    own = _groups(0, 128, schedule="constant")
    for step in (0, 11, 127):
        groups = _groups(step, 128, schedule="progressive_clip")
        assert {**groups, "clip_align": None} == {**own, "clip_align": None}


def test_constant_keeps_every_terms_own_weight() -> None:
    for step in (0, 5, 9):
        assert _groups(step, 10, schedule="constant", semantic={"weight": 0.7}, instance={"weight": 0.9}) == {
            "semantic": 0.7,
            "instance": 0.9,
            "clip_align": 0.1,
            "spatial_consistency": 0.05,
            "no_view": 0.05,
        }


@pytest.mark.parametrize("schedule", ["constant", "staged", "progressive_clip"])
def test_a_term_whose_own_weight_is_zero_stays_off(schedule: str) -> None:
    groups = _groups(9, 10, schedule=schedule, clip_align={"weight": 0.0}, no_view={"weight": 0.0})
    assert groups["clip_align"] == 0.0
    assert groups["no_view"] == 0.0
    if schedule == "staged":
        assert groups["spatial_consistency"] == pytest.approx(0.01)
