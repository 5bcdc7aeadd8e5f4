"""Fewer vertices without losing a spike: of every bin of consecutive steps, its minimum and its maximum stay."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bifusion_diag.record.schema import Series

MAX_VERTICES = 2000
WINDOW = 21  # of a running median


def min_max(
    x: NDArray[np.int64], y: NDArray[np.float64], vertices: int = MAX_VERTICES
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Reduce a line (K,) to at most `vertices` points, each of them one of the line's; non-finite ones give way."""
    if x.size <= vertices:
        return x, y
    bins = vertices // 2
    edges = np.linspace(0, x.size, bins + 1).astype(int)
    keep: list[int] = []
    for start, stop in pairwise(edges):
        part = y[start:stop]
        finite = np.flatnonzero(np.isfinite(part))
        if finite.size:
            low, high = finite[part[finite].argmin()], finite[part[finite].argmax()]
            keep += sorted({int(start + low), int(start + high)})
        else:
            keep.append(int(start))
    return x[keep], y[keep]


def bins(length: int, most: int) -> NDArray[np.int64]:
    """First index of every bin of consecutive entries, at most so many."""
    count = min(most, length)
    return np.arange(count) * length // max(count, 1)


def running_median(y: NDArray[np.float64], window: int = WINDOW) -> NDArray[np.float64]:
    """Centred running median of the finite values (K,), shorter at the ends; NaN where the window has none."""
    finite = pd.Series(np.where(np.isfinite(y), y, np.nan))
    return finite.rolling(window, center=True, min_periods=1).median().to_numpy()


def smoothed(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """The running median (K,); of fewer than two windows the finite values, as one of nearly all of them is flat."""
    return running_median(y) if len(y) >= 2 * WINDOW else np.where(np.isfinite(y), y, np.nan)


def vertices(series: Series) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """All vertices of a series: its values, or of a reduced one the minimum and maximum of every bucket."""
    if series.exact:
        return series.steps, np.where(np.isfinite(series.value), series.value, np.nan)
    return np.column_stack([series.steps, series.last]).ravel(), np.column_stack([series.min, series.max]).ravel()


def line(series: Series) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The vertices of a series, reduced."""
    return min_max(*vertices(series))
