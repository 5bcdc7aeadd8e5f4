"""Points to voxels and back."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch

from bifusion_diag.errors import UserError
from bifusion_diag.model.sparse import Engine, make_engine, voxelize

NATIVE = make_engine("native")


def scene(points: int = 300) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(points, 3) * 0.2, torch.randn(points, 4), torch.randint(0, 3, (points,))


def test_agrees_with_a_loop_over_points(engine: Engine) -> None:
    coords, feats, index = scene()
    voxels = voxelize(coords, feats, index, 0.05, engine)
    members = defaultdict(list)
    for point in range(len(coords)):
        cell = np.floor(coords[point].numpy() / np.float32(0.05)).astype(int)
        members[(int(index[point]), *cell.tolist())].append(point)
    assert [tuple(row) for row in voxels.tensor.coords.tolist()] == sorted(members)
    for row, points in enumerate(members[key] for key in sorted(members)):
        assert set(voxels.inverse[points].tolist()) == {row}
        torch.testing.assert_close(voxels.tensor.feats[row], feats[points].mean(0))
    assert torch.equal(voxels.slice(voxels.tensor), voxels.tensor.feats[voxels.inverse])


def test_gradients_agree_with_finite_differences() -> None:
    coords, feats, index = scene(40)
    coords = coords * 0.3
    groups = voxelize(coords, feats, index, 0.05, NATIVE)

    def there_and_back(feats: torch.Tensor) -> torch.Tensor:
        voxels = voxelize(coords, feats, index, 0.05, NATIVE)
        return voxels.slice(voxels.tensor.with_feats(voxels.tensor.feats.square()))

    assert len(groups.tensor.feats) < 40
    assert torch.autograd.gradcheck(there_and_back, feats.double().requires_grad_())


def test_bits_do_not_depend_on_the_order_of_points() -> None:
    coords, feats, index = scene(2000)
    weight = torch.randn(2000, 4)

    def results(order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inputs = feats[order].requires_grad_()
        voxels = voxelize(coords[order], inputs, index[order], 0.2, NATIVE)
        out = voxels.slice(voxels.tensor.with_feats(voxels.tensor.feats.tanh()))
        (out * weight[order]).sum().backward()
        assert inputs.grad is not None
        back = torch.argsort(order)
        return voxels.tensor.feats, out[back], inputs.grad[back]

    first = results(torch.arange(2000))
    for one, other in zip(first, results(torch.randperm(2000)), strict=True):
        assert torch.equal(one, other)


def test_negative_coordinates_round_down() -> None:
    coords = torch.tensor([[-0.01, 0.0, 0.049], [-0.1, -0.05, -0.051]])
    voxels = voxelize(coords, torch.ones(2, 1), torch.tensor([0, 0]), 0.05, NATIVE)
    assert voxels.tensor.coords.tolist() == [[0, -2, -1, -2], [0, -1, 0, 0]]


def test_a_single_voxel() -> None:
    coords = torch.full((5, 3), 0.01)
    voxels = voxelize(coords, torch.arange(5.0)[:, None], torch.zeros(5, dtype=torch.long), 0.05, NATIVE)
    assert voxels.tensor.feats.tolist() == [[2.0]]
    assert voxels.inverse.tolist() == [0] * 5


def test_a_scene_without_points_leaves_the_others_alone() -> None:
    voxels = voxelize(torch.zeros(2, 3), torch.ones(2, 1), torch.tensor([0, 2]), 0.05, NATIVE)
    assert voxels.tensor.coords[:, 0].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        (torch.zeros(0, 3), "no points to voxelise"),
        (torch.tensor([[0.0, 0.0, 0.0], [0.0, float("nan"), 0.0]]), "1 of 2 points have non-finite coordinates"),
        (torch.tensor([[float("-inf"), 0.0, 0.0]]), "1 of 1 points have non-finite coordinates"),
        (torch.tensor([[0.0, 0.0, 0.0], [1e9, 0.0, 0.0]]), r"1 of 2 points lie more than 2\^31 voxels"),
        (torch.tensor([[0.0, 0.0, 0.0], [1e8, 1e8, 1e8]]), "more than a 64-bit key can number"),
    ],
)
def test_what_cannot_be_voxelised_is_refused(coords: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        voxelize(coords, torch.ones(len(coords), 1), torch.zeros(len(coords), dtype=torch.long), 0.05, NATIVE)
