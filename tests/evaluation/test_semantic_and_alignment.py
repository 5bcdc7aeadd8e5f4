"""Mean IoU, alignment and uniformity against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from bifusion_diag.evaluation import AlignmentMean, SemanticIoU, UniformityMean


def test_iou_by_class_and_its_mean_over_the_classes_that_occur() -> None:
    metric = SemanticIoU(4)
    metric.update(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
    # background; a point without a label; a class that is nowhere
    metric.update(torch.tensor([-1, 2, 3]), torch.tensor([1, -1, 1]))
    # class 0: one right, one called 1. Class 1: one right, one wrongly called it, two called otherwise
    assert metric.by_class().tolist() == pytest.approx([1 / 2, 1 / 4, math.nan, math.nan], nan_ok=True)
    assert metric.mean() == pytest.approx(3 / 8)


def test_all_background_is_zero_and_no_label_is_nothing() -> None:
    metric = SemanticIoU(200)
    assert metric.mean() is None
    metric.update(torch.tensor([5]), torch.tensor([-1]))
    assert metric.mean() is None
    metric.update(torch.tensor([-1, -1]), torch.tensor([199, 3]))
    assert metric.mean() == 0.0


def test_alignment_is_the_mean_cosine_of_valid_points() -> None:
    metric = AlignmentMean()
    assert metric.mean() is None
    f2d = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
    f3d = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    metric.update(f2d, f3d, torch.tensor([True, True, False]))
    metric.update(f2d[:1], -f3d[:1], torch.tensor([True]))
    assert metric.mean() == pytest.approx((1 + 0 - 1) / 3)


def test_uniformity_of_collapsed_and_of_opposite_features() -> None:
    collapsed, opposite = UniformityMean(), UniformityMean()
    assert collapsed.value() is None
    collapsed.update(torch.ones(50, 8) * torch.arange(1, 51)[:, None])  # lengths do not matter
    assert collapsed.value() == pytest.approx(0.0)
    opposite.update(torch.tensor([[3.0, 0.0], [-1.0, 0.0]]))
    assert opposite.value() == pytest.approx(-8.0)  # log exp(-2 · 2²)


def test_uniformity_is_near_that_of_all_pairs_and_always_the_same() -> None:
    features = torch.randn(300, 6)
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    every_pair = torch.pdist(unit).square().mul(-2).exp().mean().log().item()
    values = []
    for _ in range(2):
        metric = UniformityMean()
        metric.update(features)
        values.append(metric.value())
    assert values[0] == values[1] == pytest.approx(every_pair, abs=0.1)  # 4096 pairs: a standard error of about 0.02


def test_a_scene_of_one_point_has_no_pair() -> None:
    metric = UniformityMean()
    metric.update(torch.ones(1, 3))
    assert metric.value() is None
