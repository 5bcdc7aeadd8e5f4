"""Of several processes that train together: which of them a bad step began at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Sight(NamedTuple):
    """What one rank saw of a step."""

    loss: float
    local_norm: float  # of its gradient before the all-reduce
    apart: bool = False  # it holds other weights than most


def where_it_began(sights: Sequence[Sight]) -> list[int]:
    """The ranks that a bad step began at: those that hold other weights, else whose loss is not finite, else whose
    gradient is not, else the one whose gradient is largest."""
    if any(sight.apart for sight in sights):
        return [rank for rank, sight in enumerate(sights) if sight.apart]
    for numbers in ([sight.loss for sight in sights], [sight.local_norm for sight in sights]):
        bad = np.flatnonzero(~np.isfinite(numbers))
        if len(bad):
            return [int(rank) for rank in bad]
    return [int(np.argmax([sight.local_norm for sight in sights]))]
