"""Geometry-aware pooling against a loop over superpoints."""

from __future__ import annotations

import torch

from bifusion_diag.model.pooling import GeometryAwarePooling, MeanPooling


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_size_is_esams() -> None:
    assert _parameters(GeometryAwarePooling(96)) == 28_896


def test_against_a_loop_over_superpoints() -> None:
    pooling = GeometryAwarePooling(8).double()
    x, coords = torch.randn(30, 8, dtype=torch.float64), torch.rand(30, 3, dtype=torch.float64) * 4
    superpoint = torch.cat([torch.arange(5), torch.randint(0, 5, (25,))])

    pooled = pooling(x, coords, superpoint, 5)

    for segment in range(5):
        inside = superpoint == segment
        xyz = coords[inside]
        side = (xyz.amax(0) - xyz.amin(0)).amax()
        code = pooling.position((xyz - xyz.mean(0)) / (side + 0.01))
        shape = code.amax(0)
        weight = 2 * pooling.weight(torch.cat([code, shape.expand_as(code)], dim=1))
        torch.testing.assert_close(pooled.point_weight[inside], weight)
        torch.testing.assert_close(pooled.features[segment], (x[inside] * weight).mean(0) + shape)


def test_one_point_in_the_only_superpoint_has_finite_gradients() -> None:
    pooling = GeometryAwarePooling(4)
    x = torch.randn(1, 4, requires_grad=True)
    pooled = pooling(x, torch.tensor([[5.0, -3.0, 100.0]]), torch.zeros(1, dtype=torch.int64), 1)
    pooled.features.sum().backward()
    assert pooled.features.shape == (1, 4)
    assert x.grad is not None
    assert all(torch.isfinite(g).all() for g in [x.grad, *(p.grad for p in pooling.parameters())])


def test_moving_the_scene_changes_nothing() -> None:
    pooling = GeometryAwarePooling(8).double()
    x, coords = torch.randn(20, 8, dtype=torch.float64), torch.rand(20, 3, dtype=torch.float64)
    superpoint = torch.arange(20) % 3
    here = pooling(x, coords, superpoint, 3)
    there = pooling(x, coords + torch.tensor([10.0, -7.0, 2.0]), superpoint, 3)
    torch.testing.assert_close(here.features, there.features, atol=1e-10, rtol=0)


def test_mean_pooling_is_the_mean_and_learns_nothing() -> None:
    pooling = MeanPooling()
    x, superpoint = torch.randn(30, 8), torch.cat([torch.arange(5), torch.randint(0, 5, (25,))])
    pooled = pooling(x, torch.rand(30, 3), superpoint, 5)
    torch.testing.assert_close(pooled.features, torch.stack([x[superpoint == s].mean(0) for s in range(5)]))
    assert torch.equal(pooled.point_weight, torch.ones(30, 1))
    assert _parameters(pooling) == 0
