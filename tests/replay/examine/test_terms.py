"""Every term's gradient against autograd's own, and the guilty term where one was spoilt."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bifusion_diag.replay.examine.terms import TermTable, attribute_term, term_gradients
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Training


class Net(nn.Module):
    """A trunk that two heads share."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3))
        self.label, self.box = nn.Linear(16, 3), nn.Linear(16, 4)
        self.idle = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.label(h), self.box(h)


class Loss(NamedTuple):
    total: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, float]


WEIGHTS = {"label": 2.0, "box": 0.25}


def raw(model: Net, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    label, box = model(batch["x"])
    return {"label": F.cross_entropy(label, batch["y"]), "box": F.smooth_l1_loss(box, batch["box"])}


def total(terms: dict[str, Tensor]) -> Tensor:
    return sum((WEIGHTS[name] * term for name, term in terms.items()), torch.zeros(()))


def told(terms: dict[str, Tensor]) -> Any:
    return Loss(total(terms), terms, WEIGHTS)


def attached(terms: dict[str, Tensor]) -> Any:
    return total(terms), terms


def detached(terms: dict[str, Tensor]) -> Any:
    return total(terms), {name: term.detach().clone() for name, term in terms.items()}


def by_data(terms: dict[str, Tensor]) -> Any:
    return total(terms), {name: term.data for name, term in terms.items()}


def in_brackets(terms: dict[str, Tensor]) -> Any:
    terms = {name: term.reshape(1) for name, term in terms.items()}
    return total(terms).sum(), terms


def summed(terms: dict[str, Tensor]) -> Any:
    return {name: WEIGHTS[name] * term for name, term in terms.items()}


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(8, 6), "y": torch.randint(3, (8,)), "box": torch.randn(8, 4)}


@pytest.mark.parametrize("give", [told, attached, detached, by_data, in_brackets, summed])
def test_the_table_holds_each_terms_weighted_gradient_by_module(net, batch, give):
    """Tolerance: the same float32 operations in another order."""
    training = Training(net, lambda batch: give(raw(net, batch)))
    notes = StepNotes(net, 0, batch)
    state = torch.get_rng_state()
    terms = raw(net, batch)
    expected = {}
    for name, term in terms.items():
        gradients = torch.autograd.grad(
            WEIGHTS[name] * term, list(net.parameters()), retain_graph=True, allow_unused=True
        )
        expected[name] = dict(zip(dict(net.named_parameters()), gradients, strict=True))
    notes.start.restore(net)
    table = term_gradients(training, notes)
    assert table.losses == pytest.approx(
        {name: float(term.detach()) * (WEIGHTS[name] if give is summed else 1) for name, term in terms.items()}
    )
    assert table.weights == (dict.fromkeys(WEIGHTS, 1.0) if give is summed else WEIGHTS)
    for name, gradients in expected.items():
        for module in ("trunk.0", "trunk.1", "label", "box"):
            own = [g.norm() for path, g in gradients.items() if g is not None and path.startswith(f"{module}.")]
            norm = math.hypot(*map(float, own))
            assert table.norms[name].get(module, 0.0) == pytest.approx(norm, rel=1e-5, abs=1e-12)
        whole = math.hypot(*(float(g.norm()) for g in gradients.values() if g is not None))
        assert table.whole[name] == pytest.approx(whole, rel=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in net.parameters())


class Once(torch.autograd.Function):
    """A user's function that frees what its backward needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = [x.clone()]
        return x.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if not ctx.kept:
            raise RuntimeError("freed")
        return 2 * ctx.kept.pop() * gradient


def test_a_backward_that_runs_only_once_and_a_reentrant_checkpoint(net, batch):
    def once(batch: dict[str, Tensor]) -> Any:
        hidden = Once.apply(net.trunk[0](batch["x"]))
        return {"a": hidden.mean(), "b": 3 * hidden.square().mean()}

    def plain(batch: dict[str, Tensor]) -> Any:
        hidden = net.trunk[0](batch["x"]).square()
        return {"a": hidden.mean(), "b": 3 * hidden.square().mean()}

    def again(batch: dict[str, Tensor]) -> Any:
        hidden = checkpoint(lambda x: net.trunk[0](x).square(), batch["x"].requires_grad_(), use_reentrant=True)
        return {"a": hidden.mean(), "b": 3 * hidden.square().mean()}

    notes = StepNotes(net, 0, batch)
    tables = [term_gradients(Training(net, step), notes) for step in (once, plain, again)]
    assert tables[0] == tables[1] == tables[2]
    assert set(tables[0].whole) == {"a", "b"}


def test_a_term_that_is_not_finite_is_guilty_and_one_that_takes_no_part_is_not(net, batch):
    def step(batch: dict[str, Tensor]) -> Any:
        terms = raw(net, batch)
        spoilt, unused = terms["box"] / 0, terms["label"] * torch.nan
        return Loss(terms["label"] + spoilt, {**terms, "spoilt": spoilt, "unused": unused}, {"unused": 0.0})

    found = attribute_term(term_gradients(Training(net, step), StepNotes(net, 0, batch)), "nonfinite-loss")
    assert [(share.name, share.why) for share in found] == [("spoilt", "its value is inf")]


def test_zero_times_a_bad_term_is_bad(net, batch):
    def step(batch: dict[str, Tensor]) -> Any:
        terms = raw(net, batch)
        return terms["label"] + 0 * (terms["box"] / 0), {"label": terms["label"], "box": terms["box"] / 0}

    table = term_gradients(Training(net, step), StepNotes(net, 0, batch))
    assert [share.name for share in attribute_term(table, "nonfinite-loss")] == ["box"]


@pytest.mark.parametrize("cut", [False, True])
def test_a_finite_term_whose_gradient_is_not_finite_is_guilty(net, batch, cut):
    def step(batch: dict[str, Tensor]) -> Any:
        terms = raw(net, batch) | {"root": (net.box(net.trunk(batch["x"])) * 0).sum().sqrt()}
        total = sum(terms.values())
        return total, {name: term.detach() for name, term in terms.items()} if cut else terms

    table = term_gradients(Training(net, step), StepNotes(net, 0, batch))
    assert all(map(math.isfinite, table.losses.values()))
    assert [share.name for share in attribute_term(table, "nonfinite-gradient")] == ["root"]
    assert set(table.bad["root"]) == {"trunk.0", "trunk.1", "box"}


def table_of(losses: dict[str, float], norms: dict[str, float], weights: dict[str, float] | None = None) -> TermTable:
    return TermTable(losses, weights or dict.fromkeys(losses, 1.0), {n: {"m": v} for n, v in norms.items()}, norms)


def test_the_term_that_jumped_is_guilty_not_the_one_that_was_always_large():
    usual = table_of({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 50.0, "b": 0.1, "c": 0.01})
    bad = table_of({"a": 1.1, "b": 1.0, "c": 1.0}, {"a": 65.0, "b": 400.0, "c": 0.5})
    (share,) = attribute_term(bad, "gradient-spike", usual)
    assert share.name == "b"
    assert share.why == "its gradient is 400, 0.1 in the contrast step"
    assert share.share == pytest.approx(399.9 / (15 + 399.9 + 0.49))
    assert [s.name for s in attribute_term(bad, "gradient-spike", usual, module="m")] == ["b"]


def test_terms_that_jump_alike_are_guilty_together():
    usual = table_of({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 0.01})
    bad = table_of({"a": 1.0, "b": 1.0}, {"a": 100.0, "b": 1.5})
    assert [share.name for share in attribute_term(bad, "gradient-spike", usual)] == ["a", "b"]


def test_where_the_healthy_step_is_as_bad_the_largest_term_is_named():
    bad = table_of({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 900.0})
    assert [share.name for share in attribute_term(bad, "gradient-spike", bad)] == ["b"]
    assert [share.name for share in attribute_term(bad, "gradient-spike")] == ["b"]
    assert attribute_term(bad, "alpha-collapse", bad) == []


def test_of_a_loss_spike_the_weighted_values_count():
    usual = table_of({"a": 1.0, "b": 1.0}, {}, {"a": 1.0, "b": 0.01})
    bad = table_of({"a": 9.0, "b": 30.0}, {}, {"a": 1.0, "b": 0.01})
    assert attribute_term(bad, "loss-spike", usual)[0].name == "a"
    assert [share.name for share in attribute_term(bad, "loss-spike", typical={"a": 9.0, "b": 1.0})] == ["b"]


def test_a_term_that_has_turned_negative_is_guilty_though_others_have_grown() -> None:
    table = TermTable({"a": -3.0, "b": 5.0}, {"a": 1.0, "b": 1.0}, {}, {"a": 1.0, "b": 1.0})
    assert [s.name for s in attribute_term(table, "loss-shift", table, typical={"a": 3.1, "b": 4.0})] == ["a"]
    assert [s.name for s in attribute_term(table, "loss-shift", typical={"a": -2.0, "b": 1.0})] == ["b"]
