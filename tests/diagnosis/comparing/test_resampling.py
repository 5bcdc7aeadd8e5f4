"""Intervals and tests over runs, against enumeration and simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bifusion_diag.diagnosis.comparing import resampling
from bifusion_diag.diagnosis.comparing.resampling import (
    MOST_WAYS,
    block_interval,
    bootstrap_interval,
    holm,
    permutation_p,
    smallest_p,
    ways,
)


def enumerated(baseline: list[float], candidate: list[float]) -> tuple[float, float]:
    """The chance, of all ways to deal the runs, of a difference at least as large, and at most as large."""
    pooled = [*candidate, *baseline]
    observed = np.mean(candidate) - np.mean(baseline)
    differences = []
    for chosen in itertools.combinations(range(len(pooled)), len(candidate)):
        others = [value for place, value in enumerate(pooled) if place not in chosen]
        differences.append(np.mean([pooled[place] for place in chosen]) - np.mean(others))
    found = np.asarray(differences)
    return float(np.mean(found >= observed - 1e-12)), float(np.mean(found <= observed + 1e-12))


@pytest.mark.parametrize(
    ("baseline", "candidate"),
    [([1, 2, 3], [4, 5, 6]), ([1, 5, 3, 2], [4, 2.5, 6]), ([0, 0, 0], [0, 0, 1]), ([3, 9], [1, 2, 8, 4, 7])],
)
def test_the_permutation_test_is_exact(baseline: list[float], candidate: list[float]) -> None:
    greater, less = enumerated(baseline, candidate)
    assert permutation_p(baseline, candidate, "greater") == pytest.approx(greater)
    assert permutation_p(baseline, candidate) == pytest.approx(min(1.0, 2 * min(greater, less)))


def test_the_smallest_p_is_that_of_sides_that_do_not_overlap() -> None:
    assert ways(3, 3) == 20
    assert permutation_p([1, 2, 3], [4, 5, 6], "greater") == pytest.approx(smallest_p(3, 3, "greater"))
    assert permutation_p([1, 2, 3, 4], [5, 6, 7, 8]) == pytest.approx(smallest_p(4, 4))
    assert permutation_p([1], [2, 3, 4]) is None


def test_of_very_many_ways_random_ones_are_tried() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=12), rng.normal(0.8, 1, 12)
    assert ways(12, 12) > resampling.MOST_WAYS
    p = permutation_p(left.tolist(), right.tolist())
    assert p is not None
    from scipy.stats import ttest_ind

    assert p == pytest.approx(float(ttest_ind(left, right).pvalue), abs=0.02)


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("runs", [4, 6])
def test_the_interval_covers_the_true_difference(monkeypatch: pytest.MonkeyPatch, runs: int, skewed: bool) -> None:
    """Of 200 simulated comparisons, the 95 % interval holds the truth in at least 92 %: 2 standard errors of 200 fewer.
    Of the plain percentile interval of 4 runs that is 85 %."""
    monkeypatch.setattr(resampling, "RESAMPLES", 999)
    rng = np.random.default_rng(runs)
    covered = 0
    for _ in range(200):
        draw = rng.lognormal(0, 0.5, (2, runs)) if skewed else rng.normal(0, 1, (2, runs))
        left, right = draw[0], draw[1] + 2.0
        ends = bootstrap_interval(left.tolist(), right.tolist())
        assert ends is not None
        covered += ends[0] <= 2.0 <= ends[1]
    assert covered >= 0.92 * 200


def test_there_is_no_interval_of_three_runs_or_of_runs_that_are_all_alike() -> None:
    assert bootstrap_interval([1, 2, 4], [3, 4, 5, 6]) is None
    assert bootstrap_interval([0, 0, 0, 0], [0, 0, 0, 0]) is None


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_blocks_keep_the_dependence_of_neighbouring_steps() -> None:
    """Ones that come in bursts of 10 vary 10 × as much as single ones: the interval is √10 × as wide."""
    rng = np.random.default_rng(0)
    single = (rng.random(27_000) < 0.1).astype(float)
    bursts = np.repeat((rng.random(2_700) < 0.1).astype(float), 10)
    none = np.zeros(27_000)

    def width(values: np.ndarray) -> float:
        ends = block_interval(none, values)
        assert ends is not None
        return ends[1] - ends[0]

    assert width(single) == pytest.approx(2 * 1.96 * np.sqrt(0.09 / 27_000), rel=0.15)
    assert width(bursts) == pytest.approx(np.sqrt(10) * width(single), rel=0.3)
    assert block_interval(none, none) is None


def test_a_run_of_fewer_than_five_blocks_has_no_interval() -> None:
    """Of a single block every resample is the run itself: an interval without width would claim certainty."""
    steps = np.zeros(200)
    for length in (2, 10, 49):
        assert block_interval(steps, np.arange(length) % 2.0) is None
    assert block_interval(steps, np.arange(50) % 3.0) is not None


def test_the_smallest_p_of_random_ways_is_what_they_can_give() -> None:
    assert ways(10, 10) > MOST_WAYS
    least = permutation_p(list(range(10)), list(range(100, 110)), "greater")
    assert least == pytest.approx(smallest_p(10, 10, "greater")) == pytest.approx(1 / 10_000)
