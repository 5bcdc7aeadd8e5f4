"""Measures against numbers worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from bifusion_diag.diagnosis import NotMeasured, Quantity, definition_of, measure, measures_from_dict, measures_to_dict
from bifusion_diag.record.schema import Event, Run

RunMaker = Callable[..., Run]
NAN, INF = float("nan"), float("inf")


def test_nonfinite_steps_count_every_way_to_be_nonfinite_once(make_run: RunMaker) -> None:
    run = make_run(
        {
            "loss/total": [1, NAN, 1, 1, 1],
            "loss/instance/raw": [1, NAN, 1, INF, 1],
            "train/grad_norm": [1, 1, INF, 1, 1],
        },
        steps=[10, 11, 12, 13, 14],
    )
    measures = measure(run)
    assert measures.nonfinite == (11, 12, 13)
    assert measures.number("nonfinite_steps") == 3
    assert measures.number("first_nonfinite_step") == 11
    assert measures.number("bad_steps") == 3


def test_no_bad_step_is_a_measured_none(make_run: RunMaker) -> None:
    assert measure(make_run({"loss/total": [1, 1]})).readings["first_nonfinite_step"] == Quantity(None, "step")


def test_gradient_norm_statistics_leave_nonfinite_steps_out(make_run: RunMaker) -> None:
    measures = measure(make_run({"train/grad_norm": [1, 2, 3, 4, NAN, 100]}))
    assert measures.number("grad_norm/p50") == 3
    assert measures.number("grad_norm/max") == 100
    assert measures.number("grad_norm/p95") == pytest.approx(4 + 0.8 * 96)  # linear between order statistics
    assert measures.number("grad_cv") == pytest.approx(1 / 3)  # deviations from 3: 2, 1, 0, 1, 97


def test_spike_rate_is_per_judged_step(make_run: RunMaker) -> None:
    measures = measure(make_run({"train/grad_norm": [5.0] * 20 + [45.0] + [5.0] * 9}))
    assert measures.spikes == (20,)
    assert measures.number("spike_rate") == pytest.approx(1 / 20)  # 30 steps, the first 10 are not judged


def test_too_short_a_run_has_no_spike_rate(make_run: RunMaker) -> None:
    assert isinstance(measure(make_run({"train/grad_norm": [1.0] * 8})).readings["spike_rate"], NotMeasured)


def test_clipping(make_run: RunMaker) -> None:
    measures = measure(make_run({"train/clip_coefficient": [1, 0.5, 0.25, 1, NAN]}))
    assert measures.number("clipped_share") == 0.5
    assert measures.number("shrink_factor") == 0.375


def test_loss_share_is_the_mean_of_shares_over_finite_steps(make_run: RunMaker) -> None:
    run = make_run({"loss/a/weighted": [1, 3, NAN], "loss/b/weighted": [-3, 1, 1]})
    assert measure(run).number("loss_share/a") == pytest.approx((0.25 + 0.75) / 2)
    assert measure(run).number("loss_share/b") == pytest.approx((0.75 + 0.25) / 2)


def test_a_term_that_is_off_has_no_share_while_it_is(make_run: RunMaker) -> None:
    run = make_run({"loss/a/weighted": [1, 1], "loss/b/weighted": [0, 3]}, missing={"loss/b/weighted": [True, False]})
    assert measure(run).number("loss_share/b") == pytest.approx((0 + 0.75) / 2)


def test_features_projection_and_gate(make_run: RunMaker) -> None:
    run = make_run(
        {
            "clip/points/min": [-1, -7],
            "clip/points/max": [2, 3],
            "clip/points/absmax": [2, 7],
            "clip/points/nonfinite": [0, 4],
            "clip/ratio_2d_3d": [1, 3],
            "projection/points": [100, 50],
            "projection/inf": [0, 20],
            "projection/valid": [80, 10],
            "projection/valid_share": [0.8, 0.2],
            "gate/mean": [0.5, 0.25],
        }
    )
    measures = measure(run)
    expected = {
        "clip/points/min": -7,
        "clip/points/max": 3,
        "clip/points/absmax": 7,
        "clip/points/nonfinite": 4,
        "clip/ratio_2d_3d": 2,
        "projection/points": 150,
        "projection/inf": 20,
        "projection/valid": 90,
        "projection/valid_share": 0.5,
        "projection/valid_share_min": 0.2,
        "gate/mean": 0.375,
    }
    for key, value in expected.items():
        assert measures.number(key) == pytest.approx(value), key


def test_what_was_not_recorded_is_not_measured(make_run: RunMaker) -> None:
    readings = measure(make_run({"loss/total": [1, 2]})).readings
    for key in ("grad_norm/p50", "clipped_share", "gate/mean", "projection/valid_share", "gradient_share/*"):
        assert isinstance(readings[key], NotMeasured), key


def test_every_measure_has_a_definition(make_run: RunMaker) -> None:
    run = make_run({"loss/a/weighted": [1], "clip/head/max": [1], "gate/mean": [1]})
    titles = {key: definition_of(key).title for key in measure(run).readings}
    assert titles["loss_share/a"] == "share of the loss"
    assert titles["clip/head/max"] == "maximum"


def test_measures_survive_strict_json(make_run: RunMaker) -> None:
    run = make_run(
        {"train/grad_norm": [5.0] * 20 + [45.0, NAN], "loss/instance/raw": [1.0] * 21 + [NAN]},
        events=[Event(21, "incident", "", {"scenes": ["room 7", "room 8"], "scene_notes": [[], ["no depth reading"]]})],
    )
    measures = measure(run)
    assert measures.origins[1].scenes == ("room 7", "room 8 [no depth reading]")
    assert measures_from_dict(json.loads(json.dumps(measures_to_dict(measures), allow_nan=False))) == measures


def test_a_million_steps_take_seconds(make_run: RunMaker) -> None:
    norms = np.random.default_rng(0).lognormal(0, 0.3, 1_000_000)
    norms[777_777] = 1000
    assert measure(make_run({"train/grad_norm": norms})).spikes == (777_777,)


def test_validation_metrics_are_the_last_and_the_best(make_run: RunMaker) -> None:
    gone = [False, True, False, False, True]
    columns = {"eval/miou": [0.0, NAN, 0.5, 0.25, NAN], "eval/ap50": [0.0, NAN, 0.125, 0.75, NAN]}
    measures = measure(make_run(columns, missing=dict.fromkeys(columns, gone)))
    expected = {"eval/miou": 0.25, "eval/miou_best": 0.5, "eval/ap50": 0.75, "eval/ap50_best": 0.75}
    assert {key: measures.number(key) for key in expected} == expected
    for key in ("eval/ap", "eval/alignment"):
        assert measures.readings[key] == NotMeasured("was not recorded")
    without = measure(make_run({"loss/total": [1.0]})).readings
    assert isinstance(without["eval/miou"], NotMeasured)
    assert "--evaluate-every" in without["eval/miou"].reason
    assert [key for key in without if key.startswith("eval/")] == ["eval/miou"]
    assert {definition_of(key).group for key in measures.readings if key.startswith("eval/")} == {"Validation"}
