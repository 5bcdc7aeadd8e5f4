"""The built-in engine: pure PyTorch, on any device, with bit-identical results from run to run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

import bifusion_diag
from bifusion_diag.model.sparse import columns
from bifusion_diag.model.sparse.convolution import Strategy, algorithm_for, sparse_convolution
from bifusion_diag.model.sparse.coordinates import Level
from bifusion_diag.model.sparse.kernel_map import (
    KernelMap,
    general_map,
    kernel_offsets,
    pooling_map,
    symmetric_map,
)
from bifusion_diag.model.sparse.tensor import Geometry, SparseMaps
from bifusion_diag.model.sparse.workspace import Workspace


class NativeMaps:
    """Scales and kernel maps of one batch, each made once.

    Args:
        cells: (M, 4) int64 finest voxels, unique, in lexicographic order.
        strategy: how to convolve.
    """

    def __init__(self, cells: Tensor, strategy: Strategy = "auto") -> None:
        self._levels = {1: Level(cells, 1)}
        self._maps: dict[Geometry, KernelMap] = {}
        self._strategy = strategy
        self._work = Workspace()

    def coords(self, stride: int) -> Tensor:
        return self._levels[stride].coords

    def prepare(self, geometries: Iterable[Geometry]) -> None:
        """Where columns are laid out, make all that they read. Pairs are listed when a layer needs them."""
        for geometry in geometries:
            kernel_map = self._map(geometry)
            if algorithm_for(self._strategy, self._levels[1].cells.device) is columns:
                columns.prepare(kernel_map)

    def convolve(
        self, feats: Tensor, kernel: Tensor, in_stride: int, *, size: int, stride: int, dilation: int
    ) -> Tensor:
        kernel_map = self._map(Geometry(in_stride, size, stride, dilation))
        return sparse_convolution(feats, kernel, kernel_map, self._strategy, self._work)

    def convolve_transposed(self, feats: Tensor, kernel: Tensor, in_stride: int, *, size: int, stride: int) -> Tensor:
        kernel_map = self._map(Geometry(in_stride // stride, size, stride)).transposed()
        return sparse_convolution(feats, kernel, kernel_map, self._strategy, self._work)

    def _map(self, geometry: Geometry) -> KernelMap:
        if geometry not in self._maps:
            self._maps[geometry] = self._build(*geometry)
        return self._maps[geometry]

    def _coarser(self, in_stride: int, factor: int) -> tuple[Level, Tensor]:
        """The scale in_stride · factor, and the row there of each voxel of scale in_stride."""
        coarse, parent = self._levels[in_stride].coarser(factor)
        return self._levels.setdefault(in_stride * factor, coarse), parent

    def _build(self, in_stride: int, size: int, stride: int, dilation: int) -> KernelMap:
        fine = self._levels[in_stride]
        offsets = kernel_offsets(size, dilation)
        if stride == 1:
            table = fine.lookup(fine.cells, offsets)
            return symmetric_map(table) if size % 2 else general_map(table, len(fine))
        coarse, parent = self._coarser(in_stride, stride)
        corner = coarse.cells.clone()
        corner[:, 1:] *= stride
        if size == stride and size % 2 == 0 and dilation == 1:  # an odd kernel is centred, so its windows overhang
            x, y, z = (fine.cells - corner.index_select(0, parent))[:, 1:].unbind(1)
            return pooling_map(parent, x + size * (y + size * z), size**3, len(coarse))
        return general_map(fine.lookup(corner, offsets, outside=stride - 1), len(fine))


class NativeEngine:
    """Sparse convolution in pure PyTorch.

    Args:
        strategy: ``pairs`` suits a CPU, ``columns`` a GPU; ``auto`` chooses by device and layer.
    """

    name = "native"

    def __init__(self, strategy: Strategy = "auto") -> None:
        self._strategy = strategy

    @property
    def version(self) -> str:
        return f"{bifusion_diag.__version__} (torch {torch.__version__})"

    def maps(self, cells: Tensor) -> SparseMaps:
        return NativeMaps(cells, self._strategy)
