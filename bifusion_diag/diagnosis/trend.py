"""Whether a noisy series rises or falls in the long run, by medians of blocks: a spike of a step does not count.

A step's noise is not independent of the step before; medians of blocks of many steps nearly are, and a test on these
few numbers claims no more than they show.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCKS = 16
MIN_VALUES = 10 * BLOCKS
MAD_TO_STD = 1.4826


@dataclass(frozen=True)
class Trend:
    """The trend of a series.

    Attributes:
        change: what the line through the medians (Theil 1950, Sen 1968) rises by from the first to the last.
        p: of a rise by chance, Mann–Kendall's test on the medians, one-sided.
        levels: (BLOCKS,) medians of consecutive blocks.
    """

    change: float
    p: float
    levels: NDArray[np.float64]


def block_levels(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Medians (BLOCKS,) of consecutive blocks of about the same size; (K,) K ≥ BLOCKS, all finite."""
    size = len(values) // BLOCKS
    return np.median(values[len(values) - size * BLOCKS :].reshape(BLOCKS, size), axis=1)


def trend_of(values: NDArray[np.float64]) -> Trend:
    """The trend of finite values (K,) K ≥ BLOCKS."""
    from scipy import stats  # takes most of a second, and most records need it not

    levels = block_levels(values)
    at = np.arange(BLOCKS)
    slope = float(stats.theilslopes(levels, at)[0])
    p = float(stats.kendalltau(at, levels, alternative="greater").pvalue) if np.ptp(levels) > 0 else 1.0
    return Trend(slope * (BLOCKS - 1), p, levels)


def noise_of(values: NDArray[np.float64]) -> float:
    """Robust standard deviation of values (K,), from the median absolute deviation."""
    return float(MAD_TO_STD * np.median(np.abs(values - np.median(values)))) if len(values) else 0.0
