"""Intervals and tests for the difference of two sides, and what they can tell.

Several runs a side: **runs** are resampled, never steps; the steps of one run share its seed and are no repetitions.

- Interval: the percentile bootstrap of the difference of the means (:func:`scipy.stats.bootstrap`), widened for few
  runs as Hesterberg (2015, "What teachers should know about the bootstrap") does: the level is raised until the
  interval is as wide as Student's t on n − 1 degrees of freedom would have it; n is that of the smaller side. The plain
  percentile interval is too narrow: simulated, its "95 %" hold the truth in 85 % of comparisons of 4 runs a side, the
  widened one in 96 %. Of 3 runs no resampling reaches further than the runs themselves (89 %), so there is none. BCa
  does not mend that: its acceleration is a third moment, estimated from a handful of runs, and it is not defined where
  they are alike.
- Test: the exact permutation test of the difference of the means (:func:`scipy.stats.permutation_test`), over all ways
  to deal the runs to the two sides where these are at most `MOST_WAYS`, else over as many random ones.

One run a side: a **moving-block bootstrap** (Künsch, 1989) within each run. Blocks of neighbouring steps keep the
dependence between them. It tells how sure the number is of these two runs, not what another seed would give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 9_999
BLOCK_RESAMPLES = 999
LEAST_RUNS = 4  # of a side, for an interval
MOST_WAYS = 20_000  # of dealing runs to two sides, that are all tried
SHORTEST_BLOCK = 10
LEAST_BLOCKS = 5  # of a run, for an interval: of one block every resample is the run itself
RANDOM_SEED = 0


def bootstrap_interval(
    baseline: Sequence[float], candidate: Sequence[float], level: float = LEVEL
) -> tuple[float, float] | None:
    """Interval of mean(candidate) − mean(baseline); None where a side has too few runs or nothing varies."""
    least = min(len(baseline), len(candidate))
    if least < LEAST_RUNS or (len(set(baseline)) == 1 and len(set(candidate)) == 1):
        return None
    from scipy.stats import bootstrap  # loads for long, and most comparisons are of one run a side

    def difference(left: NDArray[np.float64], right: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        return np.asarray(right.mean(axis=axis) - left.mean(axis=axis))

    found = bootstrap(
        (np.asarray(baseline), np.asarray(candidate)),
        difference,
        n_resamples=RESAMPLES,
        confidence_level=widened(level, least),
        method="percentile",
        vectorized=True,
        random_state=np.random.default_rng(RANDOM_SEED),
    ).confidence_interval
    return float(found.low), float(found.high)


def widened(level: float, runs: int) -> float:
    """The level at which a percentile interval of so many runs is as wide as Student's t would have it."""
    from scipy.stats import norm, t

    quantile = math.sqrt(runs / (runs - 1)) * float(t.ppf((1 + level) / 2, runs - 1))
    return 1 - 2 * float(norm.sf(quantile))


def permutation_p(
    baseline: Sequence[float], candidate: Sequence[float], alternative: Literal["greater", "two-sided"] = "two-sided"
) -> float | None:
    """The chance of a difference of the means as large if runs were dealt to the sides at random.

    None where a side has one run only: the test is over runs.

    Args:
        baseline: one number a run.
        candidate: one number a run.
        alternative: "greater": the candidate's mean is; of "two-sided" the smaller chance counts twice.
    """
    if min(len(baseline), len(candidate)) < 2:
        return None
    from scipy.stats import permutation_test

    def difference(left: NDArray[np.float64], right: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        return np.asarray(left.mean(axis=axis) - right.mean(axis=axis))

    number = ways(len(baseline), len(candidate))
    resamples = number if number <= MOST_WAYS else RESAMPLES  # as many as there are: each of them once
    samples: Any = (np.asarray(candidate, np.float64), np.asarray(baseline, np.float64))
    return float(
        permutation_test(
            samples,
            difference,
            vectorized=True,
            alternative=alternative,
            n_resamples=resamples,
            random_state=np.random.default_rng(RANDOM_SEED),
        ).pvalue
    )


def ways(baseline: int, candidate: int) -> int:
    """In how many ways so many runs can be dealt to two sides."""
    return math.comb(baseline + candidate, candidate)


def smallest_p(baseline: int, candidate: int, alternative: Literal["greater", "two-sided"] = "two-sided") -> float:
    """The smallest p that the test can give: with few runs it may be above any level."""
    number = ways(baseline, candidate)
    least = 1 / number if number <= MOST_WAYS else 1 / (RESAMPLES + 1)  # of random ways, the runs as they are count too
    return min(1.0, least if alternative == "greater" else 2 * least)


def holm(values: Sequence[float]) -> list[float]:
    """p after Holm's correction (1979) for so many tests, in the same order."""
    order = sorted(range(len(values)), key=lambda place: values[place])
    adjusted = [0.0] * len(values)
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = largest
    return adjusted


def block_length(steps: int) -> int:
    """Steps of a block: the cube root of all (Künsch's rate for a variance), and at least `SHORTEST_BLOCK`."""
    return max(1, min(steps, max(SHORTEST_BLOCK, round(steps ** (1 / 3)))))


def block_interval(
    baseline: NDArray[np.float64], candidate: NDArray[np.float64], level: float = LEVEL
) -> tuple[float, float] | None:
    """Moving-block bootstrap interval of mean(candidate) − mean(baseline), each over its own steps (K,).

    None where nothing varies in either run, or one is shorter than `LEAST_BLOCKS` blocks.
    """
    if min(one.size / block_length(one.size) if one.size else 0 for one in (baseline, candidate)) < LEAST_BLOCKS:
        return None
    if np.ptp(baseline) == 0 and np.ptp(candidate) == 0:
        return None
    rng = np.random.default_rng(RANDOM_SEED)
    drawn = _block_means(candidate, rng) - _block_means(baseline, rng)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _block_means(values: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Means of resampled runs: (BLOCK_RESAMPLES,)."""
    length = block_length(values.size)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    blocks = (sums[length:] - sums[:-length]) / length  # mean of every block
    drawn = -(-values.size // length)
    return np.asarray([blocks[rng.integers(0, blocks.size, drawn)].mean() for _ in range(BLOCK_RESAMPLES)])
