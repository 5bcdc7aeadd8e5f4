"""Both matchers against searches by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bifusion_diag.config.settings import DecoderSettings, InstanceLossSettings
from bifusion_diag.data.batch import Batch
from bifusion_diag.model.losses.matcher import _cheapest_assignment, allowed_pairs, match, queries_inside
from bifusion_diag.model.losses.targets import scene_targets

SETTINGS = InstanceLossSettings()


def _cost(classes: Tensor, masks: Tensor, target: Tensor, query: int) -> float:
    t = target.to(masks.dtype)
    bce = F.binary_cross_entropy_with_logits(masks[query], t).item()
    p = masks[query].sigmoid()
    dice = 1 - (2 * (p * t).sum().item() + 1) / (p.sum().item() + t.sum().item() + 1)
    return -0.5 * classes[query].softmax(0)[0].item() + bce + dice


@pytest.mark.parametrize("topk", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_against_a_search_over_all_pairs(seed: int, topk: int) -> None:
    torch.manual_seed(seed)
    classes, masks = torch.randn(9, 2, dtype=torch.float64), torch.randn(9, 30, dtype=torch.float64)
    targets = torch.rand(4, 30) < 0.3
    allowed = torch.rand(9, 4) < 0.4
    allowed[:, 3] = False
    allowed[:, 2] = torch.arange(9) == 5

    found = match(
        classes,
        masks,
        torch.zeros(4, dtype=torch.int64),
        targets,
        allowed,
        SETTINGS.model_copy(update={"match_topk": topk}),
    )

    expected = set()
    for g in range(4):
        inside = [q for q in range(9) if allowed[q, g]]
        best = sorted(inside, key=lambda q: _cost(classes, masks, targets[g], q))
        expected |= {(q, g) for q in best[:topk]}
    assert set(zip(found.queries.tolist(), found.objects.tolist(), strict=True)) == expected
    assert (5, 2) in expected
    assert all(g != 3 for _, g in expected)


def test_one_query_can_be_matched() -> None:
    found = match(
        torch.zeros(1, 2), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), torch.ones(1, 1).bool(),
        torch.ones(1, 1).bool(), SETTINGS,
    )  # fmt: skip
    assert (found.queries.tolist(), found.objects.tolist()) == ([0], [0])


def test_no_object_no_match() -> None:
    found = match(
        torch.zeros(3, 2), torch.zeros(3, 5), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 5).bool(),
        torch.zeros(3, 0).bool(), SETTINGS,
    )  # fmt: skip
    assert len(found.queries) == len(found.objects) == 0


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_queries_that_tie_or_are_nan_leave_the_object_unmatched_as_in_esam(value: float) -> None:
    found = match(
        torch.zeros(3, 2), torch.full((3, 5), value), torch.zeros(1, dtype=torch.int64), torch.ones(1, 5).bool(),
        torch.ones(3, 1).bool(), SETTINGS,
    )  # fmt: skip
    assert len(found.queries) == 0


def test_only_queries_inside_an_object_are_allowed_and_learnable_ones_everywhere() -> None:
    superpoint_masks = torch.tensor([[True, False, False], [False, False, True]])
    assert queries_inside(torch.tensor([-1, 2, 1, 0]), superpoint_masks).tolist() == [
        [True, True],
        [False, True],
        [False, False],
        [True, False],
    ]


HUNGARIAN = SETTINGS.model_copy(update={"matcher": "hungarian"})


@pytest.mark.parametrize(("queries", "objects"), [(6, 4), (3, 5), (1, 1), (4, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_hungarian_against_all_assignments(queries: int, objects: int, seed: int) -> None:
    torch.manual_seed(seed)
    classes, masks = torch.randn(queries, 4, dtype=torch.float64), torch.randn(queries, 30, dtype=torch.float64)
    targets, labels = torch.rand(objects, 30) < 0.3, torch.randint(0, 3, (objects,))
    everywhere = torch.ones(queries, objects).bool()
    found = match(classes, masks, labels, targets, everywhere, HUNGARIAN)

    def cost(query: int, target: int) -> float:
        t, p = targets[target].to(masks.dtype), masks[query].sigmoid()
        bce = F.binary_cross_entropy_with_logits(masks[query], t).item()
        dice = 1 - (2 * (p * t).sum().item() + 1) / (p.sum().item() + t.sum().item() + 1)
        return -0.5 * classes[query].softmax(0)[labels[target]].item() + bce + dice

    pairs = min(queries, objects)
    every = [
        list(zip(some_queries, some_objects, strict=True))
        for some_queries in itertools.combinations(range(queries), pairs)
        for some_objects in itertools.permutations(range(objects), pairs)
    ]
    best = min(every, key=lambda assignment: sum(cost(q, g) for q, g in assignment))
    assert set(zip(found.queries.tolist(), found.objects.tolist(), strict=True)) == set(best)


def test_hungarian_leaves_out_what_is_forbidden_or_not_finite_and_nothing_else() -> None:
    classes, masks = torch.zeros(4, 2), torch.full((4, 6), -3.0)
    targets = torch.zeros(3, 6).bool()
    targets[:, :2] = True
    masks[0, :2] = 3.0  # the best query, for every object
    masks[3] = math.nan
    allowed = torch.ones(4, 3).bool()
    allowed[:, 2] = False  # nothing may be matched with the third object
    allowed[1:3, 0] = False  # only the first and the broken query may take the first object
    found = match(classes, masks, torch.zeros(3, dtype=torch.int64), targets, allowed, HUNGARIAN)
    pairs = set(zip(found.queries.tolist(), found.objects.tolist(), strict=True))
    assert (0, 0) in pairs
    assert {g for _, g in pairs} == {0, 1}
    assert {q for q, _ in pairs} <= {0, 1, 2}
    nothing = match(classes, masks, torch.zeros(3, dtype=torch.int64), targets, allowed & False, HUNGARIAN)
    assert len(nothing.queries) == 0


def test_text_queries_take_objects_of_their_class_wherever_they_are(batch_of: Callable[..., Batch]) -> None:
    (target,) = scene_targets(batch_of([60], [12], [3]), DecoderSettings(semantic_classes=7))
    target = target._replace(object_semantic=torch.tensor([4, -1, 2]))
    superpoints, texts = torch.tensor([-1, -1, -1, 5]), torch.tensor([-1, 4, 6, -1])
    inside = target.superpoint_masks[:, 5].tolist()
    expected = [[True, True, True], [True, False, False], [False, False, False]]
    assert allowed_pairs(superpoints, texts, target, "sparse").tolist() == [*expected, inside]
    assert allowed_pairs(superpoints, texts, target, "hungarian").tolist() == [*expected, [True] * 3]
    assert inside.count(True) < 3
    without = allowed_pairs(superpoints, None, target, "sparse")
    assert torch.equal(without, queries_inside(superpoints, target.superpoint_masks))


def test_hungarian_takes_as_many_possible_pairs_as_there_are() -> None:
    """The cheap pair would leave the second query with what it may not have."""
    found = _cheapest_assignment(torch.tensor([[0.0, 10.0], [9.0, math.inf]]))
    assert set(zip(found.queries.tolist(), found.objects.tolist(), strict=True)) == {(0, 1), (1, 0)}
