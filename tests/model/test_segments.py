"""Segment reductions against loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from bifusion_diag.model.segments import segment_extent, segment_max, segment_mean, segment_sum, split_rows, starts

INDEX = torch.tensor([2, 0, 2, 0, 0, 3])  # segment 1 is empty, segment 3 has one row
SEGMENTS = 4


def test_against_a_loop_over_the_segments() -> None:
    values = torch.randn(6, 5, dtype=torch.float64)
    for segment in range(SEGMENTS):
        rows = values[segment == INDEX]
        expected_max = rows.amax(0) if len(rows) else torch.zeros(5, dtype=torch.float64)
        expected_mean = rows.mean(0) if len(rows) else torch.zeros(5, dtype=torch.float64)
        extent = rows.amax(0) - rows.amin(0) if len(rows) else torch.zeros(5, dtype=torch.float64)
        torch.testing.assert_close(segment_sum(values, INDEX, SEGMENTS)[segment], rows.sum(0))
        torch.testing.assert_close(segment_mean(values, INDEX, SEGMENTS)[segment], expected_mean)
        torch.testing.assert_close(segment_max(values, INDEX, SEGMENTS)[segment], expected_max)
        torch.testing.assert_close(segment_extent(values, INDEX, SEGMENTS)[segment], extent)


@pytest.mark.parametrize("reduce", [segment_sum, segment_mean, segment_max])
def test_gradients_against_finite_differences(reduce: Callable[[Tensor, Tensor, int], Tensor]) -> None:
    values = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda rows: reduce(rows, INDEX, SEGMENTS), (values,))


def test_equal_maxima_send_the_gradient_to_the_first() -> None:
    values = torch.tensor([[1.0], [7.0], [7.0]], requires_grad=True)
    segment_max(values, torch.zeros(3, dtype=torch.int64), 1).sum().backward()
    assert values.grad is not None
    assert values.grad.flatten().tolist() == [0.0, 1.0, 0.0]


def test_a_nan_is_the_maximum_of_its_segment_only() -> None:
    values = torch.tensor([[float("nan")], [1.0], [2.0], [3.0], [float("-inf")], [4.0]])
    found = segment_max(values, INDEX, SEGMENTS).flatten()
    assert found[2].isnan()
    assert found[[0, 3]].tolist() == [3.0, 4.0]


def test_splitting_returns_the_scenes() -> None:
    counts = (2, 0, 3)
    rows = torch.arange(5)
    assert [part.tolist() for part in split_rows(rows, counts)] == [[0, 1], [], [2, 3, 4]]
    assert starts(counts) == (0, 2, 2)
