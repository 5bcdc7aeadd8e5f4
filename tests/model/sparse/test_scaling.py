"""Cost does not depend on the number of points other than by chunks: operations, working memory, kernel maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bifusion_diag.config.settings import BackboneSettings
from bifusion_diag.model.sparse import Conv3d, Geometry, chunks, columns, sparse_tensor
from bifusion_diag.model.sparse.chunks import plan
from bifusion_diag.model.sparse.convolution import Strategy
from bifusion_diag.model.sparse.native import NativeEngine, NativeMaps
from bifusion_diag.model.unet import Res16UNet

TINY = BackboneSettings(init_dim=8, planes=(8, 8, 8, 8, 8, 8, 8, 8), voxel_size=0.05)


class CountOperations(TorchDispatchMode):
    """How many operations torch carries out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def plane(points: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points all over a floor that grows with their number: some four a voxel."""
    side = 0.05 * (points / 4) ** 0.5
    coords = torch.rand(points, 3) * torch.tensor([side, side, 0.0])
    return coords, torch.randn(points, 3), torch.zeros(points, dtype=torch.long)


def operations(net: Res16UNet, points: int) -> int:
    coords, feats, scene = plane(points)
    with CountOperations() as mode:
        voxels = net.voxelize(coords, feats, scene)
        voxels.slice(net(voxels.tensor)).sum().backward()
    return mode.count


@pytest.mark.parametrize("strategy", ["pairs", "columns"])
def test_no_loop_over_points(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every level in one chunk, 16 times the points take the same operations."""
    monkeypatch.setattr(chunks, "PIECE_PAIRS", 1 << 30)
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 1 << 30)
    monkeypatch.setattr(columns, "CHUNK_NUMBERS_CPU", 1 << 40)
    net = Res16UNet(TINY, engine=NativeEngine(strategy))
    few, many = operations(net, 4_000), operations(net, 64_000)
    assert abs(many - few) < 0.02 * few  # a kernel offset without any pair at a coarse level takes none


@pytest.mark.parametrize("strategy", ["pairs", "columns"])
def test_operations_follow_the_number_of_chunks(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight times the points in chunks eight times as large take about the same operations."""
    net = Res16UNet(TINY, engine=NativeEngine(strategy))

    def counted(points: int, scale: int) -> int:
        monkeypatch.setattr(chunks, "CHUNK_ROWS", 512 * scale)
        monkeypatch.setattr(chunks, "PIECE_PAIRS", 2048 * scale)
        monkeypatch.setattr(columns, "CHUNK_NUMBERS_CPU", (1 << 17) * scale)
        return operations(net, points)

    few = counted(8_000, 1)
    assert counted(64_000, 8) == pytest.approx(few, rel=0.1)
    assert counted(64_000, 1) > 2 * few


@pytest.mark.parametrize("strategy", ["pairs", "columns"])
def test_working_memory_does_not_grow_with_the_rows(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 256)
    monkeypatch.setattr(chunks, "PIECE_PAIRS", 256)
    monkeypatch.setattr(columns, "CHUNK_NUMBERS_CPU", 1 << 15)
    net = Res16UNet(TINY, engine=NativeEngine(strategy))
    held = []
    for points in (20_000, 160_000):
        voxels = net.voxelize(*plane(points))
        net(voxels.tensor).feats.sum().backward()
        maps = voxels.tensor.maps
        assert isinstance(maps, NativeMaps)
        held.append(maps._work.nbytes)
    assert held[1] <= 1.25 * held[0]  # the fullest chunk is a little fuller


def test_every_kernel_map_of_the_network_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Geometry] = []
    original = NativeMaps._build
    monkeypatch.setattr(NativeMaps, "_build", lambda maps, *key: built.append(Geometry(*key)) or original(maps, *key))
    net = Res16UNet(TINY, engine=NativeEngine())
    voxels = net.voxelize(*plane(2_000))
    for _ in range(2):
        net(voxels.tensor).feats.sum().backward()
    assert sorted(built) == sorted(net.geometries())  # what is announced is all there is, and each once
    expected = [(1, 5, 1, 1), *((s, 3, 1, 1) for s in (1, 2, 4, 8, 16)), *((s, 2, 2, 1) for s in (1, 2, 4, 8))]
    assert sorted(tuple(geometry) for geometry in built) == sorted(expected)


def test_pieces_cover_every_pair_once_and_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 50)
    monkeypatch.setattr(chunks, "PIECE_PAIRS", 60)
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(-30, 200, (27, 170), generator=generator).clamp(min=-1).int()
    for centre in (None, 13):
        seen = {}
        for chunk in plan(table, centre):
            for piece in chunk.pieces:
                assert len(piece.source) <= 60 or len(piece.offsets) == 1
                offsets = torch.tensor(piece.offsets).repeat_interleave(torch.tensor(piece.lengths)).tolist()
                for offset, row, source in zip(offsets, piece.local.tolist(), piece.source.tolist(), strict=True):
                    key = (offset, row + chunk.start)
                    assert key not in seen
                    seen[key] = source
            lengths = [length for piece in chunk.pieces for length in piece.lengths]
            assert (list(chunk.lengths), chunk.pairs) == (lengths, sum(lengths))
        rows = [(k, m) for k in range(27) for m in range(170) if k != centre and table[k, m] >= 0]
        assert seen == {(k, m): int(table[k, m]) for k, m in rows}


def test_a_table_is_the_same_before_and_after_its_columns_took_its_place(some_voxels: Callable[..., Tensor]) -> None:
    x = sparse_tensor(some_voxels(100), torch.randn(100, 2), NativeEngine())
    nn.Sequential(Conv3d(2, 9, 3), Conv3d(9, 9, 3))(x)  # the first lays out columns, the second lists pairs
    again = sparse_tensor(some_voxels(100), torch.randn(100, 2), NativeEngine())
    assert isinstance(x.maps, NativeMaps)
    assert isinstance(again.maps, NativeMaps)
    one, other = (maps._map(Geometry(1, 3)) for maps in (x.maps, again.maps))
    for side in ("forward", "backward"):
        assert torch.equal(getattr(one, side).table, getattr(other, side).table)
