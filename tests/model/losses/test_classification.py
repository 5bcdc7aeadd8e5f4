"""Classification losses against closed forms."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from bifusion_diag.model.losses.classification import focal_loss, no_object_cross_entropy


def test_focal_loss_against_its_definition() -> None:
    logits, labels = torch.randn(6, 2, dtype=torch.float64) * 2, torch.tensor([0, 1, 1, 0, 1, 1])
    expected = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        p = math.exp(row[label]) / sum(math.exp(x) for x in row)
        alpha = 0.25 if label == 0 else 0.75
        expected -= alpha * (1 - p) ** 2 * math.log(p) / 6
    assert math.isclose(focal_loss(logits, labels, 0.25, 2.0).item(), expected, rel_tol=1e-12)


def test_focal_loss_without_focus_is_half_the_cross_entropy() -> None:
    logits, labels = torch.randn(6, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 1])
    torch.testing.assert_close(focal_loss(logits, labels, 0.5, 0.0), 0.5 * F.cross_entropy(logits, labels))


def test_focal_gradient_is_finite_when_the_answer_is_certain() -> None:
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    focal_loss(logits, torch.tensor([0, 0]), 0.25, 2.0).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    # The certain mistake has p = 0: −α · 1 · (−400) / 2 grows with slope α/2 in both logits.
    torch.testing.assert_close(logits.grad[1], torch.tensor([-0.125, 0.125]))


def test_no_object_counts_less() -> None:
    logits, labels = torch.randn(6, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 1])
    log_p = logits.log_softmax(1)[torch.arange(6), labels]
    weight = torch.where(labels == 1, 0.1, 1.0).double()
    torch.testing.assert_close(no_object_cross_entropy(logits, labels, 0.1), -(weight * log_p).sum() / weight.sum())
    torch.testing.assert_close(
        no_object_cross_entropy(logits, labels, 0.1),
        F.cross_entropy(logits, labels, torch.tensor([1.0, 0.1], dtype=torch.float64)),
    )


def test_weight_zero_for_every_query_gives_zero_not_nan() -> None:
    logits = torch.randn(3, 2, requires_grad=True)
    loss = no_object_cross_entropy(logits, torch.ones(3, dtype=torch.int64), 0.0)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert logits.grad.abs().sum() == 0
