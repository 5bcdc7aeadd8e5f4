"""In which order the pairs of a convolution are worked on: chunks of output rows, pieces of gathered pairs.

Legend: K kernel offsets · M output rows · P pairs (output row, offset) that have an input row.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

# Output rows worked on at once: their products, K · rows · channels numbers, bound the memory.
CHUNK_ROWS = 2048
# Pairs gathered at once: with some 100 channels they stay in a core's second-level cache until they are multiplied.
PIECE_PAIRS = 4096


@dataclass(frozen=True)
class Piece:
    """Consecutive pairs of a chunk: whole runs of one offset each."""

    source: Tensor  # (P,) int32 input row of each pair
    local: Tensor  # (P,) int32 output row of each pair, counted from the chunk's first row
    offsets: tuple[int, ...]  # kernel index of each run
    lengths: tuple[int, ...]  # pairs of each run; they add up to P


@dataclass(frozen=True)
class Chunk:
    """The pairs of some consecutive output rows, sorted by (offset, row).

    The centre's pairs (every row with itself) are not among them: they need no gathering.
    """

    start: int
    stop: int
    pieces: tuple[Piece, ...]
    lengths: tuple[int, ...]  # pairs of each run of all pieces
    pairs: int  # their sum
    bag: Tensor  # (pairs,) int32 pairs sorted by (row, offset)
    bag_start: Tensor  # (rows,) int32 where each row's pairs start in `bag`


def plan(table: Tensor, centre: int | None) -> list[Chunk]:
    """The chunks of a table (K, M) int32 of partner rows, -1 = none; ``centre``: offset that needs no gathering."""
    order = [index for index in range(len(table)) if index != centre]
    if centre is not None:
        table = table.index_select(0, torch.tensor(order, dtype=torch.int64, device=table.device))
    rows = table.shape[1]
    return [_chunk(table, order, start, min(start + CHUNK_ROWS, rows)) for start in range(0, rows, CHUNK_ROWS)]


def _chunk(table: Tensor, kernel_index: list[int], start: int, stop: int) -> Chunk:
    part = table[:, start:stop].contiguous()
    rows = stop - start
    hit = part >= 0
    cell = hit.flatten().nonzero().view(-1)  # a pair is cell offset · rows + row of the part
    source = part.view(-1).index_select(0, cell)
    per_row = hit.sum(0, dtype=torch.int32)
    position = (hit.view(-1).cumsum(0, dtype=torch.int32) - 1).view_as(hit).t().contiguous()
    pieces = _pieces(source, (cell % rows).int(), kernel_index, hit.sum(1).tolist())
    return Chunk(
        start,
        stop,
        pieces=pieces,
        lengths=tuple(length for piece in pieces for length in piece.lengths),
        pairs=len(source),
        bag=position.view(-1).index_select(0, hit.t().flatten().nonzero().view(-1)),
        bag_start=per_row.cumsum(0, dtype=torch.int32) - per_row,
    )


def _pieces(source: Tensor, local: Tensor, kernel_index: list[int], lengths: list[int]) -> tuple[Piece, ...]:
    groups: list[list[tuple[int, int]]] = []
    room = 0
    for index, length in zip(kernel_index, lengths, strict=True):
        if not length:
            continue
        if not groups or length > room:
            groups.append([])
            room = PIECE_PAIRS
        groups[-1].append((index, length))
        room -= length
    bounds = [0, *accumulate(sum(length for _, length in group) for group in groups)]
    return tuple(
        Piece(
            source[start:stop],
            local[start:stop],
            offsets=tuple(index for index, _ in group),
            lengths=tuple(length for _, length in group),
        )
        for start, stop, group in zip(bounds[:-1], bounds[1:], groups, strict=True)
    )
