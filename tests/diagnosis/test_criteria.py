"""Every criterion passes, fails and is not measured where it should."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike

from bifusion_diag.diagnosis import Criterion, NotMeasured, Quantity, compare_runs, measure
from bifusion_diag.diagnosis.criteria import judge, warm_up_steps
from bifusion_diag.record.schema import Run

RunMaker = Callable[..., Run]
FOUR_STEPS_AN_EPOCH = {"training": {"batch_size": 2}, "data": {"source": "synthetic", "scenes": 8}}


@pytest.fixture
def verdicts(make_run: RunMaker) -> Callable[..., dict[str, Criterion]]:
    def judged(series: Mapping[str, ArrayLike], baseline: Run | None = None, **header: Any) -> dict[str, Criterion]:
        run = make_run(series, **header)
        return {criterion.key: criterion for criterion in judge(run, measure(run), baseline)}

    return judged


def losses(steps: int, *bad: int) -> dict[str, np.ndarray]:
    values = np.ones(steps)
    values[list(bad)] = np.nan
    return {"loss/total": values}


def test_twenty_clean_epochs_pass_even_after_a_bad_start(verdicts: Callable[..., dict[str, Criterion]]) -> None:
    criterion = verdicts(losses(100, 3), settings=FOUR_STEPS_AN_EPOCH)["clean_epochs"]
    assert criterion.result == "pass"
    assert criterion.reading.value == 24  # steps 4 ... 99


def test_nan_every_ten_epochs_fails(verdicts: Callable[..., dict[str, Criterion]]) -> None:
    criterion = verdicts(losses(120, 40, 80), settings=FOUR_STEPS_AN_EPOCH)["clean_epochs"]
    assert criterion.result == "fail"
    assert criterion.reading.value == 10


def test_a_short_clean_run_is_not_a_pass(verdicts: Callable[..., dict[str, Criterion]]) -> None:
    criterion = verdicts(losses(20), settings=FOUR_STEPS_AN_EPOCH)["clean_epochs"]
    assert criterion.result == "not measured"
    assert criterion.reading == NotMeasured("clean so far, but the run has only 5 epochs")


def test_an_unknown_epoch_is_not_measured(verdicts: Callable[..., dict[str, Criterion]]) -> None:
    assert verdicts(losses(500))["clean_epochs"].result == "not measured"


def test_warm_up_is_the_documents_first_stage_scaled(make_run: RunMaker) -> None:
    assert warm_up_steps(make_run({"loss/total": [1]}, steps_planned=33_000)) == 3000
    settings = {"model": {"gate": {"early_steps": 100}}, "training": {"reference_steps": 1000}}
    assert warm_up_steps(make_run({"loss/total": [1]}, steps_planned=50, settings=settings)) == 5


@pytest.mark.parametrize(("late", "result"), [(2.9, "pass"), (3.0, "fail"), (float("nan"), "fail")])
def test_gradient_norm_counts_after_the_warm_up_only(
    verdicts: Callable[..., dict[str, Criterion]], late: float, result: str
) -> None:
    norm = [500.0] * 10 + [1.0] * 99 + [late]
    assert verdicts({"train/grad_norm": norm}, steps_planned=110)["grad_norm"].result == result


def test_a_jump_fails(verdicts: Callable[..., dict[str, Criterion]]) -> None:
    assert verdicts({"train/grad_norm": [5.0] * 50})["no_jump"].result == "pass"
    assert verdicts({"train/grad_norm": [5.0] * 50 + [45.0]})["no_jump"].result == "fail"
    assert verdicts({"train/grad_norm": [5.0] * 5})["no_jump"].result == "not measured"


@pytest.mark.parametrize(("alpha", "result"), [(0.29, "fail"), (0.3, "pass"), (0.71, "fail")])
def test_alpha_band(verdicts: Callable[..., dict[str, Criterion]], alpha: float, result: str) -> None:
    # 0.3 is not a float32: widened it lies above 0.3
    assert verdicts({"gate/mean": [alpha, alpha]})["alpha"].result == result


def test_miou_needs_both_runs(make_run: RunMaker, verdicts: Callable[..., dict[str, Criterion]]) -> None:
    baseline = make_run({"eval/miou": [0.1, 0.4]})
    assert verdicts({"eval/miou": [0.2, 0.5]}, baseline)["miou"].result == "pass"
    assert verdicts({"eval/miou": [0.5, 0.3]}, baseline)["miou"].result == "fail"
    assert verdicts({"loss/total": [1]}, baseline)["miou"].result == "not measured"


def test_miou_is_compared_at_the_last_step_at_which_both_were_evaluated(
    make_run: RunMaker, verdicts: Callable[..., dict[str, Criterion]]
) -> None:
    nan = math.nan
    baseline = make_run({"eval/miou": [0.1, nan, 0.4, 0.9]}, missing={"eval/miou": [False, True, False, False]})
    criterion = verdicts({"eval/miou": [0.2, 0.3, 0.5]}, baseline)["miou"]
    assert (criterion.result, criterion.reading) == ("pass", Quantity(0.5))
    assert criterion.note == "baseline 0.4, both at step 2"
    odd = make_run({"eval/miou": [nan, 0.4, nan]}, missing={"eval/miou": [True, False, True]})
    even = make_run({"eval/miou": [0.1, nan, 0.4]}, missing={"eval/miou": [False, True, False]})
    found = {item.key: item for item in judge(even, measure(even), odd)}["miou"]
    assert (found.result, found.reading) == ("not measured", NotMeasured("the runs were evaluated at no common step"))


def test_miou_on_other_scenes_is_not_compared_and_pseudo_labels_are_named(make_run: RunMaker) -> None:
    pseudo = {"validation": {"kind": "rgbd", "labels": "geometric pseudo-labels (no ground truth)"}}
    baseline = make_run({"eval/miou": [0.1]}, provenance=pseudo)
    other = make_run({"eval/miou": [0.2]}, provenance={"validation": {"kind": "synthetic rooms"}})
    same = make_run({"eval/miou": [0.2]}, provenance=pseudo)
    judged = [{item.key: item for item in judge(run, measure(run), baseline)}["miou"] for run in (other, same)]
    assert judged[0].reading == NotMeasured("the runs were evaluated on different scenes")
    assert judged[1].note == "baseline 0.1, both at step 0, against geometric pseudo-labels (no ground truth)"
    assert any("evaluated on different scenes" in limit for limit in compare_runs(baseline, other).limits)
    limits = compare_runs(baseline, same).limits
    assert sum("against geometric pseudo-labels" in limit for limit in limits) == 2
    assert not any("different scenes" in limit for limit in limits)
