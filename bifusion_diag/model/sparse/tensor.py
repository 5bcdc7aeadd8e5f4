"""Features on sparse voxels, and what an engine has to offer.

Legend: M voxels · C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """What decides which voxels meet in a convolution; a transposed one has that of the convolution it undoes."""

    in_stride: int
    size: int
    stride: int = 1
    dilation: int = 1


class SparseMaps(Protocol):
    """The voxels of a batch at every scale, and how to convolve features on them.

    It lives as long as the batch and remembers what layers of one geometry share.
    """

    def coords(self, stride: int) -> Tensor:
        """(M, 4) int32 (batch, x, y, z) of the voxels of a scale, multiples of the stride, in the order of features."""
        ...

    def prepare(self, geometries: Iterable[Geometry]) -> None:
        """Announce the convolutions to come, finer scales first: on a GPU they then run without synchronisation."""
        ...

    def convolve(
        self, feats: Tensor, kernel: Tensor, in_stride: int, *, size: int, stride: int, dilation: int
    ) -> Tensor:
        """Convolve features (M, I) of scale ``in_stride`` with a kernel (size³, I, O) onto scale in_stride · stride."""
        ...

    def convolve_transposed(self, feats: Tensor, kernel: Tensor, in_stride: int, *, size: int, stride: int) -> Tensor:
        """The transposed convolution onto the existing scale in_stride / stride."""
        ...


class Engine(Protocol):
    """An implementation of sparse convolution."""

    @property
    def name(self) -> str:
        """What ``make_engine`` calls it."""
        ...

    @property
    def version(self) -> str:
        """Version of the implementation, for the run record."""
        ...

    def maps(self, cells: Tensor) -> SparseMaps:
        """The maps of a new batch, from its finest voxels (M, 4) int64, unique, in lexicographic order."""
        ...


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """Features of the voxels of one scale.

    Attributes:
        feats: (M, C).
        stride: size of a voxel of this scale in input voxels.
        maps: the voxels of the batch.
    """

    feats: Tensor
    stride: int
    maps: SparseMaps

    @property
    def coords(self) -> Tensor:
        """(M, 4) int32 (batch, x, y, z), multiples of the stride; rows as in ``feats``."""
        return self.maps.coords(self.stride)

    def with_feats(self, feats: Tensor) -> SparseTensor:
        """Other features on the same voxels."""
        assert feats.shape[0] == self.feats.shape[0], "one row of features a voxel"
        return SparseTensor(feats, self.stride, self.maps)


def concatenate(tensors: Sequence[SparseTensor]) -> SparseTensor:
    """Features of the same voxels side by side."""
    first = tensors[0]
    assert all(other.stride == first.stride and other.maps is first.maps for other in tensors), "the same voxels"
    return first.with_feats(torch.cat([tensor.feats for tensor in tensors], 1))


def sparse_tensor(coords: Tensor, feats: Tensor, engine: Engine) -> SparseTensor:
    """Put features on voxels of stride 1.

    Args:
        coords: (M, 4) integers (batch, x, y, z), unique rows in any order.
        feats: (M, C).
        engine: who convolves.

    Returns:
        A tensor whose rows are in lexicographic order of the coordinates: match rows by ``coords``.
    """
    cells = coords.long()
    order = lexicographic_order(cells)
    cells = cells.index_select(0, order)
    assert not bool((cells[1:] == cells[:-1]).all(1).any()), "voxels are unique"
    return SparseTensor(feats.index_select(0, order), 1, engine.maps(cells))


def lexicographic_order(cells: Tensor) -> Tensor:
    """(M,) int64 permutation that sorts rows (M, 4) by (batch, x, y, z)."""
    order = torch.arange(len(cells), device=cells.device)
    for column in reversed(range(cells.shape[1])):
        order = order[torch.sort(cells[order, column], stable=True).indices]
    return order
