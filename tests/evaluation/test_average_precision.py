"""ScanNet's protocol on cases small enough to work out by hand.

Two objects, A (points 0-9) and B (points 10-19); further points are void unless a case says otherwise. Every curve is
written out: cuts at the distinct scores from low to high as (precision, recall), then (1, 0). Each precision weighs
half of what the recall falls from the cut before to the cut after.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from bifusion_diag.evaluation import InstanceScene, average_precision

A, B = range(10), range(10, 20)
VOID = range(20, 30)
# A false positive above two found objects: (2/3, 1), (1/2, 1/2), (0, 0), (1, 0) with weights 1/4, 1/2, 1/4, 0.
WORST_FIRST = 2 / 3 * 1 / 4 + 1 / 2 * 1 / 2


def scene(
    *predictions: tuple[float, range | list[int]], objects: tuple[range, ...] = (A, B), points: int = 30
) -> InstanceScene:
    truth = np.full(points, -1, np.int64)
    for number, members in enumerate(objects):
        truth[list(members)] = number
    masks: NDArray[np.bool_] = np.zeros((len(predictions), points), bool)
    for row, (_, members) in zip(masks, predictions, strict=True):
        row[list(members)] = True
    return InstanceScene(masks, np.array([score for score, _ in predictions], float), truth)


def test_perfect_masks_have_an_ap_of_one() -> None:
    # (1, 1), (1, 1/2), (1, 0)
    assert average_precision([scene((0.9, A), (0.8, B))], min_region=1) == pytest.approx((1.0, 1.0, 1.0))


def test_a_copy_below_every_found_object_costs_nothing() -> None:
    # (2/3, 1) with weight 0, as the recall falls by nothing from it to (1, 1); then (1, 1/2), (1, 0)
    assert average_precision([scene((0.9, A), (0.8, B), (0.7, A))], min_region=1) == pytest.approx((1.0, 1.0, 1.0))


def test_a_copy_between_two_found_objects_is_a_false_positive() -> None:
    # (2/3, 1), (1/2, 1/2), (1, 1/2), (1, 0), each with weight 1/4
    expected = (2 / 3 + 1 / 2 + 1 + 1) / 4
    assert average_precision([scene((0.9, A), (0.85, A), (0.8, B))], min_region=1) == pytest.approx((expected,) * 3)


def test_of_two_masks_on_an_object_the_better_scored_is_the_true_positive_whatever_their_order() -> None:
    given_first = average_precision([scene((0.85, A), (0.9, A), (0.8, B))], min_region=1)
    assert given_first == average_precision([scene((0.9, A), (0.85, A), (0.8, B))], min_region=1)


def test_a_missed_object_halves_the_recall() -> None:
    # (1, 1/2), (1, 0)
    assert average_precision([scene((0.9, A))], min_region=1) == pytest.approx((0.5, 0.5, 0.5))


def test_a_missed_object_in_another_scene_counts_in_the_same_curve() -> None:
    found, missed = scene((0.9, A), objects=(A,)), scene(objects=(B,))
    assert average_precision([found, missed], min_region=1) == pytest.approx((0.5, 0.5, 0.5))


def test_a_false_positive_with_the_best_score() -> None:
    half_half = [8, 9, 10, 11]  # IoU 2/12 with both objects, nothing void
    got = average_precision([scene((0.95, half_half), (0.9, A), (0.8, B))], min_region=1)
    assert got == pytest.approx((WORST_FIRST,) * 3)


def test_predictions_of_equal_score_share_a_cut() -> None:
    got = average_precision([scene((0.9, [10, 11, 12]), (0.9, A), (0.8, B))], min_region=1)
    # IoU 3/10 with B: at .50 (2/3, 1), (1/2, 1/2), (1, 0)
    assert got.ap50 == pytest.approx((2 / 3 + 2 * 1 / 2 + 1) / 4)


def test_a_loose_mask_counts_below_its_iou_only() -> None:
    # IoU 8/10 with the only object: found at .50 ... .75, six of the nine thresholds; a false positive from .80 on
    got = average_precision([scene((0.9, range(8)), objects=(A,))], min_region=1)
    assert got == pytest.approx((6 / 9, 1.0, 1.0))


def test_a_prediction_mostly_on_void_does_not_count() -> None:
    # 5 points of A and 10 void ones: IoU 5/20, void share 2/3. Not counted at .50 ... .65, a false positive from .70 on
    on_void = [*range(5), *VOID]
    got = average_precision([scene((0.95, on_void), (0.9, A), (0.8, B))], min_region=1)
    assert got == pytest.approx(((4 * 1 + 5 * WORST_FIRST) / 9, 1.0, 1.0))


def test_small_objects_are_neither_found_nor_missed() -> None:
    small = range(20, 23)
    perfect = scene((0.9, A), (0.8, B), objects=(A, B, small))
    assert average_precision([perfect], min_region=5) == pytest.approx((1.0, 1.0, 1.0))
    # 3 points of the small object and 2 of B: IoU 3/5 with the small one, at .50 and .55 reached: not counted.
    # Above, 3/5 of the prediction is of a small object, which is no more than the threshold: a false positive.
    near = scene((0.95, [*small, 10, 11]), (0.9, A), (0.8, B), objects=(A, B, small))
    assert average_precision([near], min_region=5) == pytest.approx(((2 * 1 + 7 * WORST_FIRST) / 9, 1.0, 1.0))


def test_small_predictions_are_dropped() -> None:
    got = average_precision([scene((0.95, [10, 11, 12, 13]), (0.9, A), (0.8, B))], min_region=5)
    assert got == pytest.approx((1.0, 1.0, 1.0))


def test_one_mask_over_two_objects_finds_one_of_them_at_a_quarter() -> None:
    # IoU 1/2 with each: more than .25, not more than .50
    got = average_precision([scene((0.9, range(20)))], min_region=1)
    assert got == pytest.approx((0.0, 0.0, 0.5))


def test_no_prediction_is_zero_and_no_object_is_nothing() -> None:
    assert average_precision([scene()], min_region=1) == (0.0, 0.0, 0.0)
    nothing = scene((0.9, A), objects=())
    assert average_precision([nothing], min_region=1) == (None, None, None)
    assert average_precision([scene((0.9, A), (0.8, B)), nothing], min_region=1) == pytest.approx((1.0, 1.0, 1.0))
    assert average_precision([scene((0.9, A), objects=(A,))], min_region=11) == (None, None, None)
    assert average_precision([], min_region=1) == (None, None, None)
