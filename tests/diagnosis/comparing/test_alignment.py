"""Runs aligned by samples and epochs, with numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import hypergeom

from bifusion_diag.diagnosis import compare_runs
from bifusion_diag.diagnosis.comparing.alignment import align
from bifusion_diag.diagnosis.criteria import steps_per_epoch
from bifusion_diag.diagnosis.verdict import fisher_more
from bifusion_diag.errors import UserError
from bifusion_diag.record.schema import Run

RunMaker = Callable[..., Run]


def run_of(make_run: RunMaker, steps: int, batch: int, *bad: int, ranks: int = 1, **header: Any) -> Run:
    norm = np.random.default_rng(batch).lognormal(0, 0.2, steps)
    norm[list(bad)] = np.nan
    environment = {"ranks": ranks} if ranks > 1 else {}
    return make_run(
        {"loss/total": np.ones(steps), "train/grad_norm": norm}, name=f"batch{batch}", environment=environment,
        settings={"training": {"batch_size": batch}}, **header,
    )  # fmt: skip


def test_runs_of_different_batch_are_compared_at_equal_samples(make_run: RunMaker) -> None:
    """100 steps of 2 see 200 samples, 60 steps of 4 see 240: 100 and 50 steps are compared."""
    small, large = run_of(make_run, 100, 2), run_of(make_run, 60, 4)
    found = align([small, large], "samples")
    assert [list(steps) for steps in found.steps] == [list(range(100)), list(range(50))]
    assert (found.scales, found.until, found.same_steps) == ((2.0, 4.0), 200.0, False)
    comparison = compare_runs(small, large, align="samples")
    assert (comparison.baseline.steps, comparison.candidate.steps) == (100, 50)
    assert comparison.limits[0].startswith("Aligned by samples seen, up to 200; a step is baseline 2 a step")
    assert "its 50 steps of the common stretch" in comparison.limits[1]
    assert compare_runs(small, large).candidate.steps == 60


def test_processes_multiply_the_batch(make_run: RunMaker) -> None:
    one, two = run_of(make_run, 100, 4), run_of(make_run, 100, 2, ranks=2)
    assert align([one, two], "samples").same_steps
    one.header.provenance["scenes_per_epoch"] = two.header.provenance["scenes_per_epoch"] = 40
    assert (steps_per_epoch(one), steps_per_epoch(two)) == (10, 10)


def test_epochs_are_those_of_each_runs_own_data(make_run: RunMaker) -> None:
    """10 and 20 steps an epoch: 60 steps are 6 epochs, 100 are 5."""
    short = run_of(make_run, 60, 4, provenance={"scenes_per_epoch": 40})
    long = run_of(make_run, 100, 2, provenance={"scenes_per_epoch": 40})
    found = align([short, long], "epoch")
    assert [steps.size for steps in found.steps] == [50, 100]
    assert found.until == pytest.approx(5)


def test_the_same_bad_samples_are_no_parting_and_others_are(make_run: RunMaker) -> None:
    """Step 10 of the batch of 4 covers samples 40 to 44, step 21 of the batch of 2 covers 42 to 44. Step 60 of it
    covers 120 to 122, which step 30 of the other covers, and is fine."""
    small, large = run_of(make_run, 100, 2, 21), run_of(make_run, 60, 4, 10)
    assert compare_runs(small, large, align="samples").partings == ()
    small = run_of(make_run, 100, 2, 21, 60)
    (parting,) = compare_runs(small, large, align="samples").partings
    assert (parting.step, parting.kind, parting.run) == (30, "non-finite", "baseline")
    (parting,) = compare_runs(large, small, align="samples").partings
    assert (parting.step, parting.kind, parting.run) == (60, "non-finite", "candidate")


def test_rates_are_compared_where_the_steps_are_not_as_many(make_run: RunMaker) -> None:
    """10 bad steps of 50 are more than 10 of 100, and so few that chance explains them or not as scipy says."""
    small, large = run_of(make_run, 100, 2, *range(20, 30)), run_of(make_run, 50, 4, *range(5, 15))
    verdict = compare_runs(small, large, align="samples").verdict
    expected = hypergeom(150, 50, 20).sf(9)
    assert fisher_more(10, 10, 50, 100) == pytest.approx(expected, rel=1e-9)
    assert "10 bad steps in 50 (baseline 10 in 100)" in verdict.sentence
    assert f"p = {expected:.2g}" in verdict.detail


def test_validation_is_compared_after_as_many_samples(make_run: RunMaker) -> None:
    def evaluated(batch: int, at: dict[int, float], steps: int) -> Run:
        run = run_of(make_run, steps, batch)
        values = np.full(steps, np.nan)
        values[list(at)] = list(at.values())
        series = {name: one.value for name, one in run.all_series.items()}
        return make_run({**series, "eval/miou": values}, missing={"eval/miou": np.isnan(values)}, settings=run.settings)

    small = evaluated(2, {40: 0.5, 80: 0.6, 96: 0.9}, 100)
    large = evaluated(4, {20: 0.55, 40: 0.5}, 50)
    comparison = compare_runs(small, large, align="samples")
    pair = next(pair for pair in comparison.measures if pair.key == "eval/miou")
    assert (pair.baseline.value, pair.candidate.value) == (pytest.approx(0.6), 0.5)  # type: ignore[union-attr]
    judged = {criterion.key: criterion for criterion in comparison.candidate.criteria}["miou"]
    assert (judged.result, judged.note) == ("fail", "baseline 0.6, both at step 40")


def test_a_run_that_does_not_tell_cannot_be_aligned(make_run: RunMaker) -> None:
    known, unknown = run_of(make_run, 60, 2), make_run({"loss/total": np.ones(60)}, name="bare")
    with pytest.raises(UserError, match=r"'bare' does not tell its batch size.*--align step"):
        align([known, unknown], "samples")
    with pytest.raises(UserError, match="Did you mean 'samples'"):
        align([known, known], "sample")


def test_runs_that_recorded_nothing_have_nothing_in_common(make_run: RunMaker) -> None:
    with pytest.raises(UserError, match="no samples in common"):
        align([run_of(make_run, 0, 2), run_of(make_run, 0, 4)], "samples")
