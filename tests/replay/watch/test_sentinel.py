"""Signs of life against what is computed plainly, and that measuring them changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vital_runs import Classifier, Watch, images, train

from bifusion_diag.probes import Monitor
from bifusion_diag.replay.step import TOTAL, Training, fingerprint
from bifusion_diag.replay.watch.sentinel import Sentinel
from bifusion_diag.replay.watch.vitals import FINITE, FROZEN, NO_GRADIENT, ZERO


class Mixed(nn.Module):
    """Tied weights, a frozen and an unused layer, a parameter of the root, a layer with a zero gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.unused, self.silent = nn.Linear(6, 6), nn.Linear(6, 2)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(self.first(x))) + self.frozen(x)
        logits: Tensor = self.scale * self.last(x) + 0 * self.silent(x).sum()
        return logits


def one_step(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any], Tensor],
    probes: tuple[str, ...] = (),
    edit: Callable[[], object] = lambda: None,
) -> Watch:
    watch = Watch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    with Monitor(model, optimizer, list(probes), recorder=watch) as monitor, monitor.step(batch):
        loss(batch).backward()
        edit()
        optimizer.step()
    return watch


@pytest.mark.parametrize("probes", [(), ("grads",)])
def test_gradients_by_module(probes: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = Mixed()
    x = torch.randn(5, 6)
    watch = one_step(model, x, lambda x: model(x).square().sum(), probes)
    vitals = watch.vitals[0]
    every = {id(p): p.grad.double().norm().item() for p in model.parameters() if p.grad is not None}
    assert vitals.grad_norm == pytest.approx(math.hypot(*every.values()), rel=1e-6)
    assert vitals.grad_norm32 == vitals.grad_norm
    for name, module in model.named_modules():
        own = [every[id(p)] for p in module._parameters.values() if p is not None and id(p) in every]
        if module._parameters:
            assert vitals.norms[name or "(root)"] == pytest.approx(math.hypot(*own), rel=1e-6)
    assert vitals.states == {
        "(root)": FINITE,
        "first": FINITE,
        "second": FINITE,
        "frozen": FROZEN,
        "unused": NO_GRADIENT,
        "silent": ZERO,
        "last": FINITE,
    }
    assert vitals.owners["first.weight"] == ("first", "second")
    assert watch.sentinel.param_norms["last.bias"] == pytest.approx(model.last.bias.grad.norm().item(), rel=1e-6)
    assert vitals.ran == {"(root)", "first", "second", "frozen", "silent", "last"}


@pytest.mark.parametrize("value", [1e25, math.inf, math.nan])
def test_norms_that_float32_cannot_square(value: float) -> None:
    model = nn.Linear(3, 2)
    watch = one_step(model, torch.ones(4, 3), lambda x: value * model(x).sum())
    vitals = watch.vitals[0]
    assert vitals.grad_norm is not None
    assert vitals.grad_norm32 is not None
    if math.isfinite(value):
        assert vitals.grad_norm == pytest.approx(value * 4 * math.sqrt(8), rel=1e-6)
        assert vitals.bad_parameters == ()
    else:
        assert set(vitals.bad_parameters) == {"weight", "bias"}
    assert not math.isfinite(vitals.grad_norm32)


def test_the_loss_is_what_backward_was_called_on() -> None:
    model = Mixed()
    original = torch.autograd.backward
    values: list[float] = []

    def loss(x: Tensor) -> Tensor:
        value = model(x).square().mean()
        values.append(value.item())
        return value

    watch = one_step(model, torch.randn(5, 6), loss)
    assert watch.vitals[0].terms == {TOTAL: values[0]}
    assert watch.vitals[0].total == values[0]
    assert torch.autograd.backward is original


def test_the_loss_of_accumulated_and_scaled_parts() -> None:
    torch.manual_seed(0)
    model = Mixed()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer, watch = torch.optim.SGD(model.parameters(), 0.1), Watch()
    x = torch.randn(6, 6)
    with Monitor(model, optimizer, [], scaler=scaler, recorder=watch) as monitor, monitor.step(x):
        scaler.scale(model(x).square().mean()).backward()  # the scaler makes its scale here
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        expected = {name: p.grad / 1024 for name, p in model.named_parameters() if p.grad is not None}
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        scaler.step(optimizer)
        scaler.update()
    vitals = watch.vitals[0]
    assert vitals.grad_norm == pytest.approx(math.hypot(*(g.norm().item() for g in expected.values())), rel=1e-6)
    assert vitals.altered == ()
    assert not vitals.scaled_out
    assert vitals.total is not None


def test_told_terms_count_more_and_are_digested() -> None:
    torch.manual_seed(0)
    model = Mixed()
    watch = Watch()
    watch.detector.judge = lambda vitals: [None]  # type: ignore[assignment,method-assign,list-item]: all is suspicious
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(5, 6)

    def step(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = model(x)
        terms = {"size": out.square().mean(), "sum": out.sum()}
        return terms["size"] + 0.5 * terms["sum"], terms

    with Monitor(model, optimizer, [], recorder=watch) as monitor, monitor.step(x):
        total, terms = step(x)
        monitor.losses(terms, {"sum": 0.5}, total)
        total.backward()
    vitals = watch.vitals[0]
    assert vitals.terms == {name: pytest.approx(value.item(), rel=1e-6) for name, value in terms.items()}
    assert vitals.weights == {"size": 1.0, "sum": 0.5}
    measured = watch.fingerprints[0]

    model.zero_grad()
    training = Training(model, step, (optimizer,))
    loss = training.loss(x)
    training.backward(loss)
    again = fingerprint(loss, training.gradients())
    assert measured.losses == again.losses
    assert measured.gradients == again.gradients


@dataclass
class Scenes:
    points: Tensor  # (N, 3)
    scene_index: Tensor  # (N,)
    depth: Tensor  # (B, 4, 4)


@pytest.mark.parametrize(
    ("batch", "path", "absmax", "bad", "sample"),
    [
        (torch.tensor([[1.0, 2.0], [-7.0, 3.0], [0.0, 1.0]]), "batch", 7.0, 0, 1),
        ((torch.zeros(3, 2), torch.tensor([1.0, math.nan, 2.0])), "1", 2.0, 1, 1),
        ({"images": [torch.ones(2, 2), torch.full((1, 2), math.inf)], "ids": torch.arange(2)}, "images", 1.0, 2, 1),
        (
            Scenes(torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, -9]]), torch.tensor([0, 1, 1]), torch.zeros(2, 4, 4)),
            "points",
            9.0,
            0,
            1,
        ),
        ({"x": torch.zeros(4, 2), "weights": torch.tensor([5.0, 1.0])}, "weights", 5.0, 0, None),
    ],
)
def test_inputs(batch: Any, path: str, absmax: float, bad: int, sample: int | None) -> None:
    model = nn.Linear(2, 1)
    watch = one_step(model, batch, lambda _: model(torch.ones(3, 2)).sum())
    found = watch.vitals[0].inputs[path]
    assert (found.absmax, found.bad, found.sample) == (absmax, bad, sample)


def test_alpha_and_a_gate_that_is_called_twice() -> None:
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"alpha": x}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.weight = Gate(), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return (self.gate(x)["alpha"] + self.gate(1 - x)["alpha"]).nan_to_num() @ self.weight

    model = Net()
    alpha = torch.tensor([[0.01, 0.2, math.nan, 0.99]])
    found = one_step(model, alpha, lambda x: model(x).sum()).vitals[0].alphas["gate"]
    assert (found.low, found.high, found.bad) == pytest.approx((2 / 6, 2 / 6, 2))
    assert found.mean == pytest.approx(0.5)


def test_what_the_update_did() -> None:
    torch.manual_seed(0)
    model = Classifier(channels=40)  # some parameters are longer than their sample, others shorter
    before: dict[str, Tensor] = {}

    def loss(batch: Any) -> Tensor:
        before.update({name: p.detach().clone() for name, p in model.named_parameters()})
        return F.cross_entropy(model(batch[0]), batch[1])

    vitals = one_step(model, images(0), loss).vitals[0]
    weight, old = model.head.weight.detach(), before["head.weight"]
    bias, old_bias = model.head.bias.detach(), before["head.bias"]
    far = math.hypot((weight - old).norm().item(), (bias - old_bias).norm().item())
    assert vitals.moved is not None
    assert all(vitals.moved.values())
    assert vitals.update_ratio["head"] == pytest.approx(
        far / math.hypot(old.norm().item(), old_bias.norm().item()), rel=0.5
    )  # of a sample
    small = (model.body[1].weight.detach()[:64] - before["body.1.weight"][:64]).norm().item()
    assert 0.3 < vitals.update_ratio["body.1"] / (small / 8) < 3
    assert vitals.held == {"stem.0", "stem.1", "body.0", "body.1", "head"}
    assert vitals.rates == {"0": 0.1}
    assert vitals.loose == frozenset()


def test_two_optimizers_each_with_its_own_gradients() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 1)})
    first, second = (torch.optim.SGD(model[name].parameters(), 0.1) for name in "ab")
    watch, x = Watch(), torch.randn(4, 3)
    judged: list[Any] = []
    keep = watch.detector.judge
    watch.detector.judge = lambda vitals: judged.append(vitals) or keep(vitals)  # type: ignore[method-assign]
    with Monitor(model, [first, second], [], recorder=watch) as monitor, monitor.step(x):
        model["b"](model["a"](x)).sum().backward()
        norm = math.hypot(*(p.grad.norm().item() for p in model["a"].parameters()))
        first.step()
        model.zero_grad()
        model["b"](model["a"](x)).square().sum().backward()
        later = math.hypot(*(p.grad.norm().item() for p in model["b"].parameters()))
        second.step()
    before = judged[1]  # asked first when the backward had ended
    assert set(before.norms) == {"a"}
    assert before.norms["a"] == pytest.approx(norm, rel=1e-6)
    assert watch.vitals[0].norms == pytest.approx({"a": norm, "b": later}, rel=1e-6)
    assert watch.vitals[0].rates == {"0": 0.1, "1:0": 0.1}


def test_training_is_what_it_is_without() -> None:
    states: list[dict[str, Tensor]] = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = Classifier()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        if watched:
            train(model, optimizer, lambda _, batch, net=model: F.cross_entropy(net(batch[0]), batch[1]), steps=12)
        else:
            for step in range(12):
                x, labels = images(step)
                loss = F.cross_entropy(model(x), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        states.append({**model.state_dict(), "random": torch.get_rng_state()})
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_digest_of_weights() -> None:
    def sentinel(model: nn.Module) -> Sentinel:
        return one_step(model, images(0), lambda batch: 0 * model(batch[0]).sum()).sentinel

    torch.manual_seed(0)
    model, other = Classifier(), Classifier()
    other.load_state_dict(model.state_dict())
    assert sentinel(model).weights_digest() == sentinel(other).weights_digest() != ""
    with torch.no_grad():
        other.head.weight[0, 0] += 1e-3
    assert sentinel(model).weights_digest() != sentinel(other).weights_digest()
    mine, others = sentinel(model).module_digests(), sentinel(other).module_digests()
    assert [name for name in mine if mine[name] != others[name]] == ["head"]


def test_before_the_first_step_nothing_is_known() -> None:
    sentinel = Sentinel(lambda vitals: False)
    assert sentinel.fingerprint is None
    assert sentinel.weights_digest() == ""
    vitals = sentinel.measure(4)
    assert (vitals.step, vitals.norms, vitals.terms) == (4, {}, {})


def test_groups_of_one_name_have_their_own_rates() -> None:
    torch.manual_seed(0)
    model, watch = Mixed(), Watch()
    first, *others = model.parameters()
    groups: list[dict[str, Any]] = [{"params": others, "name": "all"}, {"params": [first], "name": "all", "lr": 0.0}]
    optimizer = torch.optim.SGD(groups, 0.1)
    with Monitor(model, optimizer, [], recorder=watch) as monitor, monitor.step():
        model(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()
    assert watch.vitals[0].rates == {"all": 0.1, "all 1": 0.0}
