"""Reduction keeps every extreme."""

from __future__ import annotations

import numpy as np
import pytest

from bifusion_diag.reports.reduce import min_max, running_median, smoothed


def test_no_spike_is_lost() -> None:
    y = np.random.default_rng(0).normal(size=100_000)
    y[[5, 70_000]] = [50, -50]
    x, kept = min_max(np.arange(y.size), y)
    assert x.size <= 2000
    assert (np.diff(x) > 0).all()
    assert kept.max() == 50
    assert kept.min() == -50
    np.testing.assert_array_equal(kept, y[x])


def test_short_lines_are_kept_as_they_are() -> None:
    x, y = np.arange(5), np.array([1, np.nan, 3, np.inf, 5])
    assert min_max(x, y)[1] is y


def test_running_median_skips_nonfinite_values() -> None:
    smooth = running_median(np.array([1, 2, np.nan, 4, np.inf]), window=3)
    assert smooth == pytest.approx([1.5, 1.5, 3, 4, 4])


def test_few_values_are_not_smoothed() -> None:
    few = np.arange(41.0)
    few[3] = np.inf
    np.testing.assert_array_equal(smoothed(few), np.where(few == np.inf, np.nan, few))
    many = np.arange(42.0)
    many[20] = 1e9
    assert smoothed(many)[20] == 21  # median of 10 … 30 with 1e9 in place of 20
