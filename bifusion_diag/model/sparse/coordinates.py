"""Voxel coordinates of one scale: canonical order, neighbour look-up, the next coarser scale.

Legend: M voxels of the scale · K kernel offsets · *cell* = coordinate divided by the scale's stride.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bifusion_diag.errors import UserError

# A dense look-up grid is used up to this many cells, and only where it is not mostly empty: filling 512 cells costs
# about as much as the binary searches (27 offsets) that one voxel would need instead.
GRID_CELLS = 1 << 26
GRID_CELLS_PER_VOXEL = 512
KEY_LIMIT = 1 << 62
INT32_LIMIT = 1 << 31


class Packing:
    """Bijection between cells (batch, x, y, z) inside a box and integers, in lexicographic order.

    Args:
        low: smallest x, y, z.
        high: largest x, y, z.
        batch: number of batch items.
        margin: cells added on every side, so that neighbours outside the box never meet another row's key.

    Raises:
        UserError: the box has more cells than a 64-bit key can number.
    """

    def __init__(self, low: list[int], high: list[int], batch: int, margin: int = 0) -> None:
        self.low = [value - margin for value in low]
        self.size = [top - bottom + 1 + 2 * margin for bottom, top in zip(low, high, strict=True)]
        self.cells = batch * self.size[0] * self.size[1] * self.size[2]
        if self.cells >= KEY_LIMIT:
            extent = " x ".join(str(top - bottom + 1) for bottom, top in zip(low, high, strict=True))
            raise UserError(
                f"The points span {extent} voxels over {batch} scene(s), more than a 64-bit key can number. "
                "Remove far outliers (crop the scene) or use larger voxels."
            )
        self.strides = (self.size[0] * self.size[1] * self.size[2], self.size[1] * self.size[2], self.size[2], 1)

    def pack(self, cells: Tensor) -> Tensor:
        """Keys (M,) int64 of cells (M, 4) int64."""
        key = cells[:, 0] * self.strides[0]
        for axis in range(3):
            key += (cells[:, axis + 1] - self.low[axis]) * self.strides[axis + 1]
        return key

    def unpack(self, keys: Tensor) -> Tensor:
        """Cells (M, 4) int64 of keys (M,)."""
        columns = []
        rest = keys
        for stride, low in zip(self.strides, [0, *self.low], strict=True):
            index = rest.div(stride, rounding_mode="floor")
            rest = rest - index * stride
            columns.append(index + low)
        return torch.stack(columns, 1)

    def delta(self, offset: tuple[int, int, int]) -> int:
        """What moving by ``offset`` cells adds to a key."""
        return sum(step * stride for step, stride in zip(offset, self.strides[1:], strict=True))


def bounding_box(cells: Tensor) -> tuple[list[int], list[int], int]:
    """Smallest and largest x, y, z of cells (M, 4), and the number of batch items. One synchronisation."""
    low, high = torch.stack([cells.amin(0), cells.amax(0)]).tolist()
    assert low[0] >= 0, "batch indices start at 0"
    return low[1:], high[1:], high[0] + 1


class Level:
    """The voxels of one scale, rows in lexicographic order of (batch, x, y, z).

    Args:
        cells: (M, 4) int64, unique rows in lexicographic order.
        stride: size of a cell in input voxels.
    """

    def __init__(self, cells: Tensor, stride: int) -> None:
        assert cells.shape[0] > 0, "a scale has at least one voxel"
        self.cells = cells
        self.stride = stride
        self.coords = torch.cat([cells[:, :1], cells[:, 1:] * stride], 1).int()
        self._box = bounding_box(cells)

    def __len__(self) -> int:
        return self.cells.shape[0]

    def lookup(self, queries: Tensor, offsets: list[tuple[int, int, int]], *, outside: int = 0) -> Tensor:
        """Which voxel lies at each query plus each offset.

        Args:
            queries: (Q, 4) int64 cells.
            offsets: K offsets (x, y, z) in cells.
            outside: at most so many cells are the queries outside of this scale's bounding box.

        Returns:
            (K, Q) int32 row of the voxel, -1 where there is none.
        """
        margin = outside + max(abs(step) for offset in offsets for step in offset)
        packing = Packing(*self._box, margin=margin)
        keys, wanted = packing.pack(self.cells), packing.pack(queries)
        table = torch.empty(len(offsets), len(queries), dtype=torch.int32, device=keys.device)
        if packing.cells <= min(GRID_CELLS, GRID_CELLS_PER_VOXEL * len(self)):
            grid = torch.full((packing.cells,), -1, dtype=torch.int32, device=keys.device)
            grid[keys] = torch.arange(len(self), dtype=torch.int32, device=keys.device)
            for index, offset in enumerate(offsets):
                torch.index_select(grid, 0, wanted + packing.delta(offset), out=table[index])
            return table
        for index, offset in enumerate(offsets):
            target = wanted + packing.delta(offset)
            row = torch.searchsorted(keys, target, out_int32=True).clamp_(max=len(self) - 1)
            table[index] = row.masked_fill_(keys.index_select(0, row) != target, -1)
        return table

    def coarser(self, factor: int) -> tuple[Level, Tensor]:
        """The scale whose cells hold ``factor``³ of these (floor division), and each voxel's row there (M,) int64."""
        cells = self.cells.clone()
        cells[:, 1:] = cells[:, 1:].div(factor, rounding_mode="floor")
        packing = Packing(*bounding_box(cells))
        keys, parent = torch.unique(packing.pack(cells), return_inverse=True)
        return Level(packing.unpack(keys), self.stride * factor), parent


def check_range(cells: Tensor) -> None:
    """Refuse cells (floating point) that are not finite or beyond int32.

    Raises:
        UserError: with the number of points concerned.
    """
    finite = torch.isfinite(cells).all(1)
    if not bool(finite.all()):
        raise UserError(
            f"{int((~finite).sum())} of {len(cells)} points have non-finite coordinates. Remove them before voxelising."
        )
    beyond = (cells.abs() >= INT32_LIMIT).any(1)
    if bool(beyond.any()):
        raise UserError(
            f"{int(beyond.sum())} of {len(cells)} points lie more than 2^31 voxels from the origin. "
            "Check the unit of the coordinates (metres are expected), remove the outliers or use larger voxels."
        )
