"""The interval that is printed beside a median."""

from __future__ import annotations

from collections.abc import Sequence

from scipy.stats import binom


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median by order statistics, at least; of fewer than six values, less: their range."""
    ordered, n = sorted(values), len(values)
    rank = max(int(binom.ppf(0.025, n, 0.5)) - 1, 0)  # so many values, or fewer, lie below the median in under 2.5 %
    return ordered[rank], ordered[n - 1 - rank]
