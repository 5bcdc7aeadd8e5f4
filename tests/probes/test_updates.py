"""How far weights move, against copies of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from probe_toys import Zoo
from torch import nn
from torch.optim import Optimizer

from bifusion_diag.probes import Monitor, UpdatesProbe
from bifusion_diag.probes.updates import WIDTH


def row_of(model: nn.Module, optimizers: list[Optimizer], work: Callable[[], Any]) -> dict[str, float | None]:
    with Monitor(model, optimizers, probes=["updates"]) as monitor:
        with monitor.step():
            work()
        monitor.end_step()
        return monitor.latest()


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of each module that owns trainable parameters, all elements of these."""
    return {
        name or "(root)": torch.cat([p.detach().double().flatten() for p in own])
        for name, module in model.named_modules()
        if (own := [p for p in module.parameters(recurse=False) if p.requires_grad])
    }


def moments(model: nn.Module, optimizer: Optimizer) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            if "exp_avg_sq" in optimizer.state.get(p, {}):
                found.setdefault(name or "(root)", []).extend(optimizer.state[p]["exp_avg_sq"].flatten().tolist())
    return found


@pytest.mark.parametrize("way", [{"fused": True}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_every_number_equals_the_twins(kind: Any, way: dict[str, bool]) -> None:
    model, x = Zoo(), torch.randn(6, 4)
    optimiser = kind(model.parameters(), lr=1e-2, **way)
    with Monitor(model, optimiser, probes=["updates"]) as monitor:
        for _ in range(3):
            before = copies(model)
            with monitor.step():
                optimiser.zero_grad()
                model(x).backward()
                optimiser.step()
            after = copies(model)
            monitor.end_step()
            row = monitor.latest()
            assert row.pop("updates/skipped") == 0
            assert row.pop("train/lr") == pytest.approx(optimiser.param_groups[0]["lr"])
            second = moments(model, optimiser)
            for name in before:
                ratio = ((after[name] - before[name]).norm() / before[name].norm()).item()
                assert row.pop(f"updates/{name}/ratio") == pytest.approx(ratio, rel=1e-5), name
                for key, end in (("min", min), ("max", max)):
                    value = row.pop(f"updates/{name}/second_moment_{key}")
                    assert value == (pytest.approx(end(second[name])) if name in second else None)
            assert {name.split("/")[1] for name in row} == {"frozen"}  # it is in the optimiser, and may thaw
            assert set(row.values()) == {None}
    assert {name for name in before if (after[name] == before[name]).all()} >= {"silent", "never"}  # ratios of zero
    assert bool(second) == (kind is torch.optim.AdamW)


@pytest.mark.parametrize("layout", [lambda w: w, lambda w: w.t().contiguous().t(), lambda w: w.double()])
def test_a_long_parameter_is_sampled(layout: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = nn.Linear(300, 250)
    model.weight = nn.Parameter(layout(torch.randn(250, 300)))
    model.bias = nn.Parameter(torch.randn(250, dtype=model.weight.dtype))
    optimiser = torch.optim.Adam(model.parameters())
    before = copies(model)["(root)"]

    def work() -> None:
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimiser.step()
        with torch.no_grad():
            model.weight += 1.0  # after the optimiser: not its doing

    row = row_of(model, [optimiser], work)
    model.weight.data -= 1.0
    moved = (copies(model)["(root)"] - before).norm() / before.norm()
    # every element moves by lr; of a sample of n normal weights the norm is off by 1 / √(2n), here four times that
    assert row["updates/(root)/ratio"] == pytest.approx(moved.item(), rel=4 / math.sqrt(2 * WIDTH))
    second = optimiser.state[model.weight]["exp_avg_sq"]
    least, most = row["updates/(root)/second_moment_min"], row["updates/(root)/second_moment_max"]
    assert second.min() <= least < second.median() < most <= second.max()  # type: ignore[operator]


def test_a_sample_of_an_exact_multiple_is_all() -> None:
    model = nn.Linear(WIDTH // 32, 32, bias=False)
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    model.weight.grad = torch.randn_like(model.weight)
    expected = (model.weight.grad.double().norm() / model.weight.detach().double().norm()).item()
    assert row_of(model, [optimiser], optimiser.step)["updates/(root)/ratio"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_complex_parameters(kind: Any) -> None:
    model = nn.ParameterList([torch.randn(3, 5, dtype=torch.complex64), torch.randn(40, 40, dtype=torch.complex128)])
    optimiser = kind(model.parameters(), lr=1e-2, foreach=False)
    before = [p.detach().clone() for p in model]

    def work() -> None:
        model[0].abs().square().mean().backward()
        optimiser.step()

    row = row_of(model, [optimiser], work)
    moved, whole = (model[0].detach() - before[0]).norm(), torch.cat([p.flatten() for p in before])
    sampled = row["updates/(root)/ratio"]
    assert sampled == pytest.approx((moved / whole.norm()).item(), rel=0.05)  # of the long one a third is sampled
    if kind is torch.optim.Adam:
        second = torch.view_as_real(optimiser.state[model[0]]["exp_avg_sq"])
        assert row["updates/(root)/second_moment_max"] == pytest.approx(second.max().item())


def test_zero_and_bad_weights() -> None:
    model = nn.ParameterDict({k: nn.Parameter(torch.zeros(3)) for k in ("still", "born", "nan", "inf", "gone")})
    wrapped = nn.ModuleDict({key: nn.ParameterList([p]) for key, p in model.items()})
    optimiser = torch.optim.SGD(wrapped.parameters(), lr=0.5)
    for key in ("born", "nan", "inf", "gone"):
        model[key].grad = torch.ones(3)
    model["nan"].data[0], model["inf"].data[0], model["gone"].data[:] = math.nan, math.inf, 1.0
    model["gone"].grad[0] = math.nan  # type: ignore[index]
    row = row_of(wrapped, [optimiser], optimiser.step)
    ratios = {key: row[f"updates/{key}/ratio"] for key in model}
    assert ratios == {"still": None, "born": 1.0, "nan": math.inf, "inf": math.inf, "gone": math.inf}


def test_several_optimisers_and_parameters_in_none() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    first = torch.optim.Adam(model[0].parameters())
    second = torch.optim.SGD(model[1].parameters(), lr=0.1)
    resting = torch.optim.SGD(model[2].parameters(), lr=0.1)

    def work() -> None:
        model(torch.randn(2, 3)).sum().backward()
        first.step()
        second.step()

    row = row_of(model, [first, second, resting], work)
    assert row["updates/0/ratio"] > 0  # type: ignore[operator]
    assert row["updates/1/ratio"] > 0  # type: ignore[operator]
    assert row["updates/2/ratio"] is row["updates/3/ratio"] is row["updates/1/second_moment_max"] is None
    assert row["updates/0/second_moment_max"] > 0  # type: ignore[operator]
    assert row["updates/skipped"] == 0


def test_two_steps_of_one_block_are_one_movement() -> None:
    model = nn.Linear(3, 3, bias=False)
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    before = copies(model)["(root)"]

    def work() -> None:
        for _ in range(2):
            model.weight.grad = torch.randn(3, 3)
            optimiser.step()

    row = row_of(model, [optimiser], work)
    moved = (copies(model)["(root)"] - before).norm() / before.norm()
    assert row["updates/(root)/ratio"] == pytest.approx(moved.item(), rel=1e-5)


def test_lbfgs_with_its_closure() -> None:
    model, x = nn.Linear(3, 1), torch.randn(9, 3)
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=4)
    before = copies(model)["(root)"]

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    row = row_of(model, [optimiser], lambda: optimiser.step(closure))  # type: ignore[arg-type]
    moved = (copies(model)["(root)"] - before).norm() / before.norm()
    assert row["updates/(root)/ratio"] == pytest.approx(moved.item(), rel=1e-5)
    assert row["updates/(root)/second_moment_min"] is None


def test_an_optimiser_that_puts_new_memory_in_place() -> None:
    class Replacing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                p.data = p.data * 1.5

    model = nn.Linear(3, 3)
    optimiser = Replacing(model.parameters(), lr=1.0)
    assert row_of(model, [optimiser], optimiser.step)["updates/(root)/ratio"] == pytest.approx(0.5)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_grad_scaler_leaves_out(fused: bool) -> None:
    model = nn.Linear(3, 3)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    rows = []
    with Monitor(model, optimiser, probes=["updates"], scaler=scaler) as monitor:
        for factor in (1.0, math.inf, 1.0):
            with monitor.step():
                optimiser.zero_grad()
                scaler.scale(model(torch.ones(2, 3)).sum() * factor).backward()
                scaler.step(optimiser)
                scaler.update()
            monitor.end_step()
            rows.append(monitor.latest())
    assert [row["updates/skipped"] for row in rows] == [0, 1, 0]
    assert [row["updates/scale"] for row in rows] == [4, 4, 2]
    assert rows[1]["updates/(root)/ratio"] == (0.0 if fused else None)  # a fused one is called, and moves nothing
    assert all(rows[i]["updates/(root)/ratio"] > 0 for i in (0, 2))  # type: ignore[operator]


def test_parameters_that_freeze_thaw_and_are_shared() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = []
    with Monitor(model, optimiser, probes=["updates"]) as monitor:
        for frozen in (False, True, False):
            model[2].requires_grad_(not frozen)
            with monitor.step():
                optimiser.zero_grad()
                model(torch.randn(2, 3)).sum().backward()
                optimiser.step()
            monitor.end_step()
            rows.append(monitor.latest())
    assert rows[0].keys() == rows[1].keys()
    assert [row["updates/2/ratio"] is None for row in rows] == [False, True, False]
    assert all(row["updates/0/ratio"] == row["updates/1/ratio"] for row in rows)


def test_without_an_optimiser_nothing_is_recorded() -> None:
    assert row_of(Zoo(), [], lambda: None) == {}


def test_only_the_modules_asked_for() -> None:
    model = Zoo()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimiser, probes=[UpdatesProbe(modules=["twice"], name="some")]) as monitor:
        with monitor.step():
            optimiser.step()
        monitor.end_step()
        assert {name for name in monitor.latest() if "ratio" in name} == {"some/twice/ratio"}
