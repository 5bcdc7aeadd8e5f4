"""Neighbour look-up, coarser scales, and coordinates that are far apart."""

from __future__ import annotations

import resource
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bifusion_diag.errors import UserError
from bifusion_diag.model.sparse import Conv3d, coordinates, make_engine, sparse_tensor
from bifusion_diag.model.sparse.coordinates import Level, Packing
from bifusion_diag.model.sparse.kernel_map import kernel_offsets
from bifusion_diag.model.sparse.tensor import lexicographic_order

Draw = Callable[..., Tensor]


def brute_force(cells: Tensor, offsets: list[tuple[int, int, int]]) -> Tensor:
    row = {tuple(cell): index for index, cell in enumerate(cells.tolist())}
    return torch.tensor(
        [[row.get((b, x + dx, y + dy, z + dz), -1) for b, x, y, z in cells.tolist()] for dx, dy, dz in offsets],
        dtype=torch.int32,
    )


def ordered(coords: Tensor) -> Tensor:
    return coords.long()[lexicographic_order(coords.long())]


@pytest.mark.parametrize("grid", [True, False])
@pytest.mark.parametrize(("size", "dilation"), [(3, 1), (5, 1), (3, 2), (2, 1)])
def test_lookup_agrees_with_a_dictionary(
    grid: bool, size: int, dilation: int, some_voxels: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinates, "GRID_CELLS", 1 << 26 if grid else 0)
    cells = ordered(some_voxels(150))
    offsets = kernel_offsets(size, dilation)
    assert torch.equal(Level(cells, 1).lookup(cells, offsets), brute_force(cells, offsets))


def test_grid_and_search_agree_beside_a_far_outlier(some_voxels: Draw) -> None:
    cells = ordered(torch.cat([some_voxels(150), torch.tensor([[0, 40_000, -35_000, 20_000]])]))
    offsets = kernel_offsets(3)
    assert torch.equal(Level(cells, 1).lookup(cells, offsets), brute_force(cells, offsets))


def test_lexicographic_order_agrees_with_sorted(some_voxels: Draw) -> None:
    coords = some_voxels(200)
    assert ordered(coords).tolist() == sorted(coords.tolist())


def test_coarser_scale_agrees_with_floor_division(some_voxels: Draw) -> None:
    level = Level(ordered(some_voxels(100, extent=7)), 2)
    coarse, parent = level.coarser(2)
    expected = [[b, x // 2, y // 2, z // 2] for b, x, y, z in level.cells.tolist()]
    assert coarse.cells.tolist() == sorted({tuple(cell): cell for cell in expected}.values())
    assert coarse.cells[parent].tolist() == expected
    assert coarse.stride == 4
    assert torch.equal(coarse.coords[:, 1:], (coarse.cells[:, 1:] * 4).int())


def test_packing_is_a_bijection_in_lexicographic_order() -> None:
    cells = torch.cartesian_prod(torch.arange(2), torch.arange(-2, 3), torch.arange(-1, 2), torch.arange(5, 8))
    keys = Packing([-2, -1, 5], [2, 1, 7], 2).pack(cells)
    assert torch.equal(keys, torch.arange(len(cells)))
    assert torch.equal(Packing([-2, -1, 5], [2, 1, 7], 2).unpack(keys), cells)


def test_far_outliers_cost_no_memory() -> None:
    """A dense grid over this box (±400 m at 2 cm) would take 10^13 cells."""
    coords = torch.cat([torch.randint(0, 40, (2000, 3)), torch.tensor([[20_000, -20_000, 20_000], [-20_000, 0, 0]])])
    coords = torch.nn.functional.pad(coords, (1, 0)).unique(dim=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layer = torch.nn.Sequential(Conv3d(3, 8, 5), Conv3d(8, 16, 3), Conv3d(16, 16, 2, stride=2), Conv3d(16, 16, 3))
    out = layer(sparse_tensor(coords, torch.randn(len(coords), 3), make_engine("native")))
    out.feats.sum().backward()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # kB
    assert grown < 300_000
    assert torch.isfinite(out.feats).all()


def test_a_box_too_large_for_keys_is_refused() -> None:
    coords = torch.tensor([[0, 0, 0, 0], [0, 2_000_000_000, 2_000_000_000, 2_000_000_000]])
    with pytest.raises(UserError, match="span 2000000001 x 2000000001 x 2000000001 voxels"):
        Conv3d(2, 2, 3)(sparse_tensor(coords, torch.randn(2, 2), make_engine("native")))


def test_duplicate_voxels_are_refused() -> None:
    with pytest.raises(AssertionError, match="unique"):
        sparse_tensor(torch.zeros(2, 4, dtype=torch.int32), torch.randn(2, 3), make_engine("native"))
