"""Gradient norms against a twin that keeps every output and asks autograd for each gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from probe_toys import KINDS, Zoo
from torch import nn
from torch.utils.checkpoint import checkpoint

from bifusion_diag.probes import GradsProbe, Monitor
from bifusion_diag.probes.grads import FINITE, FROZEN, NO_GRADIENT, NONFINITE, ZERO
from bifusion_diag.probes.outputs import tensors_of
from bifusion_diag.probes.owners import owners_of


def measured(model: nn.Module, loss: Any, probe: GradsProbe | str = "grads") -> dict[str, float | None]:
    with Monitor(model, probes=[probe]) as monitor:
        with monitor.step():
            loss().backward()
        monitor.end_step()
        return monitor.latest()


def twin(model: nn.Module, loss: Any) -> dict[str, float | None]:
    """Norms by module, one torch.autograd.grad at a time."""
    kept: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_hook(
            lambda _m, _i, output, name=name: kept.setdefault(name, []).extend(tensors_of(output))
        )
        for name, module in model.named_modules()
    ]
    value = loss()
    for handle in handles:
        handle.remove()
    found: dict[str, float | None] = {}
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        asked = [p for p in own if p.requires_grad]
        gradients = torch.autograd.grad(value, asked, allow_unused=True, retain_graph=True) if asked else []
        squares = [g.double().square().sum() for g in gradients if g is not None]
        if own:
            found[f"grads/{name or '(root)'}/param_norm"] = sum(squares).sqrt().item() if squares else None  # type: ignore[union-attr]
        outputs = [t for t in kept.get(name, []) if t.requires_grad]
        gradients = torch.autograd.grad(value, outputs, allow_unused=True, retain_graph=True) if outputs else []
        squares = [g.double().square().sum() for g in gradients if g is not None]
        found[f"grads/{name or '(root)'}/output_norm"] = sum(squares).sqrt().item() if squares else None  # type: ignore[union-attr]
    return found


def test_every_norm_equals_the_twins() -> None:
    model = Zoo()
    model.inplace.inplace = False  # the twin reads outputs after the forward
    x = torch.randn(6, 4)

    def loss() -> torch.Tensor:
        torch.manual_seed(3)
        return model(x)

    row, expected = measured(model, loss), twin(model, loss)
    norms = {name: value for name, value in row.items() if not name.endswith("/state")}
    everything = [expected[f"grads/{name}/param_norm"] for name in owners_of(model).names]
    assert norms.pop("train/grad_norm") == pytest.approx(sum(x**2 for x in everything if x) ** 0.5, rel=1e-5)
    assert len(norms) == 13 + 15  # owners of parameters, and of outputs that are watched
    for name, value in norms.items():
        assert value == (None if expected[name] is None else pytest.approx(expected[name], rel=1e-5)), name
    assert sum(value is not None for value in norms.values()) > 18
    states = {name.split("/")[1]: value for name, value in row.items() if name.endswith("/state")}
    assert states == {f"steps.{i}": FINITE for i in range(len(KINDS))} | {
        "(root)": FINITE,
        "twice": FINITE,
        "frozen": FROZEN,
        "silent": NO_GRADIENT,
        "never": NO_GRADIENT,
        "zero": ZERO,
        "norm": FINITE,
    }


def test_an_inplace_operation_after_the_module() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 1))
    other = nn.Sequential(model[0], nn.ReLU(), model[2])
    x = torch.randn(5, 3)
    row = measured(model, lambda: model(x).sum())
    expected = twin(other, lambda: other(x).sum())
    for name in ("grads/0/output_norm", "grads/1/output_norm", "grads/2/output_norm"):
        assert row[name] == pytest.approx(expected[name], rel=1e-5)


def test_states_of_huge_and_bad_gradients() -> None:
    model = nn.ModuleList([nn.Linear(2, 1, bias=False) for _ in range(4)])
    huge, nan, inf, tiny = model
    x = torch.ones(1, 2)

    def loss() -> torch.Tensor:
        total = huge(x * 1e30) * 1e5 + nan(x) * float("nan") + inf(x) * float("inf") + tiny(x * 1e-20) * 1e-20
        return total.sum()

    row = measured(model, loss)
    assert [row[f"grads/{i}/state"] for i in range(4)] == [FINITE, NONFINITE, NONFINITE, FINITE]
    assert row["grads/0/param_norm"] == pytest.approx(2**0.5 * 1e35, rel=1e-5)  # a float32 sum of squares is infinite
    assert row["grads/3/param_norm"] == pytest.approx(2**0.5 * 1e-40, rel=1e-4)  # and here zero
    assert row["grads/2/output_norm"] == float("inf")


def test_columns_stay_while_parts_freeze_and_thaw() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    rows = []
    with Monitor(model, probes=["grads"]) as monitor:
        for step, frozen in enumerate([False, True, False]):
            model[0].requires_grad_(not frozen)  # its old .grad is still there: it must not be read
            with monitor.step(step=step):
                model(torch.randn(3, 2)).sum().backward()
            monitor.end_step()
            rows.append(monitor.latest())
    assert rows[0].keys() == rows[1].keys() == rows[2].keys()
    assert [row["grads/0/state"] for row in rows] == [FINITE, FROZEN, FINITE]
    assert rows[1]["grads/0/param_norm"] is None
    assert rows[2]["grads/0/param_norm"] > 0  # type: ignore[operator]


def test_shared_parameters_count_in_both_modules() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    row = measured(model, lambda: model(torch.randn(2, 3)).sum())
    expected = model[0].weight.grad.norm().item()
    assert [row["grads/0/param_norm"], row["grads/1/param_norm"]] == pytest.approx([expected] * 2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_are_measured_once(reentrant: bool) -> None:
    class Checked(nn.Module):
        def __init__(self, on: bool) -> None:
            super().__init__()
            self.on = on
            self.block = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (checkpoint(self.block, x, use_reentrant=reentrant) if self.on else self.block(x)).square().sum()

    plain, checked = Checked(False), Checked(True)
    checked.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, requires_grad=True)
    expected, row = measured(plain, lambda: plain(x)), measured(checked, lambda: checked(x))
    assert row == pytest.approx(expected, rel=1e-6)


def test_only_the_modules_asked_for() -> None:
    model = Zoo()
    row = measured(model, lambda: model(torch.randn(6, 4)), GradsProbe(modules=["twice", "steps.0"], name="some"))
    assert {name.split("/")[1] for name in row} == {"twice", "steps.0"}
    assert all(name.startswith("some/") for name in row)


def test_outputs_are_not_kept() -> None:
    import gc
    import weakref

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    alive: list[Any] = []
    model[0].register_forward_hook(lambda _m, _i, output: alive.append(weakref.ref(output)))
    with Monitor(model, probes=["all"]) as monitor, monitor.step():
        model(torch.randn(2, 3)).sum().backward()
        gc.collect()
        assert alive[0]() is None


@pytest.mark.parametrize("field", ["feats", "F", "features"])
def test_sparse_tensors_of_every_kind_hold_their_features(field: str) -> None:
    x = torch.randn(3, 2)
    output = SimpleNamespace(**{field: x}, coords=torch.zeros(3, 4))
    assert [tensor is x for tensor in tensors_of((None, output))] == [True]


def test_of_several_optimisers_each_has_the_gradients_it_steps_with() -> None:
    both = nn.ModuleDict({"g": nn.Linear(4, 4), "d": nn.Linear(4, 1)})
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in both.values()]
    expected: dict[str, float] = {}

    def update(name: str, loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        loss.backward()
        expected[name] = nn.utils.clip_grad_norm_(both[name].parameters(), 1e-3).item()
        optimizer.step()

    with Monitor(both, optimizers, probes=["grads"]) as monitor:
        for _ in range(2):
            with monitor.step():
                x = torch.randn(3, 4)
                update("g", both["d"](both["g"](x)).square().mean(), optimizers[0])
                both.zero_grad()
                update("d", both["d"](both["g"](x).detach()).mean(), optimizers[1])
                both.zero_grad()
            monitor.end_step()
            row = monitor.latest()
            assert {name: row[f"grads/{name}/param_norm"] for name in both} == pytest.approx(expected, rel=1e-5)
            assert row["grads/g/state"] == row["grads/d/state"] == FINITE
            assert row["train/grad_norm"] == pytest.approx((expected["g"] ** 2 + expected["d"] ** 2) ** 0.5, rel=1e-5)


def test_without_a_gradient_there_is_no_norm_of_the_whole() -> None:
    model = nn.Linear(2, 2)
    with Monitor(model, probes=["grads"]) as monitor:
        with monitor.step():
            model(torch.randn(1, 2))
        monitor.end_step()
        assert "train/grad_norm" not in monitor.latest()
