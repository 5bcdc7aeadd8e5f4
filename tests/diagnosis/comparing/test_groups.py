"""Sides of several seeds: which runs are one side, what is tested over them, what the verdict may say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bifusion_diag.diagnosis import Quantity
from bifusion_diag.diagnosis.comparing.gates import check_gates, parse_gates
from bifusion_diag.diagnosis.comparing.groups import GroupComparison, compare_groups
from bifusion_diag.diagnosis.comparing.sides import group_runs
from bifusion_diag.diagnosis.plain import to_plain
from bifusion_diag.errors import UserError
from bifusion_diag.record.schema import Run

RunMaker = Callable[..., Run]
STEPS = 400


def run_of(make_run: RunMaker, seed: int, *, bad: int = 0, lr: float = 1e-4, name: str = "", **header: Any) -> Run:
    """A healthy run of a seed, with so many steps of a non-finite gradient."""
    rng = np.random.default_rng(1000 * seed + round(lr * 1e6))
    norm = rng.lognormal(0, 0.3, STEPS)
    norm[rng.choice(np.arange(100, STEPS - 50), bad, replace=False)] = np.nan
    settings = {"optim": {"lr": lr}, "training": {"seed": seed, "batch_size": 2}}
    series = {"loss/total": rng.lognormal(0, 0.1, STEPS), "train/grad_norm": norm}
    return make_run(series, name=name or f"lr{lr:g}", settings=settings, **header)


def compared(make_run: RunMaker, before: list[int], after: list[int]) -> GroupComparison:
    """Sides of one run an entry, each with so many bad steps."""
    left = [run_of(make_run, seed, bad=bad) for seed, bad in enumerate(before)]
    right = [run_of(make_run, seed, bad=bad, lr=2e-4) for seed, bad in enumerate(after)]
    reference, sides = group_runs(left[:1], [*left[1:], *right])
    assert (len(reference.runs), [len(side.runs) for side in sides]) == (len(before), [len(after)])
    return compare_groups(reference, sides[0])


def test_seeds_of_the_same_settings_are_one_side(make_run: RunMaker) -> None:
    runs = [run_of(make_run, seed, lr=lr) for lr in (1e-4, 2e-4) for seed in (0, 1, 2)]
    reference, sides = group_runs(runs[:1], runs[1:])
    assert (reference.runs, [side.runs for side in sides]) == (tuple(runs[:3]), [tuple(runs[3:])])
    assert reference.why == "3 runs whose settings are equal but for the seed (0, 1, 2)"
    _, apart = group_runs(runs[:1], runs[1:], separate=True)
    assert [len(side.runs) for side in apart] == [1] * 5


def test_what_may_be_a_copy_or_other_code_or_has_no_settings_stays_by_itself(make_run: RunMaker) -> None:
    first = run_of(make_run, 0)
    copy = run_of(make_run, 0)
    code = run_of(make_run, 1, environment={"git": {"commit": "abc"}})
    data = run_of(make_run, 2, provenance={"data": {"kind": "other rooms", "seed": 2}})
    bare = [make_run({"loss/total": np.ones(60)}, name=str(i)) for i in range(2)]
    reference, sides = group_runs([first], [copy, code, data, *bare])
    assert (len(reference.runs), [len(side.runs) for side in sides]) == (1, [1] * 5)
    reference, sides = group_runs([first, bare[0]], [], {"mine": [code, data]})
    assert (len(reference.runs), [side.name for side in sides]) == (2, ["mine"])
    assert "put together by hand" in sides[0].why


def test_another_seed_of_the_baseline_alone_is_compared_with_it(make_run: RunMaker) -> None:
    reference, sides = group_runs([run_of(make_run, 0)], [run_of(make_run, 1)])
    assert (len(reference.runs), len(sides)) == (1, 1)
    with pytest.raises(UserError, match="nothing to compare"):
        group_runs([run_of(make_run, 0)], [])


def test_less_stable_rests_on_the_test_over_runs(make_run: RunMaker) -> None:
    found = compared(make_run, [0, 0, 0, 0], [3, 5, 4, 2])
    primary = found.tested[0]
    assert (primary.measure, primary.p) == ("bad_steps", pytest.approx(1 / 70))  # 1 of (8 over 4) ways
    assert found.verdict.state == "less stable"
    assert "4 of 4 runs have bad steps" in found.verdict.sentence
    assert "p = 0.014" in found.verdict.sentence
    assert primary.interval is not None
    assert primary.interval.low <= 3.5 / STEPS <= primary.interval.high
    assert "exact permutation test over runs, one-sided, 70 ways" in found.statement


def test_one_bad_seed_of_three_is_not_less_stable_however_many_its_steps(make_run: RunMaker) -> None:
    found = compared(make_run, [0, 0, 0], [60, 0, 0])
    assert found.pairs[0].verdict.state == "less stable"  # a test over steps would say so
    assert found.verdict.state == "not enough data"
    assert found.tested[0].p == pytest.approx(0.5)


def test_two_seeds_a_side_cannot_show_anything_and_that_is_said(make_run: RunMaker) -> None:
    found = compared(make_run, [0, 0], [9, 9])
    assert found.tested[0].p == pytest.approx(1 / 6)
    assert found.verdict.state == "unstable"  # every run is, by itself
    assert "no difference can be shown at 0.05: the smallest possible p is 0.17" in found.verdict.detail
    assert found.tested[0].interval is None


def test_seeds_without_a_difference_are_stable_and_differences_are_of_means(make_run: RunMaker) -> None:
    found = compared(make_run, [0, 0, 0], [0, 0, 0])
    assert found.verdict.state == "stable"
    p99 = next(one for one in found.tested if one.measure == "grad_norm/p99")
    means = [
        np.mean([run.measures.number("grad_norm/p99") for run in side.runs])
        for side in (found.baseline, found.candidate)
    ]
    assert isinstance(p99.difference, Quantity)
    assert p99.difference.value == pytest.approx(means[1] - means[0])
    assert p99.p is not None
    assert p99.p_adjusted is not None
    assert p99.p_adjusted >= p99.p
    corrected = [one for one in found.tested[1:] if one.p is not None]
    assert f"{len(corrected)} more measures were tested two-sided, with Holm's correction" in found.statement
    to_plain(found)


def test_one_run_a_side_says_what_it_cannot_tell(make_run: RunMaker) -> None:
    reference, sides = group_runs([run_of(make_run, 0)], [run_of(make_run, 0, lr=2e-4, bad=12)])
    found = compare_groups(reference, sides[0])
    primary = found.tested[0]
    assert found.verdict == found.pairs[0].verdict
    assert "Fisher's exact test" in primary.statement
    assert primary.p is not None
    assert primary.p < 0.001
    assert primary.interval is not None
    assert "of these two runs only" in primary.interval.how
    assert primary.interval.low < 12 / STEPS < primary.interval.high
    assert "another seed would do, one run a side cannot tell" in found.statement


def test_a_smoothed_run_counts_no_single_steps_and_is_not_tested(make_run: RunMaker) -> None:
    smoothed = run_of(
        make_run, 0, lr=2e-4, bad=10, provenance={"imported": {"from": "x", "format": "mmengine", "smoothing": 10}}
    )
    found = compare_groups(*(lambda pair: (pair[0], pair[1][0]))(group_runs([run_of(make_run, 0)], [smoothed])))
    side = found.candidate.runs[0]
    for key in ("bad_steps", "nonfinite_steps", "spikes", "spike_rate"):
        assert side.measures.readings[key].reason == "smoothed over 10: one bad step shows as 10"  # type: ignore[union-attr]
    assert side.measures.number("grad_norm/p50") is not None
    assert found.tested[0].p is None
    assert "at least 9 bad steps in 400 (smoothed over 10" in found.verdict.sentence
    assert "Bad steps were not tested" in found.statement
    assert "chance" not in found.verdict.detail
    assert any("smoothed over 10" in limit for limit in found.pairs[0].limits)


def test_a_run_counts_once_on_its_side(make_run: RunMaker) -> None:
    """Copies would be dealt as if they were other seeds: three of one run would "show" a difference."""
    calm, bad = run_of(make_run, 0), run_of(make_run, 0, lr=2e-4, bad=5)
    with pytest.raises(UserError, match=r"g: the run 'lr0\.0002' is there more than once"):
        group_runs([calm], [], {"g": [bad, bad, bad]})
    with pytest.raises(UserError, match=r"the baseline's side: the run 'lr0\.0001'"):
        group_runs([calm, calm], [bad])
    assert group_runs([calm], [calm])[1][0].runs == (calm,)  # against itself


def test_runs_that_do_not_count_their_bad_steps_are_not_said_to_be_tested(make_run: RunMaker) -> None:
    smoothed = {"imported": {"from": "x", "format": "mmengine", "smoothing": 10}}
    left = [run_of(make_run, seed) for seed in range(3)]
    right = [run_of(make_run, seed, lr=2e-4, bad=5) for seed in range(2)]
    right.append(run_of(make_run, 2, lr=2e-4, bad=5, provenance=smoothed))
    reference, (side,) = group_runs(left, [], {"g": right})
    found = compare_groups(reference, side)
    assert found.tested[0].p == pytest.approx(0.1)  # 1 of (5 over 2) ways
    assert "Of 3 and 2 runs, the verdict rests on one test" in found.statement
    assert "2 of 2 runs have bad steps" in found.verdict.sentence
    assert "With 3 and 2 runs no difference can be shown" in found.verdict.detail


def failing(gate: str, make_run: RunMaker, before: list[int], after: list[int]) -> tuple[bool, bool]:
    """Whether it fails, and whether that is because it could not be told."""
    found = compared(make_run, before, after)
    (result,) = check_gates(parse_gates([gate]), found)
    return result.failed, result.reason.startswith("not measured")


def test_worse_is_never_more_than_the_test_shows(make_run: RunMaker) -> None:
    assert failing("worse", make_run, [0], [1]) == (True, False)  # the verdict is "less stable"
    assert failing("worse", make_run, [10], [60]) == (True, False)
    assert failing("worse", make_run, [10], [11]) == (True, True)  # both unstable, and so few more may be chance
    assert failing("worse", make_run, [11], [10]) == (False, False)
    assert failing("worse", make_run, [9, 9, 9], [9, 10, 9]) == (True, True)
    assert failing("worse", make_run, [9, 9, 9], [9, 8, 9]) == (False, False)
    assert failing("worse", make_run, [9, 9, 9], [19, 18, 19]) == (True, False)


def test_a_single_nonfinite_step_says_that_it_may_be_chance(make_run: RunMaker) -> None:
    few, many = (compared(make_run, [0], [bad]).verdict for bad in (1, 12))
    assert few.state == many.state == "less stable"
    assert "Non-finite are 1 of its 400 steps and none of the baseline's; that alone may be chance (p = 0.5)." in (
        few.detail
    )
    assert "chance" not in many.detail


def test_the_blocks_of_runs_of_different_length_are_both_named(make_run: RunMaker) -> None:
    def pace(steps: int, batch: int) -> Run:
        norm = np.ones(steps)
        norm[::50] = np.nan
        settings = {"training": {"batch_size": batch}}
        return make_run({"loss/total": np.ones(steps), "train/grad_norm": norm}, name=f"of{batch}", settings=settings)

    reference, sides = group_runs([pace(6000, 1)], [pace(600, 10)])
    interval = compare_groups(reference, sides[0], align="samples").tested[0].interval
    assert interval is not None
    assert "blocks of 10/18 steps" in interval.how  # at least 10; the cube root of 6000 is 18
