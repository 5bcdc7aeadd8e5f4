"""Reductions of rows that share an index (points of a superpoint), and the way back.

All of them add in the order of the rows on the CPU, so a rerun gives the same bits; on CUDA the sums need
``torch.use_deterministic_algorithms(True)`` for that. Rows are gathered with ``index_select`` because the backward pass
of ``x[index]`` adds with atomics on several CPU threads. Segments without a row are 0.

Legend: N rows · S segments · ``...`` any trailing shape.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(values: Tensor, index: Tensor, segments: int) -> Tensor:
    """Sum the rows of each segment.

    Args:
        values: (N, ...).
        index: (N,) int64, each row's segment.
        segments: S.

    Returns:
        (S, ...).
    """
    return values.new_zeros((segments, *values.shape[1:])).index_add(0, index, values)


def segment_mean(values: Tensor, index: Tensor, segments: int) -> Tensor:
    """Average the rows of each segment: (N, ...) → (S, ...)."""
    sizes = segment_sum(values.new_ones(len(values)), index, segments).clamp(min=1)
    return segment_sum(values, index, segments) / sizes.view(-1, *[1] * (values.dim() - 1))


def segment_max(values: Tensor, index: Tensor, segments: int) -> Tensor:
    """Largest value of each segment and column: (N, C) → (S, C).

    The gradient goes to the first row that attains the maximum. A NaN wins over every number.
    """
    rows, columns = values.shape
    spread = index[:, None].expand(rows, columns)
    with torch.no_grad():
        largest = values.new_zeros(segments, columns).scatter_reduce(0, spread, values, "amax", include_self=False)
        attains = (values == largest.index_select(0, index)) | values.isnan()
        candidates = torch.where(attains, torch.arange(rows, device=values.device)[:, None], rows)
        first = index.new_full((segments, columns), rows).scatter_reduce(0, spread, candidates, "amin")
    empty = first == rows
    return values.gather(0, first.masked_fill(empty, 0)).masked_fill(empty, 0.0)


def segment_extent(values: Tensor, index: Tensor, segments: int) -> Tensor:
    """Largest minus smallest value of each segment and column: (N, C) → (S, C), without a gradient."""
    with torch.no_grad():
        return segment_max(values, index, segments) + segment_max(-values, index, segments)


def split_rows(values: Tensor, counts: tuple[int, ...]) -> list[Tensor]:
    """Cut rows that are concatenated by scene, (ΣN_i, ...), into one (N_i, ...) view a scene."""
    return list(values.split(list(counts)))


def starts(counts: tuple[int, ...]) -> tuple[int, ...]:
    """Index of each scene's first row among the concatenated rows."""
    return tuple(sum(counts[:scene]) for scene in range(len(counts)))
