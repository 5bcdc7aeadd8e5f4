"""How many steps were not finite, where a log holds means of several: a log smoothed over 10 shows one as ten.

A logged mean is NaN or infinite if one of its steps is, and finite only if all of them are. So every bad mean hides at
least one bad step, and no step of a finite one is bad: where means overlap, that often leaves a single step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.record.schema import Floats, Ints

LISTED = 20
MAX_STEPS = 50_000_000  # of a run, whose steps are looked through one by one


class Bounds(NamedTuple):
    """Of one series."""

    logged: int  # means that are not finite
    at_least: int  # steps that were not finite
    suspects: Ints  # steps that may have been; all of them were where there are as many as `at_least`


def bounds(steps: Ints, values: Floats, window: int) -> Bounds:
    """Bounds from a series of means.

    Args:
        steps: (K,) ascending: the last step of each mean.
        values: (K,) the means.
        window: steps in a mean.
    """
    bad = ~np.isfinite(values)
    if not bad.any():
        return Bounds(0, 0, np.zeros(0, np.int64))
    if window <= 1 or steps[-1] - steps[0] + window > MAX_STEPS:
        return Bounds(int(bad.sum()), int(bad.sum()) if window <= 1 else 1, steps[bad])
    origin = int(steps[0]) - window + 1
    length = int(steps[-1]) - origin + 1
    allowed = _covered(steps[bad] - origin, window, length) & ~_covered(steps[~bad] - origin, window, length)
    suspects = np.flatnonzero(allowed) + origin
    suspects = suspects[suspects >= min(0, int(steps[0]))]
    least, chosen = 0, origin - 1
    for end in steps[bad].tolist():
        if chosen > end - window:
            continue
        place = int(np.searchsorted(suspects, end, side="right")) - 1
        chosen = int(suspects[place]) if place >= 0 and suspects[place] > end - window else end
        least += 1
    return Bounds(int(bad.sum()), least, suspects)


def _covered(ends: Ints, window: int, length: int) -> NDArray[np.bool_]:
    """Which places are in one of the windows that end at `ends`."""
    change = np.zeros(length + 1, np.int64)
    np.add.at(change, ends - window + 1, 1)
    np.add.at(change, ends + 1, -1)
    return np.cumsum(change[:-1]) > 0
