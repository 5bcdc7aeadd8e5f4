"""Norms of weights against float64 sums, and when they are measured again."""

from __future__ import annotations

import math

import pytest
import torch
from probe_toys import Zoo
from torch import nn

from bifusion_diag.probes import Monitor, WeightsProbe
from bifusion_diag.probes import weights as module_under_test
from bifusion_diag.probes.weights import REFRESH


def truth(model: nn.Module) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own:
            elements = torch.cat([p.detach().double().flatten() for p in own]).tolist()
            found[f"weights/{name or '(root)'}/norm"] = math.sqrt(sum(v * v for v in elements))
            found[f"weights/{name or '(root)'}/nonfinite"] = sum(not math.isfinite(v) for v in elements)
        running = [x for key, x in module.named_buffers(recurse=False) if key.startswith("running_")]
        if running:
            bad = sum(any(not math.isfinite(v) for v in x.flatten().tolist()) for x in running)
            found[f"weights/{name or '(root)'}/running_nonfinite"] = bad
    return found


def row_of(monitor: Monitor) -> dict[str, float | None]:
    with monitor.step():
        pass
    monitor.end_step()
    return monitor.latest()


def test_every_norm_is_that_of_the_forward() -> None:
    model, x = Zoo(), torch.randn(6, 4)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)  # counts no change of a parameter
    with Monitor(model, optimiser, probes=[WeightsProbe(turns=1)]) as monitor:
        for _ in range(3):
            expected = truth(model)
            with monitor.step():
                model(x).backward()
                optimiser.step()
            monitor.end_step()
            assert monitor.latest() == pytest.approx(expected, rel=1e-5)
            assert truth(model) != pytest.approx(expected, rel=1e-5)


def test_bad_and_odd_weights() -> None:
    model = nn.ModuleList([nn.Linear(3, 3) for _ in range(5)])
    model[0].weight.data[0, :2] = torch.tensor([math.nan, math.inf])
    model[1].weight.data[:] = 3e37  # its float32 sum of squares is infinite
    model[2].bfloat16()
    model[3].weight = nn.Parameter(torch.randn(3, 9)[:, ::3])
    model[4].double().weight.data[:] = 1e200
    model[4].bias.requires_grad_(False).data[0] = -math.inf
    with Monitor(model, probes=["weights"]) as monitor:
        row, expected = row_of(monitor), truth(model)
    assert expected.pop("weights/4/norm") == math.inf == row.pop("weights/4/norm")
    assert row == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert [row[f"weights/{i}/nonfinite"] for i in range(5)] == [2, 0, 0, 0, 1]


def test_quantised_weights() -> None:
    model = nn.ModuleDict({"packed": nn.Module(), "plain": nn.Linear(2, 2), "float8": nn.Module()})
    model["packed"].weight = nn.Parameter(torch.ones(9, dtype=torch.int8), requires_grad=False)
    model["float8"].weight = nn.Parameter(torch.tensor([3.0, -4.0]).to(torch.float8_e4m3fn), requires_grad=False)
    with Monitor(model, probes=["weights"]) as monitor:
        row = row_of(monitor)
    plain = torch.cat([p.detach().flatten() for p in model["plain"].parameters()]).norm().item()
    norms = {name: value for name, value in row.items() if name.endswith("/norm")}
    assert norms == {"weights/plain/norm": pytest.approx(plain, rel=1e-5), "weights/float8/norm": 5.0}


def test_a_frozen_parameter_is_measured_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    real = module_under_test.norms_of
    monkeypatch.setattr(module_under_test, "norms_of", lambda x: (counts.append(len(x)), real(x))[1])
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False))
    frozen = model[1].weight
    with Monitor(model, probes=[WeightsProbe(turns=1)]) as monitor:
        for _ in range(3):
            row_of(monitor)
        assert counts == [4, 2, 2]
        frozen[0, 0] = 100.0
        assert row_of(monitor) == pytest.approx(truth(model), rel=1e-5)
        frozen.data = torch.ones(3, 3) * 7
        assert row_of(monitor) == pytest.approx(truth(model), rel=1e-5)
        assert counts == [4, 2, 2, 3, 3]
        frozen.data.mul_(2)  # PyTorch does not count it
        rows = [row_of(monitor) for _ in range(REFRESH)]
        assert rows[-1] == pytest.approx(truth(model), rel=1e-5)


def test_a_parameter_without_a_shape_yet_is_missing() -> None:
    model = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2))
    with Monitor(model, probes=[WeightsProbe(turns=1)]) as monitor:
        row = row_of(monitor)
        assert [row["weights/0/norm"], row["weights/0/nonfinite"]] == [None, None]
        assert row["weights/1/norm"] > 0  # type: ignore[operator]
        model(torch.ones(1, 3))
        assert row_of(monitor) == pytest.approx(truth(model), rel=1e-5)


def test_modules_take_turns() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(5)])
    with Monitor(model, probes=[WeightsProbe(turns=3)]) as monitor:
        assert None not in row_of(monitor).values()
        for step in range(1, 7):
            for p in model.parameters():
                p.data.mul_(2)
            row, expected = row_of(monitor), truth(model)
            here = {i for i in range(5) if (step + i) % 3 == 0}
            assert {i for i in range(5) if row[f"weights/{i}/norm"] is not None} == here
            assert all(row[f"weights/{i}/norm"] == pytest.approx(expected[f"weights/{i}/norm"]) for i in here)


def test_only_the_modules_asked_for() -> None:
    with Monitor(Zoo(), probes=[WeightsProbe(modules=["twice"], name="some")]) as monitor:
        assert set(row_of(monitor)) == {"some/twice/norm", "some/twice/nonfinite"}


def test_running_statistics_that_are_not_finite_are_counted_by_module() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.LazyBatchNorm1d(), nn.BatchNorm1d(3))
    model[0].running_mean[1] = math.nan
    model[0].running_var[0] = math.inf
    with Monitor(model, probes=[WeightsProbe(turns=1)]) as monitor:
        rows = []
        for _ in range(2):
            with monitor.step():
                model(torch.randn(4, 3))
            monitor.end_step()
            rows.append(monitor.latest())
    assert [row["weights/0/running_nonfinite"] for row in rows] == [2, 2]  # NaN and infinity stay
    assert [row["weights/1/running_nonfinite"] for row in rows] == [None, 0]  # has no shape before its first forward
    assert [row["weights/2/running_nonfinite"] for row in rows] == [0, 0]
