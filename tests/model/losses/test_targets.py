"""Ground truth at superpoint level against loops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from bifusion_diag.data.batch import Batch
from bifusion_diag.errors import UserError
from bifusion_diag.model.losses.targets import scene_targets


def test_majorities_against_a_count_by_hand(batch_of: Callable[..., Batch]) -> None:
    batch = batch_of([60, 35], [8, 5], [3, 2])
    noise = torch.rand(95) < 0.4
    batch = replace(
        batch,
        instance=torch.where(noise, torch.randint(-1, 2, (95,)), batch.instance),
        semantic=torch.where(noise.flip(0), torch.randint(-1, 7, (95,)), batch.semantic),
    )
    first_point = first_superpoint = 0
    for target, points, superpoints in zip(scene_targets(batch, 7), (60, 35), (8, 5), strict=True):
        rows = slice(first_point, first_point + points)
        objects = int(batch.instance[rows].max()) + 1
        assert target.point_masks.shape == (objects, points)
        assert target.superpoint_masks.shape == (objects, superpoints)
        for g in range(objects):
            assert torch.equal(target.point_masks[g], batch.instance[rows] == g)
        for s in range(superpoints):
            inside = batch.superpoint[rows] == first_superpoint + s
            votes = Counter(batch.semantic[rows][inside].tolist())
            label, count = votes.most_common(1)[0]
            expected = label if label >= 0 and count > int(inside.sum()) / 2 else -1
            assert target.semantic[s].item() == expected
            for g in range(objects):
                share = (batch.instance[rows][inside] == g).double().mean().item()
                assert target.superpoint_masks[g, s].item() == (share > 0.5)
        assert torch.equal(target.superpoint, batch.superpoint[rows] - first_superpoint)
        first_point, first_superpoint = first_point + points, first_superpoint + superpoints


def test_a_scene_without_objects_and_labels(batch_of: Callable[..., Batch]) -> None:
    batch = batch_of([10], [3], [0])
    (target,) = scene_targets(replace(batch, semantic=torch.full((10,), -1)), 7)
    assert target.point_masks.shape == (0, 10)
    assert target.superpoint_masks.shape == (0, 3)
    assert target.semantic.tolist() == [-1, -1, -1]


def test_half_is_not_a_majority(batch_of: Callable[..., Batch]) -> None:
    batch = replace(batch_of([4], [1], [1]), instance=torch.tensor([0, 0, -1, -1]), semantic=torch.tensor([2, 2, 3, 3]))
    (target,) = scene_targets(batch, 7)
    assert not target.superpoint_masks.any()
    assert target.semantic.tolist() == [-1]


def test_a_label_that_the_model_has_no_class_for_is_refused(batch_of: Callable[..., Batch]) -> None:
    # It would be counted as another class of a later superpoint.
    batch = replace(batch_of([10], [3], [1]), semantic=torch.tensor([7] * 5 + [-1] * 5))
    assert len(scene_targets(batch, 8)) == 1
    with pytest.raises(UserError, match=r"semantic class 7, but model\.decoder\.semantic_classes is 7; set it to 8"):
        scene_targets(batch, 7)
