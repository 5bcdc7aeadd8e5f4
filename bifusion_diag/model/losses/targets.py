"""Ground truth of a scene at point and superpoint level.

Legend: N points of a scene · S superpoints of a scene · G objects of a scene · K semantic classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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

    def masks(self, level: str) -> Tensor:
        """Object masks at "superpoint" or "point" level, bool."""
        return self.superpoint_masks if level == "superpoint" else self.point_masks


def scene_targets(batch: Batch, semantic_classes: int) -> list[SceneTargets]:
    """Ground truth of every scene of a batch.

    Args:
        batch: instance ids run over 0..G-1 within a scene, -1 = no object.
        semantic_classes: K; labels are 0..K-1, -1 = ignore.

    Returns:
        One entry a scene.

    Raises:
        UserError: the labels have more classes than the model.
    """
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
        targets.append(
            SceneTargets(
                coords=coords,
                superpoint=local,
                point_masks=instance[None, :] == ids[:, None],
                superpoint_masks=_majority(local, instance, superpoints, objects).T,
                semantic=_majority_label(_majority(local, semantic, superpoints, semantic_classes)),
            )
        )
    return targets


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
