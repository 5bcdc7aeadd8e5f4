"""Small scenes and predictions for the losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from bifusion_diag.config.settings import DecoderSettings
from bifusion_diag.data.batch import Batch
from bifusion_diag.model.losses.targets import scene_targets
from bifusion_diag.model.outputs import EncoderOutput, LayerPrediction, Predictions

CLASSES = 7
DECODER = DecoderSettings(semantic_classes=CLASSES)
WIDTH = 8
LEVELS = ("superpoint", "superpoint", "point", "point")


def _ids(counts: Sequence[int], points: Sequence[int]) -> Tensor:
    """Superpoint ids, unique in the batch; every superpoint has a point."""
    parts, first = [], 0
    for superpoints, n in zip(counts, points, strict=True):
        parts.append(first + torch.arange(n) % superpoints)
        first += superpoints
    return torch.cat(parts)


def make_batch(points: Sequence[int], superpoints: Sequence[int], objects: Sequence[int]) -> Batch:
    """Scenes of random points; object g is made of the superpoints g, g + objects + 1, ..., every last one is free."""
    superpoint = _ids(superpoints, points)
    scene_index = torch.repeat_interleave(torch.arange(len(points)), torch.tensor(points))
    first = torch.tensor([sum(superpoints[:i]) for i in range(len(points))])[scene_index]
    of_scene = torch.tensor(objects)[scene_index]
    instance = (superpoint - first) % (of_scene + 1)
    total = sum(points)
    xyz = torch.rand(total, 3) * 2
    nothing = torch.zeros(0)
    return Batch(
        xyz=xyz,
        coords=xyz.flip(1) * 1.1,
        color=torch.randn(total, 3),
        scene_index=scene_index,
        point_counts=tuple(points),
        superpoint=superpoint,
        superpoint_counts=tuple(superpoints),
        semantic=(superpoint * 3) % CLASSES,
        instance=torch.where(instance < of_scene, instance, -1),
        images=nothing,
        depth=nothing,
        intrinsics=nothing,
        pose=nothing,
        names=tuple(f"scene {i}" for i in range(len(points))),
        labels=("ground truth (synthetic)",) * len(points),
    )


def make_predictions(batch: Batch, *, boxes: bool = False, learnable: int = 0, skip: int = 0) -> Predictions:
    """Random predictions as leaves; masks lean to the truth. ``skip`` leaves each scene's first superpoints out."""
    targets = scene_targets(batch, DECODER)
    queries = [
        torch.cat([torch.full((learnable,), -1), torch.randperm(count - skip) + skip])
        for count in batch.superpoint_counts
    ]

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, requires_grad=True)

    def masks(level: str) -> list[Tensor]:
        found = []
        for ids, target in zip(queries, targets, strict=True):
            truth = target.masks(level).float()
            inside = target.superpoint_masks.T[ids.clamp(min=0)].float() * (ids >= 0)[:, None]
            found.append((torch.randn(len(ids), truth.shape[1]) + 3 * inside @ truth).requires_grad_())
        return found

    layers = [
        LayerPrediction(
            classes=[leaf(len(ids), 2) for ids in queries],
            masks=masks(level),
            scores=[leaf(len(ids), 1) for ids in queries],
            boxes=[torch.rand(len(ids), 6).requires_grad_() for ids in queries] if boxes else None,
            level=level,
        )
        for level in LEVELS
    ]
    n, scenes = len(batch.xyz), len(batch.point_counts)
    return Predictions(
        layers=layers,
        semantic=[leaf(len(ids), CLASSES + 1) for ids in queries],
        query_superpoints=queries,
        encoder=EncoderOutput(
            fused=leaf(n, WIDTH),
            f3d=leaf(n, WIDTH),
            f2d=leaf(n, WIDTH),
            alpha=torch.rand(n, 1).requires_grad_(),
            valid=torch.rand(n) < 0.6,
            global2d=leaf(scenes, WIDTH),
        ),
        superpoints=leaf(sum(batch.superpoint_counts), WIDTH),
    )


@pytest.fixture
def batch_of() -> Callable[..., Batch]:
    return make_batch


@pytest.fixture
def predict() -> Callable[..., Predictions]:
    return make_predictions
