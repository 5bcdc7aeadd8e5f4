"""How features lie on the unit sphere: alignment of two kinds, uniformity of one.

Source: Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
Hypersphere", ICML 2020. Aligned but not uniform features have collapsed: everything looks alike.

Legend: N points · C width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

PAIRS = 4096  # pairs drawn a scene
_SEED = 0  # of the draw: the same scene gives the same pairs


class AlignmentMean:
    """Mean cosine between the 2D and the 3D feature of a point, over all valid points of all scenes."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def update(self, f2d: Tensor, f3d: Tensor, valid: Tensor) -> None:
        """Add the points (N,) bool that have both features, each (N, C)."""
        cosine = F.cosine_similarity(f2d[valid].double(), f3d[valid].double(), dim=1)
        self._sum += float(cosine.sum())
        self._count += len(cosine)

    def mean(self) -> float | None:
        """In [-1, 1]; None where no point was valid."""
        return self._sum / self._count if self._count else None


class UniformityMean:
    """log of the mean over pairs x, y of a scene's features of exp(-2 ‖x − y‖²), x and y normalised.

    0 where all features are one and the same; about -4 + small terms where they are evenly spread in many dimensions.
    Pairs are two different points of one scene, drawn by a generator of its own, so that every call draws the same.
    """

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def update(self, features: Tensor) -> None:
        """Add a scene's features (N, C); a scene of one point has no pair."""
        count = len(features)
        if count < 2:
            return
        rng = np.random.default_rng([_SEED, count])
        first = rng.integers(count, size=PAIRS)
        second = (first + rng.integers(1, count, size=PAIRS)) % count
        unit = F.normalize(features.double(), dim=1)
        left, right = (unit.index_select(0, torch.from_numpy(ids).to(unit.device)) for ids in (first, second))
        self._sum += float(torch.exp(-2 * (left - right).square().sum(1)).sum())
        self._count += PAIRS

    def value(self) -> float | None:
        """At most 0; None where no scene had a pair."""
        return float(np.log(self._sum / self._count)) if self._count else None
