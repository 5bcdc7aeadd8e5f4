"""Which input rows meet which output rows under each kernel offset, and the order in which the work is done.

Legend: K kernel offsets · M output rows · P pairs (output row, offset) that have an input row.

Conventions are those of MinkowskiEngine (Choy et al., "4D Spatio-Temporal ConvNets", CVPR 2019): x runs fastest in the
kernel index; odd kernels are centred, even ones start at 0; ``out[c] = sum_k in[c + offset_k] @ kernel[k]``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

# Output rows worked on at once. It bounds the memory of gathered pairs to K · rows · channels numbers, and on a CPU it
# keeps them in the cache; a GPU wants few large launches.
CHUNK_ROWS_CPU = 2048
CHUNK_ROWS_GPU = 1 << 16


def chunk_rows(device: torch.device) -> int:
    """Output rows worked on at once on this kind of device."""
    return CHUNK_ROWS_CPU if device.type == "cpu" else CHUNK_ROWS_GPU


def kernel_offsets(size: int, dilation: int = 1) -> list[tuple[int, int, int]]:
    """The size³ offsets (x, y, z) in the order of the kernel's first axis."""
    start = -(size // 2) if size % 2 else 0
    axis = [dilation * (start + step) for step in range(size)]
    return [(x, y, z) for z in axis for y in axis for x in axis]


@dataclass(frozen=True)
class Chunk:
    """The pairs of some consecutive output rows, sorted by (offset, row), the centre offset last.

    The centre's pairs (every row with itself) are not listed in ``source`` and ``local``: they need no gathering.
    """

    start: int
    stop: int
    source: Tensor  # (P,) int32 input row of each pair
    local: Tensor  # (P,) int32 output row of each pair, counted from `start`
    offsets: tuple[int, ...]  # kernel index of each run of pairs
    lengths: tuple[int, ...]  # how many pairs of `source` each run has; they add up to P
    bag: Tensor  # (P or P + rows,) int32 pairs sorted by (row, offset)
    bag_start: Tensor  # (rows,) int32 where each row's pairs start in `bag`


def _chunk(table: Tensor, kernel_index: list[int], start: int, stop: int, has_centre: bool) -> Chunk:
    part = table[:, start:stop]
    hit = part >= 0
    listed = hit[:-1] if has_centre else hit
    rows = torch.arange(stop - start, dtype=torch.int32, device=table.device).expand_as(listed)
    runs = [(index, length) for index, length in zip(kernel_index, listed.sum(1).tolist(), strict=False) if length]
    position = (hit.view(-1).cumsum(0, dtype=torch.int32) - 1).view_as(hit)
    per_row = hit.sum(0, dtype=torch.int32)
    return Chunk(
        start,
        stop,
        source=part[: len(listed)][listed],
        local=rows[listed],
        offsets=tuple(index for index, _ in runs),
        lengths=tuple(length for _, length in runs),
        bag=position.t()[hit.t()],
        bag_start=per_row.cumsum(0, dtype=torch.int32) - per_row,
    )


class PairTable:
    """Where each row of one side finds its partners on the other side.

    Args:
        table: (K, M) int32 partner row of every offset and row, -1 = none.
        centre: offset under which every row meets itself, if there is one.
        single: every row has exactly one partner in all.
    """

    def __init__(self, table: Tensor, *, centre: int | None = None, single: bool = False) -> None:
        self._table = table
        self.centre = centre
        self.single = single

    @property
    def table(self) -> Tensor:
        """(K, M) int32 partner row of every offset and row, -1 = none."""
        return self._table

    @property
    def rows(self) -> int:
        return self._table.shape[1]

    @cached_property
    def chunks(self) -> list[Chunk]:
        """The work, in an order that suits the hardware."""
        volume, table = self._table.shape[0], self._table
        order = [index for index in range(volume) if index != self.centre]
        if self.centre is not None:
            order.append(self.centre)
            table = table[torch.tensor(order, device=table.device)]
        step = chunk_rows(table.device)
        return [
            _chunk(table, order, start, min(start + step, self.rows), self.centre is not None)
            for start in range(0, self.rows, step)
        ]

    @cached_property
    def columns(self) -> Tensor:
        """(M, K) int32 partner row plus one of every row and offset, 0 = none."""
        return (self.table.t() + 1).contiguous()

    def reversed(self, rows: int, *, single: bool = False) -> PairTable:
        """The same pairs seen from the other side, which has so many rows. Under one offset rows meet one to one."""
        result = torch.full((self.table.shape[0], rows), -1, dtype=torch.int32, device=self.table.device)
        offset, row = (self.table >= 0).nonzero(as_tuple=True)
        result[offset, self.table[offset, row].long()] = row.int()
        return PairTable(result, single=single)


class MirroredTable(PairTable):
    """The other side of a table between a set of voxels and itself, for an odd kernel.

    The pairs of offset k are those of offset K - 1 - k with the two sides exchanged: the chunks are shared, only the
    kernel index is counted from the end.
    """

    def __init__(self, original: PairTable) -> None:
        super().__init__(original.table, centre=original.centre)
        self._original = original

    @property
    def table(self) -> Tensor:
        return self._table.flip(0)  # made when asked for: only im2col for the gradient of its input does

    @cached_property
    def chunks(self) -> list[Chunk]:
        last = self._table.shape[0] - 1
        return [
            replace(chunk, offsets=tuple(last - index for index in chunk.offsets)) for chunk in self._original.chunks
        ]


@dataclass(frozen=True)
class KernelMap:
    """The pairs of one convolution, shared by all layers of the same geometry.

    Attributes:
        forward: every output row's input rows.
        backward: every input row's output rows.
    """

    forward: PairTable
    backward: PairTable

    def transposed(self) -> KernelMap:
        """The pairs of the transposed convolution."""
        return KernelMap(self.backward, self.forward)


def symmetric_map(table: Tensor) -> KernelMap:
    """The map of an odd kernel between a set of voxels and itself, from its table (K, M) of input rows."""
    forward = PairTable(table, centre=table.shape[0] // 2)
    return KernelMap(forward, MirroredTable(forward))


def general_map(table: Tensor, rows_in: int) -> KernelMap:
    """The map of any kernel, from its table (K, M) of input rows."""
    forward = PairTable(table)
    return KernelMap(forward, forward.reversed(rows_in))


def pooling_map(parent: Tensor, child: Tensor, volume: int, rows_out: int) -> KernelMap:
    """The map of a convolution whose kernel size equals its stride: every input voxel lies in one output voxel.

    Args:
        parent: (rows_in,) int64 output row of each input row.
        child: (rows_in,) int64 kernel index of each input row.
        volume: K.
        rows_out: number of output rows.
    """
    table = torch.full((volume, rows_out), -1, dtype=torch.int32, device=parent.device)
    table[child, parent] = torch.arange(len(parent), dtype=torch.int32, device=parent.device)
    forward = PairTable(table)
    return KernelMap(forward, forward.reversed(len(parent), single=True))
