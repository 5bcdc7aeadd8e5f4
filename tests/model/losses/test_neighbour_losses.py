"""Spatial consistency and pseudo-labels against a search over all pairs of points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bifusion_diag.config.settings import NoViewSettings, SpatialConsistencySettings
from bifusion_diag.data.batch import Batch
from bifusion_diag.model.losses.no_view import no_view_loss
from bifusion_diag.model.losses.spatial_consistency import spatial_consistency_loss
from bifusion_diag.model.neighbours import draw
from bifusion_diag.model.outputs import EncoderOutput


def _nearest(batch: Batch, row: int, sources: Tensor, k: int) -> list[int]:
    """The k nearest sources of a row in its scene, nearest first."""
    candidates = [
        other
        for other in sources.nonzero()[:, 0].tolist()
        if other != row and batch.scene_index[other] == batch.scene_index[row]
    ]
    distance = (batch.xyz - batch.xyz[row]).norm(dim=1)
    return sorted(candidates, key=lambda other: distance[other].item())[:k]


@pytest.mark.parametrize("k", [1, 8, 50])
def test_spatial_consistency_against_all_pairs(batch_of: Callable[..., Batch], k: int) -> None:
    batch = batch_of([30, 12, 1], [4, 3, 1], [1, 1, 1])
    features = torch.randn(43, 5, dtype=torch.float64)
    everywhere = torch.ones(43, dtype=torch.bool)
    expected = [
        1 - F.cosine_similarity(features[row], features[other], dim=0)
        for row in range(43)
        for other in _nearest(batch, row, everywhere, k)
    ]
    loss = spatial_consistency_loss(features, batch, SpatialConsistencySettings(neighbours=k))
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_spatial_consistency_draws_points_reproducibly(batch_of: Callable[..., Batch]) -> None:
    batch = batch_of([300], [4], [1])
    features = torch.randn(300, 5)
    settings = SpatialConsistencySettings(max_points=20)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(spatial_consistency_loss(features, batch, settings).item())
    assert losses[0] == losses[1] != losses[2]


def test_coincident_points_are_neighbours_of_each_other_only_once(batch_of: Callable[..., Batch]) -> None:
    batch = replace(batch_of([5], [1], [1]), xyz=torch.zeros(5, 3))
    features = F.normalize(torch.randn(5, 3), dim=1)
    # k = 4 others, all at distance 0: every pair of different points.
    pairs = 1 - features @ features.T
    loss = spatial_consistency_loss(features, batch, SpatialConsistencySettings(neighbours=4))
    torch.testing.assert_close(loss, pairs[~torch.eye(5, dtype=torch.bool)].mean())
    assert torch.isfinite(spatial_consistency_loss(features, batch, SpatialConsistencySettings(neighbours=1)))


def test_equal_features_have_no_loss_and_a_single_point_has_none(batch_of: Callable[..., Batch]) -> None:
    equal = torch.ones(30, 4)
    assert spatial_consistency_loss(equal, batch_of([30], [4], [1]), SpatialConsistencySettings()).item() < 1e-6

    lonely = torch.randn(1, 4, requires_grad=True)
    loss = spatial_consistency_loss(lonely, batch_of([1], [1], [1]), SpatialConsistencySettings())
    loss.backward()
    assert loss.item() == 0.0
    assert lonely.grad is not None


def _encoder(n: int) -> EncoderOutput:
    return EncoderOutput(
        fused=torch.randn(n, 5, dtype=torch.float64, requires_grad=True),
        f3d=torch.randn(n, 5, dtype=torch.float64, requires_grad=True),
        f2d=torch.randn(n, 5, dtype=torch.float64, requires_grad=True),
        alpha=torch.rand(n, 1, dtype=torch.float64).requires_grad_(),
        valid=torch.rand(n) < 0.6,
    )


@pytest.mark.parametrize("radius", [0.3, 0.8, 50.0])
def test_pseudo_labels_against_all_pairs(batch_of: Callable[..., Batch], radius: float) -> None:
    batch = batch_of([60, 40], [4, 3], [1, 1])
    encoder = _encoder(100)
    assert encoder.f2d is not None
    assert encoder.alpha is not None
    assert encoder.valid is not None
    confident = encoder.valid & (encoder.alpha[:, 0] > 0.8)
    expected = []
    for row in (~encoder.valid).nonzero()[:, 0].tolist():
        near = [
            other
            for other in _nearest(batch, row, confident, 8)
            if (batch.xyz[other] - batch.xyz[row]).norm().item() < radius
        ]
        if near:
            label = F.normalize(encoder.f2d[near], dim=1).mean(0)
            expected.append(1 - F.cosine_similarity(encoder.f3d[row], label, dim=0))
    loss = no_view_loss(encoder, batch, NoViewSettings(radius=radius))
    torch.testing.assert_close(loss, torch.stack(expected).mean())

    loss.backward()
    assert encoder.f3d.grad is not None
    assert encoder.f3d.grad[encoder.valid].abs().sum() == 0
    assert encoder.f3d.grad[~encoder.valid].abs().sum() > 0
    assert encoder.f2d.grad is None, "the label is detached"
    assert encoder.alpha.grad is None


@pytest.mark.parametrize("case", ["gate frozen at 0.5", "every point seen", "no point seen", "too far"])
def test_without_a_pseudo_label_it_is_zero_and_has_a_graph(batch_of: Callable[..., Batch], case: str) -> None:
    batch, encoder = batch_of([20], [4], [1]), _encoder(20)
    if case == "gate frozen at 0.5":
        encoder = encoder._replace(alpha=torch.full((20, 1), 0.5))
    elif case == "too far":
        encoder = encoder._replace(alpha=torch.ones(20, 1), valid=torch.arange(20) == 0)
        batch = replace(batch, xyz=torch.where(torch.arange(20)[:, None] == 0, 100.0, batch.xyz))
    else:
        encoder = encoder._replace(valid=torch.full((20,), case == "every point seen"))
    loss = no_view_loss(encoder, batch, NoViewSettings())
    loss.backward()
    assert loss.item() == 0.0
    assert encoder.f3d.grad is not None
    assert encoder.f3d.grad.abs().sum() == 0


def test_draw_takes_all_if_they_fit_and_distinct_ones_otherwise() -> None:
    rows = torch.arange(10, 60)
    assert np.array_equal(draw(rows, 50), np.arange(10, 60))
    drawn = draw(rows, 7)
    assert len(set(drawn.tolist())) == 7
    assert np.array_equal(drawn, np.sort(drawn))
    assert set(drawn.tolist()) <= set(range(10, 60))
