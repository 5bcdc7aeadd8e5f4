"""Semantic cross-entropy against its definition."""

from __future__ import annotations

import torch

from bifusion_diag.model.losses.semantic import semantic_loss


def test_mean_over_labelled_queries_then_over_scenes() -> None:
    logits = [
        torch.randn(4, 6, dtype=torch.float64),
        torch.randn(2, 6, dtype=torch.float64),
        torch.randn(1, 6).double(),
    ]
    queries = [torch.tensor([2, 0, -1, 1]), torch.tensor([0, 1]), torch.tensor([0])]
    labels = [torch.tensor([3, -1, 4]), torch.tensor([0, 2]), torch.tensor([-1])]

    def nll(scene: int, query: int, label: int) -> torch.Tensor:
        return -logits[scene][query, :5].log_softmax(0)[label]  # the sixth column takes no part

    first = (nll(0, 0, 4) + nll(0, 1, 3)) / 2
    second = (nll(1, 0, 0) + nll(1, 1, 2)) / 2
    torch.testing.assert_close(semantic_loss(logits, queries, labels), (first + second) / 2)


def test_without_any_label_it_is_zero_and_has_a_graph() -> None:
    logits = torch.randn(3, 6, requires_grad=True)
    loss = semantic_loss([logits], [torch.arange(3)], [torch.full((3,), -1)])
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert logits.grad.abs().sum() == 0


def test_a_text_query_has_the_label_of_its_class_in_a_mean_of_its_own() -> None:
    logits = [torch.randn(6, 5, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64)]
    # One learnable query, three text queries (fewer than classes would be as good), then superpoints.
    queries = [torch.tensor([-1, -1, -1, -1, 1, 0]), torch.tensor([-1, -1, -1, -1, 0])]
    texts = [torch.tensor([-1, 0, 1, 2, -1, -1]), torch.tensor([-1, 0, 1, 2, -1])]
    labels = [torch.tensor([3, 1]), torch.tensor([-1])]

    def nll(scene: int, query: int, label: int) -> torch.Tensor:
        return -logits[scene][query, :4].log_softmax(0)[label]

    of_superpoints = (nll(0, 4, 1) + nll(0, 5, 3)) / 2
    of_texts = sum(nll(scene, 1 + c, c) for scene in (0, 1) for c in range(3)) / 6
    torch.testing.assert_close(semantic_loss(logits, queries, labels, texts), of_superpoints + of_texts)
    torch.testing.assert_close(semantic_loss(logits, queries, labels), of_superpoints)
