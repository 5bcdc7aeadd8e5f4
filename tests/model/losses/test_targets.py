"""Ground truth at superpoint level against loops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from bifusion_diag.config.settings import STUFF_CLASSES, DecoderSettings
from bifusion_diag.data import scannet200
from bifusion_diag.data.batch import Batch
from bifusion_diag.data.scannet200 import CLASS_NAMES
from bifusion_diag.errors import UserError
from bifusion_diag.model.losses.targets import scene_targets

DECODER = DecoderSettings(semantic_classes=7)


def test_majorities_against_a_count_by_hand(batch_of: Callable[..., Batch]) -> None:
    batch = batch_of([60, 35], [8, 5], [3, 2])
    noise = torch.rand(95) < 0.4
    batch = replace(
        batch,
        instance=torch.where(noise, torch.randint(-1, 2, (95,)), batch.instance),
        semantic=torch.where(noise.flip(0), torch.randint(-1, 7, (95,)), batch.semantic),
    )
    first_point = first_superpoint = 0
    for target, points, superpoints in zip(scene_targets(batch, DECODER), (60, 35), (8, 5), strict=True):
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
    (target,) = scene_targets(replace(batch, semantic=torch.full((10,), -1)), DECODER)
    assert target.point_masks.shape == (0, 10)
    assert target.superpoint_masks.shape == (0, 3)
    assert target.semantic.tolist() == [-1, -1, -1]


def test_half_is_not_a_majority(batch_of: Callable[..., Batch]) -> None:
    batch = replace(batch_of([4], [1], [1]), instance=torch.tensor([0, 0, -1, -1]), semantic=torch.tensor([2, 2, 3, 3]))
    (target,) = scene_targets(batch, DECODER)
    assert not target.superpoint_masks.any()
    assert target.semantic.tolist() == [-1]


def test_a_label_that_the_model_has_no_class_for_is_refused(batch_of: Callable[..., Batch]) -> None:
    # It would be counted as another class of a later superpoint.
    batch = replace(batch_of([10], [3], [1]), semantic=torch.tensor([7] * 5 + [-1] * 5))
    assert len(scene_targets(batch, DecoderSettings(semantic_classes=8))) == 1
    with pytest.raises(UserError, match=r"semantic class 7, but model\.decoder\.semantic_classes is 7; set it to 8"):
        scene_targets(batch, DECODER)


def test_an_object_has_the_class_of_most_of_its_labelled_points(batch_of: Callable[..., Batch]) -> None:
    batch = batch_of([200], [20], [6])
    semantic = torch.where(torch.rand(200) < 0.7, torch.randint(-1, 7, (200,)), batch.semantic)
    semantic[batch.instance == 4] = -1
    semantic[batch.instance == 5] = torch.tensor([6, 3, -1, 3, 6]).repeat(40)[: int((batch.instance == 5).sum())]
    batch = replace(batch, semantic=semantic)
    expected = []
    for g in range(6):
        votes = Counter(label for label in semantic[batch.instance == g].tolist() if label >= 0)
        most = max(votes.values(), default=0)
        expected.append(min((label for label, count in votes.items() if count == most), default=-1))
    assert expected[4] == -1
    (agnostic,) = scene_targets(batch, DECODER)
    assert agnostic.object_semantic.tolist() == expected
    assert agnostic.labels.tolist() == [0] * 6

    for classes, first in ((7, 0), (5, 2)):
        (target,) = scene_targets(batch, DECODER.model_copy(update={"instance_classes": classes}))
        things = [g for g, label in enumerate(expected) if label >= 2]  # stuff and unlabelled objects are none
        assert 0 < len(things) < 6
        assert target.object_semantic.tolist() == [expected[g] for g in things]
        assert target.labels.tolist() == [expected[g] - first for g in things]
        assert torch.equal(target.point_masks, agnostic.point_masks[things])
        assert torch.equal(target.superpoint_masks, agnostic.superpoint_masks[things])


def test_of_equally_frequent_classes_the_smallest_counts(batch_of: Callable[..., Batch]) -> None:
    batch = replace(
        batch_of([6], [1], [1]), instance=torch.zeros(6).long(), semantic=torch.tensor([5, -1, 3, 3, -1, 5])
    )
    assert scene_targets(batch, DECODER)[0].object_semantic.tolist() == [3]


def test_stuff_is_wall_and_floor() -> None:
    assert [CLASS_NAMES[c] for c in range(STUFF_CLASSES)] == ["wall", "floor"]
    assert tuple(range(STUFF_CLASSES)) == scannet200.STUFF_CLASSES
