"""Voxels of every scale against averaging by hand, one scale after the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from bifusion_diag.config.settings import BackboneSettings
from bifusion_diag.data.batch import Batch
from bifusion_diag.model.encoder3d import Encoder3D
from bifusion_diag.model.outputs import EncoderOutput
from bifusion_diag.model.scale_pooling import ScaleVoxels, scale_voxels
from bifusion_diag.model.sparse import make_engine

TINY = BackboneSettings(
    layers=(1,) * 8, planes=(4, 4, 8, 6, 8, 6, 4, 6), init_dim=4, first_kernel=3, voxel_size=0.05
)  # fmt: skip
Cell = tuple[int, int, int]


def _encoded(batch: Batch) -> EncoderOutput:
    torch.manual_seed(0)
    return Encoder3D(TINY, engine=make_engine("native"), scales=True).eval()(batch)


def _pooled_by_hand(values: list[list[float]], cells: list[Cell], stride: int) -> dict[Cell, list[float]]:
    """Mean over the points of a voxel, then over the children of a voxel, again and again."""
    members: dict[Cell, list[list[float]]] = defaultdict(list)
    for value, cell in zip(values, cells, strict=True):
        members[cell].append(value)
    found = {cell: [sum(column) / len(column) for column in zip(*rows, strict=True)] for cell, rows in members.items()}
    step = 1
    while step < stride:
        step *= 2
        members = defaultdict(list)
        for (x, y, z), value in found.items():
            members[(x // step * step, y // step * step, z // step * step)].append(value)
        found = {c: [sum(column) / len(column) for column in zip(*rows, strict=True)] for c, rows in members.items()}
    return found


def _voxels(batch: Batch) -> list[ScaleVoxels]:
    scales = _encoded(batch).scales
    assert scales is not None
    return scale_voxels(scales, batch.coords, batch.point_counts, batch.superpoint, batch.superpoint_counts)


def test_positions_and_shares_are_means_of_means(batch_of_two: Callable[..., Batch]) -> None:
    batch = batch_of_two()
    levels = _voxels(batch)
    n, s = batch.point_counts[0], batch.superpoint_counts[0]
    for number, stride in enumerate((16, 8, 4, 2, 1)):
        level = levels[number]
        for scene in range(2):
            rows = slice(scene * n, (scene + 1) * n)
            coords = batch.coords[rows]
            cells: list[Cell] = [tuple(cell) for cell in torch.floor(coords / 0.05).long().tolist()]  # type: ignore[misc]
            one_hot = torch.nn.functional.one_hot(batch.superpoint[rows] - scene * s, s)
            expected = _pooled_by_hand(torch.cat([coords, one_hot], 1).tolist(), cells, stride)
            found = [tuple(cell) for cell in level.cells[scene].tolist()]
            assert found == sorted(expected)
            truth = torch.tensor([expected[cell] for cell in found])
            torch.testing.assert_close(level.positions[scene], truth[:, :3])
            shares = level.shares[scene].pool(torch.eye(s), len(found))
            torch.testing.assert_close(shares, truth[:, 3:])
            assert len(level.feats[scene]) == len(found)


def test_features_stay_with_their_voxels(batch_of_two: Callable[..., Batch]) -> None:
    batch = batch_of_two()
    scales = _encoded(batch).scales
    assert scales is not None
    for tensor, level in zip(scales.tensors, _voxels(batch), strict=True):
        of: dict[tuple[int, ...], Tensor] = {
            tuple(c): f for c, f in zip(tensor.coords.tolist(), tensor.feats, strict=True)
        }
        for scene in range(2):
            for cell, feats in zip(level.cells[scene].tolist(), level.feats[scene], strict=True):
                assert torch.equal(of[(scene, *cell)], feats)
