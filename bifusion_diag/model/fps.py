"""Farthest point sampling: points that are spread over a scene.

Source: Eldar et al., "The farthest point strategy for progressive image sampling", IEEE TIP 1997; used for queries in
Misra et al., "3DETR", ICCV 2021.

Legend: M points · K picks.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def farthest_points(coords: Tensor, picks: int) -> Tensor:
    """Pick the first point, then again and again the point that is farthest from all picked ones.

    Of points that are equally far, the first is taken. On integer coordinates (up to 2^26 apart) every distance is
    exact, so that CPU and GPU pick the same.

    Args:
        coords: (M, 3), integer or floating point, M ≥ 1.
        picks: K; of fewer points, all are picked.

    Returns:
        (min(K, M),) int64 in the order of picking, no point twice.
    """
    places = coords.double()
    ids = torch.arange(len(places), device=places.device)
    nearest = places.new_full((len(places),), torch.inf)  # squared distance to the nearest pick, -1 = picked itself
    picked = []
    last = ids[:1]
    for _ in range(min(picks, len(places))):
        picked.append(last)
        offset = places - places.index_select(0, last)
        nearest = torch.minimum(nearest, offset[:, 0] ** 2 + offset[:, 1] ** 2 + offset[:, 2] ** 2)
        nearest.index_fill_(0, last, -1.0)
        last = torch.where(nearest == nearest.amax(), ids, len(places)).amin(dim=0, keepdim=True)
    return torch.cat(picked)
