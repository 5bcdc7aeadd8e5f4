"""Nearest neighbours within scenes, by a k-d tree on the CPU.

Legend: N points of the batch · A points asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

from bifusion_diag.model.segments import split_rows, starts


class Neighbourhood(NamedTuple):
    """Points of one scene and their neighbours, as rows of the batch."""

    points: NDArray[np.int64]  # (A,)
    neighbours: NDArray[np.int64]  # (A, k); -1 = no neighbour near enough


def draw(candidates: Tensor, most: int) -> NDArray[np.int64]:
    """At most ``most`` of the given rows (int64), ascending; drawn from PyTorch's CPU generator if there are more."""
    rows = candidates.cpu()
    if len(rows) > most:
        rows = rows[torch.randperm(len(rows))[:most]].sort().values
    return rows.numpy()


def neighbourhoods(
    xyz: Tensor,
    point_counts: tuple[int, ...],
    points: NDArray[np.int64],
    sources: NDArray[np.bool_],
    *,
    k: int,
    radius: float = float("inf"),
) -> Iterator[Neighbourhood]:
    """The k nearest sources of each point, itself excluded, in its own scene.

    Args:
        xyz: (N, 3) finite coordinates [m].
        point_counts: points of each scene, sum = N.
        points: (A,) rows to ask for, ascending; either all of them are sources or none is.
        sources: (N,) which rows may be neighbours.
        k: neighbours of each point; fewer in a scene with fewer sources.
        radius: farthest distance of a neighbour [m].

    Yields:
        One neighbourhood for each scene in which a point and a source other than itself exist.
    """
    for first, scene_xyz in zip(starts(point_counts), split_rows(xyz.detach().cpu(), point_counts), strict=True):
        last = first + len(scene_xyz)
        asked = points[(points >= first) & (points < last)]
        pool = first + np.flatnonzero(sources[first:last])
        if len(asked) == 0 or len(pool) == 0:
            continue
        own = bool(sources[asked].any())  # then one of the found is the point itself
        tree = cKDTree(scene_xyz.numpy()[pool - first])
        wanted = min(k + own, len(pool))
        _, found = tree.query(scene_xyz.numpy()[asked - first], k=np.arange(1, wanted + 1), distance_upper_bound=radius)
        rows = np.append(pool, -1)[found]
        rows = _without_self(rows, asked) if own else rows
        if rows.shape[1]:
            yield Neighbourhood(asked, rows)


def _without_self(rows: NDArray[np.int64], asked: NDArray[np.int64]) -> NDArray[np.int64]:
    """Drop the point itself from (A, k+1) found rows; the last of them where coincident points crowd it out."""
    drop = rows == asked[:, None]
    drop[~drop.any(axis=1), -1] = True
    return rows[~drop].reshape(len(rows), rows.shape[1] - 1)
