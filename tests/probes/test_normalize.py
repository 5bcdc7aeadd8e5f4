"""What enters a normalisation, against the statistics of the input in float64, one row after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from probe_toys import Sparse
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bifusion_diag.probes import Monitor, NormalizeProbe, normalize
from bifusion_diag.probes.outputs import tensors_of


class L2Normalize(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=self.dim)


class LlamaRMSNorm(nn.Module):
    """The form that language models have: computed in float32, cast back, then scaled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class ChannelsFirst(nn.LayerNorm):
    """LayerNorm over dimension 1 of four, as ConvNeXt has it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Kept(nn.Module):
    """Says whether it is checkpointed, and keeps what enters its norm."""

    def __init__(self, norm: nn.Module, mode: str) -> None:
        super().__init__()
        self.norm = norm
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        if self.mode in ("reentrant", "again"):
            return checkpoint(self.norm, x, use_reentrant=self.mode == "reentrant")
        return self.norm(x)


def row_of(model: nn.Module, *inputs: Any, probe: NormalizeProbe | None = None) -> dict[str, float | None]:
    with Monitor(model, probes=[probe or "normalize"]) as monitor:
        with monitor.step():
            for x in inputs:
                sum(y.sum() for y in tensors_of(model(x)) if y.requires_grad)
        monitor.end_step()
        return monitor.latest()


def smallest(rows: np.ndarray, kind: str) -> float:
    """The twin: rows (R, n)."""
    found = []
    for row in rows.astype(np.float64):
        if kind == "std":
            mean = sum(row) / len(row)
            found.append((sum((v - mean) ** 2 for v in row) / len(row)) ** 0.5)
        else:
            found.append((sum(v**2 for v in row) / (len(row) if kind == "rms" else 1)) ** 0.5)
    return min(found)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[np.ndarray], np.ndarray], str]] = {
    # (5, 6, 4, 3) → rows of what is normalised together
    "layer": (lambda: nn.LayerNorm(3), lambda x: x.reshape(-1, 3), "std"),
    "layer of two": (lambda: nn.LayerNorm((4, 3)), lambda x: x.reshape(-1, 12), "std"),
    "layer without weights": (lambda: nn.LayerNorm(3, elementwise_affine=False), lambda x: x.reshape(-1, 3), "std"),
    "group": (lambda: nn.GroupNorm(2, 6), lambda x: x.reshape(10, -1), "std"),
    "batch": (lambda: nn.BatchNorm2d(6), lambda x: np.moveaxis(x, 1, 0).reshape(6, -1), "std"),
    "instance": (lambda: nn.InstanceNorm2d(6), lambda x: x.reshape(30, -1), "std"),
    "rms": (lambda: nn.RMSNorm(3), lambda x: x.reshape(-1, 3), "rms"),
    "rms of two": (lambda: nn.RMSNorm((4, 3)), lambda x: x.reshape(-1, 12), "rms"),
    "rms without weights": (lambda: nn.RMSNorm(3, elementwise_affine=False), lambda x: x.reshape(-1, 3), "rms"),
    "llama": (lambda: LlamaRMSNorm(3), lambda x: x.reshape(-1, 3), "rms"),
    "l2": (lambda: L2Normalize(1), lambda x: np.moveaxis(x, 1, -1).reshape(-1, 6), "l2"),
    "l2 last": (lambda: L2Normalize(-1), lambda x: x.reshape(-1, 3), "l2"),
}


@pytest.mark.parametrize("mode", ["plain", "reentrant", "again"])
@pytest.mark.parametrize("case", CASES)
def test_smallest_equals_the_twins(case: str, mode: str) -> None:
    make, rows, kind = CASES[case]
    x = torch.randn(5, 6, 4, 3) * torch.rand(5, 6, 1, 1)
    row = row_of(Kept(make(), mode), x.requires_grad_())
    assert row == {"normalize/norm/smallest": pytest.approx(smallest(rows(x.detach().numpy()), kind), rel=2e-4)}


@pytest.mark.parametrize("case", CASES)
def test_the_statistics_are_read_where_autograd_saved_them(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    for name in ("_deviations", "_norms"):
        real = getattr(normalize, name)
        monkeypatch.setattr(normalize, name, lambda *a, real=real: (read.append(case), real(*a))[1])
    x = torch.randn(5, 6, 4, 3, requires_grad=True)
    assert len(row_of(Kept(CASES[case][0](), "plain"), x)) == 1
    assert read == []
    row_of(Kept(CASES[case][0](), "again"), x)
    assert read == [case]


def test_channels_first() -> None:
    x = torch.randn(5, 6, 4, 3, requires_grad=True)
    rows = np.moveaxis(x.detach().numpy(), 1, -1).reshape(-1, 6)
    row = row_of(Kept(ChannelsFirst(6), "plain"), x)
    assert row == {"normalize/norm/smallest": pytest.approx(smallest(rows, "std"), rel=2e-4)}
    assert row_of(Kept(ChannelsFirst(6), "again"), x) == {}  # 3 columns are not the 6 that it normalises


@pytest.mark.parametrize(("scale", "tolerance"), [(1.0, 1e-4), (1e-4, 1e-2), (0.0, 1.0)])
def test_small_deviations(scale: float, tolerance: float) -> None:
    """σ comes from 1/√(σ² + ε) with ε = 1e-5: good down to √ε / 1000, then noise near zero."""
    x = torch.randn(7, 64) * scale
    row = row_of(nn.LayerNorm(64), x)
    expected = smallest(x.numpy(), "std")
    assert row["normalize/(root)/smallest"] == pytest.approx(expected, rel=tolerance, abs=3e-6)


def test_a_zero_row_is_an_l2_norm_of_zero() -> None:
    x = torch.randn(4, 3)
    x[2] = 0
    assert row_of(L2Normalize(1), x.requires_grad_()) == {"normalize/(root)/smallest": 0.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    x = torch.randn(9, 32).to(dtype)
    rows = x.double().numpy()
    for model, kind in ((nn.LayerNorm(32), "std"), (nn.RMSNorm(32), "rms"), (L2Normalize(-1), "l2")):
        row = row_of(model.to(dtype), x.clone().requires_grad_())
        tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-6}[dtype]
        assert row == {"normalize/(root)/smallest": pytest.approx(smallest(rows, kind), rel=tolerance)}, kind


def test_under_autocast() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), torch.randn(5, 8)
    with Monitor(model, probes=["normalize"]) as monitor:
        with monitor.step(), torch.autocast("cpu", torch.bfloat16):
            model(x)
        monitor.end_step()
        row = monitor.latest()
    with torch.autocast("cpu", torch.bfloat16):
        enters = model[0](x)
    assert row["normalize/1/smallest"] == pytest.approx(
        smallest(enters.detach().float().numpy(), "std"),
        rel=1e-2,
    )


def test_bad_values_are_seen() -> None:
    x = torch.randn(4, 8)
    for model, kind in ((nn.LayerNorm(8), "std"), (nn.RMSNorm(8), "rms"), (L2Normalize(-1), "l2")):
        for bad in (float("nan"), float("inf")):
            y = x.clone()
            y[1, 2] = bad
            value = row_of(model, y.requires_grad_())["normalize/(root)/smallest"]
            if np.isnan(bad) or kind == "std":  # the mean of the row is infinite, its deviation is NaN
                assert np.isnan(value)
            else:  # an infinite norm is not the smallest
                assert value == pytest.approx(smallest(np.delete(x.numpy(), 1, 0), kind), rel=1e-5)


def test_no_rows_no_gradient_and_running_statistics_measure_nothing() -> None:
    assert row_of(nn.LayerNorm(3), torch.zeros(0, 3)) == {}
    assert row_of(nn.LayerNorm(3).requires_grad_(False), torch.randn(4, 3)) == {}
    assert row_of(nn.BatchNorm1d(3).eval(), torch.randn(4, 3)) == {}
    assert row_of(nn.Linear(3, 3), torch.randn(4, 3)) == {}
    assert row_of(nn.LayerNorm(3).requires_grad_(False), torch.randn(4, 3, requires_grad=True)) != {}


def test_the_smallest_of_all_calls() -> None:
    model = nn.ModuleDict({"a": nn.LayerNorm(4), "b": nn.LayerNorm(4, eps=1e-3)})
    inputs = {"a": [torch.randn(3, 4) for _ in range(3)], "b": [torch.randn(2, 4)]}
    with Monitor(model, probes=["normalize"]) as monitor:
        with monitor.step():
            for name, calls in inputs.items():
                for x in calls:
                    model[name](x)
        monitor.end_step()
        row = monitor.latest()
    expected = {
        f"normalize/{name}/smallest": smallest(torch.cat(calls).numpy(), "std") for name, calls in inputs.items()
    }
    assert row == pytest.approx(expected, rel=1e-4)


class Head(nn.Module):
    """Normalises by a function, what a part of it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [F.normalize(self.net(x), dim=-1) for x in xs]


def test_modules_that_are_told() -> None:
    head, xs = Head(), [torch.randn(5, 4), torch.randn(2, 4)]
    out = torch.cat([head.net(x) for x in xs]).detach().numpy()
    row = row_of(head, xs, probe=NormalizeProbe(outputs=["net"], name="head"))
    assert row == {"head/net/smallest": pytest.approx(smallest(out, "l2"), rel=1e-5)}
    row = row_of(head, xs, probe=NormalizeProbe(inputs=["net"]))
    assert row == {"normalize/net/smallest": pytest.approx(smallest(torch.cat(xs).numpy(), "l2"), rel=1e-5)}
    sparse = Sparse(torch.randn(4, 6))
    row = row_of(nn.Identity(), sparse, probe=NormalizeProbe(inputs=["*"], dim=0))
    assert row == {"normalize/(root)/smallest": pytest.approx(smallest(sparse.feats.numpy().T, "l2"), rel=1e-5)}
    assert row_of(nn.LayerNorm(3), torch.randn(4, 3), probe=NormalizeProbe(modules=["other"])) == {}
