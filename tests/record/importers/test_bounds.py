"""Bounds on bad steps from means, against what was really bad."""

from __future__ import annotations

import numpy as np
import pytest

from bifusion_diag.record.importers.bounds import bounds


def logged(bad: list[int], steps: int, window: int, interval: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of single steps (1 to `steps`), of which some are NaN, at every `interval`-th."""
    values = np.ones(steps)
    values[np.asarray(bad, dtype=int) - 1] = np.nan
    at = np.arange(interval, steps + 1, interval)
    return at, np.array([values[max(0, end - window) : end].mean() for end in at])


@pytest.mark.parametrize("seed", range(30))
def test_the_truth_lies_within(seed: int) -> None:
    random = np.random.default_rng(seed)
    window, interval = int(random.integers(1, 15)), int(random.integers(1, 20))
    bad = sorted(random.choice(np.arange(1, 201), size=int(random.integers(1, 8)), replace=False).tolist())
    at, values = logged(bad, 200, window, interval)
    seen = [step for step in bad if any(end - window < step <= end for end in at)]
    found = bounds(at, values, window)
    assert found.logged == np.isnan(values).sum()
    assert found.at_least <= len(seen)
    if window > 1:
        assert set(seen) <= set(found.suspects.tolist())
    if not seen:
        assert found.at_least == 0


def test_overlapping_means_leave_one_step() -> None:
    found = bounds(*logged([37], 100, 10, 1), 10)
    assert (found.logged, found.at_least, found.suspects.tolist()) == (10, 1, [37])


def test_means_side_by_side_leave_their_window() -> None:
    found = bounds(*logged([37], 100, 10, 10), 10)
    assert (found.logged, found.at_least, found.suspects.tolist()) == (1, 1, list(range(31, 41)))


def test_two_far_apart_are_two() -> None:
    found = bounds(*logged([20, 24, 60], 100, 10, 1), 10)
    assert found.at_least == 3
    assert found.logged == 24
