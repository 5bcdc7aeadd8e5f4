"""The sparse matcher against a search by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bifusion_diag.config.settings import InstanceLossSettings
from bifusion_diag.model.losses.matcher import match, queries_inside

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
