"""Average precision of class-agnostic instance masks, by the protocol of the ScanNet benchmark.

Source: ``evaluate_semantic_instance.py`` of the benchmark (Dai et al., "ScanNet", CVPR 2017), which ESAM and
OneFormer3D use too. What that script does, for one class:

* An object of fewer than ``min_region`` points is no object; a prediction of fewer is dropped.
* Points of no object (walls, floor, unlabelled) are *void*.
* At an IoU threshold t, an object is found by the best-scored prediction with IoU > t that no earlier object has taken;
  further ones with IoU > t are false positives.
* A prediction that reaches IoU > t with no object, small ones included, is a false positive, unless more than the share
  t of its points is void or of small objects: then it does not count.
* Precision and recall at every distinct score, over all scenes together; AP sums precision times half the difference
  of the recalls on either side of it, from the point (recall 0, precision 1).

"AP" is the mean over t = .50, .55, ... .90. The benchmark's text says up to .95; its script's range ends before that,
and published numbers are the script's.

Legend: N points of a scene · I predicted instances · G objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

#: The IoU thresholds that AP is the mean over.
THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(9))

Floats = NDArray[np.float64]


class InstanceScene(NamedTuple):
    """Predictions and truth of a scene."""

    masks: NDArray[np.bool_]  # (I, N)
    scores: Floats  # (I,)
    truth: NDArray[np.int64]  # (N,) object ids ≥ 0, −1 = void


class AveragePrecision(NamedTuple):
    """Shares in [0, 1]; None where the scenes hold no object."""

    ap: float | None
    ap50: float | None
    ap25: float | None


class _Overlaps(NamedTuple):
    """All that the protocol needs of a scene. Predictions are in order of descending score, the small ones dropped."""

    scores: Floats  # (I,)
    iou: Floats  # (I, G) with every object, small ones too
    large: NDArray[np.bool_]  # (G,)
    ignored: Floats  # (I,) share of the prediction's points that are void or of small objects


class _Judged(NamedTuple):
    """What becomes of the predictions of a scene."""

    scores: Floats  # (P,) of those that count
    positive: NDArray[np.bool_]  # (P,) found an object
    missed: int  # objects that nothing found


def average_precision(scenes: Sequence[InstanceScene], *, min_region: int) -> AveragePrecision:
    """AP, AP50 and AP25 over all scenes.

    Args:
        scenes: predictions may overlap.
        min_region: fewest points of an object and of a prediction (the benchmark: 100).
    """
    overlaps = [_overlaps(scene, min_region) for scene in scenes]
    if not any(scene.large.any() for scene in overlaps):
        return AveragePrecision(None, None, None)
    by_threshold = {t: _ap([_judge(scene, t) for scene in overlaps]) for t in (*THRESHOLDS, 0.25)}
    return AveragePrecision(
        float(np.mean([by_threshold[t] for t in THRESHOLDS])), by_threshold[0.5], by_threshold[0.25]
    )


def _overlaps(scene: InstanceScene, min_region: int) -> _Overlaps:
    masks = scene.masks.astype(np.float64)  # products of 0 and 1 are exact, and BLAS counts faster than bool does
    order = np.argsort(-scene.scores, kind="stable")
    order = order[masks[order].sum(1) >= max(min_region, 1)]
    masks = masks[order]
    _, compact = np.unique(scene.truth[scene.truth >= 0], return_inverse=True)
    objects = np.zeros((int(compact.max(initial=-1)) + 1, scene.truth.size))
    objects[compact, np.flatnonzero(scene.truth >= 0)] = 1.0
    sizes, areas = objects.sum(1), masks.sum(1)
    common = masks @ objects.T
    large = sizes >= min_region
    ignored = areas - common[:, large].sum(1)
    return _Overlaps(
        scores=scene.scores[order].astype(np.float64),
        iou=common / (areas[:, None] + sizes[None, :] - common),
        large=large,
        ignored=ignored / areas,
    )


def _judge(scene: _Overlaps, threshold: float) -> _Judged:
    """True and false positives and missed objects at one IoU threshold."""
    overlaps = scene.iou > threshold
    taken = np.zeros(len(scene.scores), bool)
    scores: list[float] = []
    positive: list[bool] = []
    missed = 0
    for column in overlaps[:, scene.large].T:
        finders = np.flatnonzero(column & ~taken)  # by descending score: the first is the true positive
        if not finders.size:
            missed += 1
            continue
        taken[finders[0]] = True
        scores += scene.scores[finders].tolist()
        positive += [True] + [False] * (finders.size - 1)
    wrong = ~overlaps.any(1) & (scene.ignored <= threshold)
    return _Judged(
        np.concatenate([scores, scene.scores[wrong]]),
        np.concatenate([np.array(positive, bool), np.zeros(int(wrong.sum()), bool)]),
        missed,
    )


def _ap(judged: Sequence[_Judged]) -> float:
    """Area below the precision-recall curve of all scenes; there is an object."""
    scores = np.concatenate([scene.scores for scene in judged])
    positive = np.concatenate([scene.positive for scene in judged])
    objects = int(positive.sum()) + sum(scene.missed for scene in judged)
    ascending = np.argsort(scores, kind="stable")
    _, first = np.unique(
        scores[ascending], return_index=True
    )  # a cut at each distinct score keeps it and what is above
    kept = positive.size - first
    true = np.cumsum(positive[ascending][::-1])[::-1][first] if first.size else np.zeros(0)
    precision = np.append(true / np.maximum(kept, 1), 1.0)
    recall = np.append(true / objects, 0.0)
    wide = np.concatenate([recall[:1], recall, [0.0]])
    return float(precision @ (wide[:-2] - wide[2:]) / 2)
