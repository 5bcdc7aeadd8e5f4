"""Ranges of tensors of every kind, and the calls of modules."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import Tensor, nn

from bifusion_diag.replay.examine.calls import Calls, range_of, tensor_range

BAD = torch.tensor([1.0, -3.0, math.nan, math.inf, -math.inf, 2.0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_ranges_of_all_types(dtype: torch.dtype) -> None:
    assert tensor_range(BAD.to(dtype)) == (3.0, 3)
    assert tensor_range(torch.tensor([0.5, -2.0]).to(dtype)) == (2.0, 0)
    assert tensor_range(torch.full((3,), math.nan, dtype=dtype))[0] in (None, 0.0)  # complex: nan + 0j
    assert tensor_range(torch.empty(0, dtype=dtype)) == (None, 0)


def test_ranges_of_all_kinds() -> None:
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[0, 4]]), torch.tensor([math.nan, 7.0]), (6,), check_invariants=False
    )
    assert tensor_range(sparse) == (7.0, 1)
    assert range_of({"a": (BAD, None, [sparse]), "b": torch.arange(100)}) == (7.0, 4)
    assert range_of("nothing") == (None, 0)
    assert tensor_range(torch._efficientzerotensor(3)) == (None, 0)
    assert tensor_range(torch.empty(3, device="meta")) == (None, 0)
    assert tensor_range(torch.tensor([1e300, -1e308], dtype=torch.float64)) == (1e308, 0)


def test_calls_as_they_end() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            assert calls.current == "(root)"
            return self.inner(self.inner(x)) * scale

    model = Twice()
    seen: list[tuple[int, bool]] = []
    calls = Calls(model, contextlib.nullcontext, ended=lambda index, output: seen.append((index, output.requires_grad)))
    with calls.watching():
        model(torch.ones(1, 2), scale=torch.tensor(5.0))
    assert calls.current is None
    assert [call.name for call in calls.calls] == ["inner", "inner", "(root)"]
    assert calls.calls[2].input_absmax == 5.0
    assert calls.calls[0].output_absmax == calls.calls[1].input_absmax
    assert seen == [(0, True), (1, True), (2, True)]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
