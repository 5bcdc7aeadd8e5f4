"""Mask losses against their definitions, element by element."""

from __future__ import annotations

import math

import torch

from bifusion_diag.model.losses.masks import mask_bce, mask_dice, mask_iou, pairwise_bce, pairwise_dice


def _bce(logits: list[float], target: list[float]) -> float:
    p = [1 / (1 + math.exp(-x)) for x in logits]
    return -sum(t * math.log(q) + (1 - t) * math.log(1 - q) for q, t in zip(p, target, strict=True)) / len(p)


def _dice(logits: list[float], target: list[float]) -> float:
    p = [1 / (1 + math.exp(-x)) for x in logits]
    overlap = sum(q * t for q, t in zip(p, target, strict=True))
    return 1 - (2 * overlap + 1) / (sum(p) + sum(target) + 1)


def test_every_pair_against_the_definition() -> None:
    logits = torch.randn(4, 9, dtype=torch.float64) * 3
    targets = (torch.rand(3, 9, dtype=torch.float64) < 0.4).double()
    bce, dice = pairwise_bce(logits, targets), pairwise_dice(logits, targets)
    for q in range(4):
        for g in range(3):
            assert math.isclose(bce[q, g].item(), _bce(logits[q].tolist(), targets[g].tolist()), rel_tol=1e-12)
            assert math.isclose(dice[q, g].item(), _dice(logits[q].tolist(), targets[g].tolist()), rel_tol=1e-12)


def test_matched_pairs_are_the_mean_of_the_pairwise_diagonal() -> None:
    logits, targets = torch.randn(5, 9, dtype=torch.float64), (torch.rand(5, 9) < 0.4).double()
    torch.testing.assert_close(mask_bce(logits, targets), pairwise_bce(logits, targets).diagonal().mean())
    torch.testing.assert_close(mask_dice(logits, targets), pairwise_dice(logits, targets).diagonal().mean())


def test_perfect_and_opposite_masks() -> None:
    target = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    perfect = (target - 0.5) * 100
    assert mask_bce(perfect, target).item() < 1e-20
    assert mask_dice(perfect, target).item() < 1e-6
    # Opposite: overlap 0, |p| = |t| = 2, so 1 − 1/5.
    assert math.isclose(mask_dice(-perfect, target).item(), 0.8, rel_tol=1e-6)
    assert mask_bce(-perfect, target).item() == 50.0


def test_iou_counts() -> None:
    logits = torch.tensor([[1.0, 1.0, -1.0, 0.0], [-1.0, -1.0, -1.0, -1.0]])
    targets = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    # A logit of 0 is inside: intersection {0, 3}, union {0, 1, 2, 3}.
    torch.testing.assert_close(mask_iou(logits, targets), torch.tensor([0.5, 0.0]))
