"""Semantics of points that have none, against a loop over points."""

from __future__ import annotations

import torch

from bifusion_diag.model.diffusion import diffuse_semantics

#: Three superpoints of two points each on a line, centres at 0.5, 2.5 and 10.5.
COORDS = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0], [11.0]]) * torch.tensor([[1.0, 0.0, 0.0]])
SUPERPOINT = torch.tensor([0, 0, 1, 1, 2, 2])


def test_a_point_takes_the_label_of_the_nearest_labelled_superpoint_within_the_radius() -> None:
    labels = torch.tensor([7, 7, -1, -1, -1, -1])
    # distances to the centre 0.5: 1.5, 2.5, 9.5, 10.5
    assert diffuse_semantics(labels, COORDS, SUPERPOINT, 3, 2.0).tolist() == [7, 7, 7, -1, -1, -1]
    assert diffuse_semantics(labels, COORDS, SUPERPOINT, 3, 100.0).tolist() == [7] * 6
    between = torch.tensor([7, 7, -1, -1, 9, 9])
    assert diffuse_semantics(between, COORDS, SUPERPOINT, 3, 100.0).tolist() == [7, 7, 7, 7, 9, 9]


def test_radius_0_and_scenes_without_a_label_or_without_a_gap_stay_as_they_are() -> None:
    labels = torch.tensor([7, 7, -1, -1, -1, -1])
    assert diffuse_semantics(labels, COORDS, SUPERPOINT, 3, 0.0).equal(labels)
    for whole in (torch.full((6,), -1), torch.arange(6)):
        assert diffuse_semantics(whole, COORDS, SUPERPOINT, 3, 9.0).equal(whole)


def test_equals_a_loop_over_the_points() -> None:
    generator = torch.Generator().manual_seed(3)
    coords = torch.rand(300, 3, generator=generator)
    superpoint = torch.cat([torch.arange(40), torch.randint(0, 40, (260,), generator=generator)])
    of_superpoint = torch.randint(-3, 5, (40,), generator=generator).clamp(min=-1)
    labels = of_superpoint[superpoint]
    expected = labels.clone()
    for point in (labels < 0).nonzero()[:, 0].tolist():
        best = (0.12, -1)
        for segment in range(40):
            distance = (coords[superpoint == segment].mean(0) - coords[point]).norm().item()
            if of_superpoint[segment] >= 0 and distance < best[0]:
                best = (distance, int(of_superpoint[segment]))
        expected[point] = best[1]
    assert 0 < (expected < 0).sum() < (labels < 0).sum()  # some are reached, some are not
    assert diffuse_semantics(labels, coords, superpoint, 40, 0.12).equal(expected)
