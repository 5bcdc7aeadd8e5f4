"""Norms against float64 sums of squares."""

from __future__ import annotations

import math

import pytest
import torch

from bifusion_diag.probes.norms import ROW, as_tensor, count_nonfinite, flat, l2_norm, l2_norms, row_norms, to_float32


def truth(x: torch.Tensor) -> float:
    return math.sqrt(x.double().square().sum().item())


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1.0, 1e15, 1e20, 1e37])
@pytest.mark.parametrize("size", [0, 1, 1000, ROW + 7])
def test_any_scale_and_length(scale: float, size: int) -> None:
    x = torch.randn(size) * scale
    # float32 sums of up to ROW positive terms: measured 2e-6
    assert l2_norm(x).item() == pytest.approx(truth(x), rel=1e-5)
    assert l2_norms([x, torch.ones(4)]).tolist() == pytest.approx([truth(x), 2.0], rel=1e-5)


def test_long_sums_do_not_drift() -> None:
    x = torch.randn(10_000_000)
    assert l2_norm(x).item() == pytest.approx(truth(x), rel=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_elements_show(bad: float) -> None:
    for size in (3, ROW + 1):
        x = torch.zeros(size)
        x[-1] = bad
        assert not math.isfinite(l2_norm(x).item())
        assert not l2_norms([x]).isfinite().any()


def test_other_types_and_layouts() -> None:
    half = torch.full((100,), 60_000.0, dtype=torch.float16)
    assert l2_norm(half).item() == pytest.approx(truth(half))
    double = torch.full((4,), 1e100, dtype=torch.float64)
    places, numbers = torch.tensor([[0, 0, 2]]), torch.tensor([1.0, 2.0, 4.0])
    sparse = torch.sparse_coo_tensor(places, numbers, (5,), check_invariants=True)
    turned = torch.randn(600, 500).t()
    mixed = l2_norms([half, double, sparse, turned])
    assert mixed.tolist() == pytest.approx([truth(half), 2e100, 5.0, truth(turned)], rel=1e-5)
    assert l2_norms([double, double]).tolist() == pytest.approx([2e100, 2e100])
    assert l2_norms([half, half]).tolist() == pytest.approx([truth(half)] * 2)


def test_narrowing_keeps_finite_finite() -> None:
    wide = torch.tensor([1e39, -1e39, math.inf, math.nan, 0.5], dtype=torch.float64)
    narrow = to_float32(wide)
    assert narrow.dtype == torch.float32
    assert narrow.isfinite().tolist() == [True, True, False, False, True]


@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-25, 1.0, 1e20, 1e37])
def test_norms_of_rows(scale: float) -> None:
    x = torch.randn(5, 700)
    x[2] *= scale
    x[4] = 0
    for rows in (x, x.double()):
        assert row_norms(rows).tolist() == pytest.approx([truth(row) for row in rows], rel=1e-5)
    x[0, 3], x[1, 4] = math.nan, math.inf
    assert row_norms(x)[:2].isfinite().tolist() == [False, False]
    assert row_norms(torch.zeros(0, 3)).shape == (0,)


def test_nonfinite_elements_are_counted() -> None:
    x = torch.randn(70, 80)
    x[3, 4], x[5, 6], x[7, 8], x[9, 10] = math.nan, math.inf, -math.inf, -0.0
    for kind in (x, x.t(), x[:, ::2], x.double(), x.bfloat16(), x.half()):
        assert count_nonfinite(kind).item() == (~kind.isfinite()).sum().item()
    assert count_nonfinite(torch.zeros(3)).item() == 0


def test_memory_without_gaps() -> None:
    x = torch.arange(24.0).view(2, 3, 4)
    for dense in (x, x.permute(2, 0, 1), x[1:], x[:, :1, :1][:1], x.to(memory_format=torch.contiguous_format)):
        line = flat(dense)
        assert line is not None
        assert sorted(line.tolist()) == sorted(dense.flatten().tolist())
        assert line.untyped_storage().data_ptr() == dense.untyped_storage().data_ptr()
    for gaps in (x[:, :, ::2], x[:, 1:], torch.ones(1).expand(3), x.as_strided((2, 2), (1, 1))):
        assert flat(gaps) is None


def test_numbers_become_one_tensor() -> None:
    mixed = as_tensor([1.5, torch.tensor(2.0, dtype=torch.bfloat16), torch.tensor(3.0), 4])
    assert mixed.dtype == torch.float64
    assert mixed.tolist() == [1.5, 2.0, 3.0, 4.0]
    assert as_tensor([]).shape == (0,)
