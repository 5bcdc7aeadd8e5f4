"""Ground truth of a scene at point and superpoint level.

Legend: N points of a scene · S superpoints of a scene · G objects of a scene · K semantic classes.

An object's class is the one that most of its labelled points have (of several, the smallest). With class-agnostic
instances every annotated object counts. With object classes, an object of stuff (wall, floor) or without a label counts
as none, as in OneFormer3D and Mask3D, whose targets leave stuff out too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bifusion_diag.config.settings import STUFF_CLASSES, DecoderSettings
from bifusion_diag.data.batch import Batch
from bifusion_diag.errors import UserError
from bifusion_diag.model.segments import split_rows, starts


class SceneTargets(NamedTuple):
    """What the predictions of one scene should be."""

    coords: Tensor  # (N, 3) augmented coordinates [m]
    superpoint: Tensor  # (N,) int64 within the scene
    point_masks: Tensor  # (G, N) bool
    superpoint_masks: Tensor  # (G, S) bool: more than half of the superpoint's points are the object's
    semantic: Tensor  # (S,) int64: the class of more than half of the superpoint's points, else -1
    object_semantic: Tensor  # (G,) int64: semantic class of each object, -1 = none of its points has one
    labels: Tensor  # (G,) int64: object class of each object; all 0 if they are class-agnostic

    def masks(self, level: str) -> Tensor:
        """Object masks at "superpoint" or "point" level, bool."""
        return self.superpoint_masks if level == "superpoint" else self.point_masks


def scene_targets(batch: Batch, decoder: DecoderSettings) -> list[SceneTargets]:
    """Ground truth of every scene of a batch.

    Args:
        batch: instance ids run over 0..G-1 within a scene, -1 = no object; semantic labels over 0..K-1, -1 = ignore.
        decoder: semantic and object classes.

    Returns:
        One entry a scene.

    Raises:
        UserError: the labels have more classes than the model.
    """
    semantic_classes = decoder.semantic_classes
    highest = int(batch.semantic.max())
    if highest >= semantic_classes:
        raise UserError(
            f"the scenes have the semantic class {highest}, but model.decoder.semantic_classes is {semantic_classes}; "
            f"set it to {highest + 1} or more (ScanNet200 has 200 classes)"
        )
    targets = []
    for scene, (coords, superpoint, instance, semantic) in enumerate(
        zip(
            split_rows(batch.coords, batch.point_counts),
            split_rows(batch.superpoint, batch.point_counts),
            split_rows(batch.instance, batch.point_counts),
            split_rows(batch.semantic, batch.point_counts),
            strict=True,
        )
    ):
        superpoints = batch.superpoint_counts[scene]
        local = superpoint - starts(batch.superpoint_counts)[scene]
        objects = int(instance.max()) + 1
        ids = torch.arange(objects, device=instance.device)
        object_semantic = _most_frequent_class(instance, semantic, objects, semantic_classes)
        target = SceneTargets(
            coords=coords,
            superpoint=local,
            point_masks=instance[None, :] == ids[:, None],
            superpoint_masks=_majority(local, instance, superpoints, objects).T,
            semantic=_majority_label(_majority(local, semantic, superpoints, semantic_classes)),
            object_semantic=object_semantic,
            labels=torch.zeros_like(object_semantic),
        )
        targets.append(target if decoder.instance_classes == 1 else _with_object_classes(target, decoder))
    return targets


def _with_object_classes(target: SceneTargets, decoder: DecoderSettings) -> SceneTargets:
    """The objects that have an object class, and their classes."""
    thing = (target.object_semantic >= STUFF_CLASSES).nonzero()[:, 0]
    object_semantic = target.object_semantic.index_select(0, thing)
    return target._replace(
        point_masks=target.point_masks.index_select(0, thing),
        superpoint_masks=target.superpoint_masks.index_select(0, thing),
        object_semantic=object_semantic,
        labels=object_semantic - decoder.first_object_class,
    )


def _most_frequent_class(instance: Tensor, semantic: Tensor, objects: int, classes: int) -> Tensor:
    """(N,) ids and labels → (G,) int64: the label of most of an object's labelled points, -1 without any."""
    if objects == 0:
        return instance.new_empty(0)
    labelled = (instance >= 0) & (semantic >= 0)
    cells = instance[labelled] * classes + semantic[labelled]
    votes = torch.bincount(cells, minlength=objects * classes).view(objects, classes)
    most = votes.amax(dim=1, keepdim=True)
    ids = torch.arange(classes, device=votes.device)
    smallest = torch.where(votes == most, ids, classes).amin(dim=1)  # argmax may take any of equal votes
    return torch.where(most[:, 0] > 0, smallest, -1)


def _majority(superpoint: Tensor, label: Tensor, superpoints: int, labels: int) -> Tensor:
    """(S, labels) bool: more than half of the superpoint's points, unlabelled ones included, have the label."""
    labelled = label >= 0
    cells = superpoint[labelled] * labels + label[labelled]
    votes = torch.bincount(cells, minlength=superpoints * labels).view(superpoints, labels)
    sizes = torch.bincount(superpoint, minlength=superpoints)
    return 2 * votes > sizes[:, None]


def _majority_label(majority: Tensor) -> Tensor:
    """(S, K) bool with at most one True a row → (S,) int64, -1 where there is none."""
    return torch.where(majority.any(dim=1), majority.int().argmax(dim=1), -1)
