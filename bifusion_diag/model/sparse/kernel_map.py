"""Which input rows meet which output rows under each kernel offset.

Legend: K kernel offsets · M output rows.

Conventions are those of MinkowskiEngine (Choy et al., "4D Spatio-Temporal ConvNets", CVPR 2019): x runs fastest in the
kernel index; odd kernels are centred, even ones start at 0; ``out[c] = sum_k in[c + offset_k] @ kernel[k]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bifusion_diag.model.sparse.chunks import Chunk, plan


def kernel_offsets(size: int, dilation: int = 1) -> list[tuple[int, int, int]]:
    """The size³ offsets (x, y, z) in the order of the kernel's first axis."""
    start = -(size // 2) if size % 2 else 0
    axis = [dilation * (start + step) for step in range(size)]
    return [(x, y, z) for z in axis for y in axis for x in axis]


class PairTable:
    """Where each row of one side finds its partners on the other side.

    Args:
        table: (K, M) int32 partner row of every offset and row, -1 = none.
        centre: offset under which every row meets itself, if there is one.
        single: every row has exactly one partner in all.

    Attributes:
        mirrored: offset k of this table belongs to index K - 1 - k of the kernel.
    """

    mirrored = False

    def __init__(self, table: Tensor, *, centre: int | None = None, single: bool = False) -> None:
        self._table: Tensor | None = table
        self.rows = table.shape[1]
        self.centre = centre
        self.single = single

    @property
    def table(self) -> Tensor:
        """(K, M) int32 partner row of every offset and row, -1 = none."""
        return (self.columns - 1).t() if self._table is None else self._table

    @cached_property
    def chunks(self) -> list[Chunk]:
        """The pairs, in the order in which they are worked on."""
        return plan(self.table, self.centre)

    @cached_property
    def columns(self) -> Tensor:
        """(M, K) int32 partner row plus one of every row and offset, 0 = none. It takes the place of the table."""
        columns = (self.table + 1).t().contiguous()  # in this order the transposition is a blocked copy
        self._table = None
        return columns

    def reversed(self, rows: int, *, single: bool = False) -> PairTable:
        """The same pairs seen from the other side, which has so many rows. Under one offset rows meet one to one."""
        result = torch.full((self.table.shape[0], rows), -1, dtype=torch.int32, device=self.table.device)
        offset, row = (self.table >= 0).nonzero(as_tuple=True)
        result[offset, self.table[offset, row].long()] = row.int()
        return PairTable(result, single=single)


class MirroredTable(PairTable):
    """The other side of a table between a set of voxels and itself, for an odd kernel.

    The pairs of offset k are those of offset K - 1 - k with the two sides exchanged: everything is shared, only the
    kernel index is counted from the end.
    """

    mirrored = True

    def __init__(self, original: PairTable) -> None:
        self._original = original
        self.rows = original.rows
        self.centre = original.centre
        self.single = original.single

    @property
    def table(self) -> Tensor:
        return self._original.table.flip(0)

    @cached_property
    def chunks(self) -> list[Chunk]:
        return self._original.chunks

    @cached_property
    def columns(self) -> Tensor:
        return self._original.columns


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
