"""Rules of weights, gradients and outputs by module."""

from __future__ import annotations

import math

import pytest
import torch
from rule_runs import CLASSES, FEATURES, classifier, cross_entropy, found, look, train
from torch import Tensor, nn

from bifusion_diag.diagnosis import NotMeasured
from bifusion_diag.record.schema import Run

GRADS = ("grads", "weights", "losses")


def deep(layers: int, activation: type[nn.Module], gain: float, width: int = 24) -> nn.Sequential:
    """Layers of one width, their weights drawn with a given gain."""
    parts: list[nn.Module] = [nn.Linear(FEATURES, width)]
    for _ in range(layers):
        parts += [nn.Linear(width, width), activation()]
    for part in parts:
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=gain / math.sqrt(part.in_features))
    return nn.Sequential(*parts, nn.Linear(width, CLASSES))


def test_a_weight_that_is_nan_stays_so_and_one_that_is_loaded_again_does_not() -> None:
    def broken(until: int) -> Run:
        kept: list[Tensor] = []

        def before(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            weight = model[3].weight  # type: ignore[index]
            if step == 60:
                kept.append(weight.detach().clone())
                weight.data[0, 0] = math.nan
            if 60 < step < until:
                optimizer.zero_grad()
                weight.data[0, 0] = math.nan
            if step == until:
                optimizer.state.clear()
                for module in model.modules():
                    if isinstance(module, nn.Linear | nn.BatchNorm1d):
                        module.reset_parameters()

        return train(classifier(), 120, before=before, probes=("weights", "losses"))

    finding = found("nonfinite-weight", broken(until=999))
    assert (finding.severity, finding.module) == ("error", None)  # the update of the same step reaches all others
    assert "may have been first" in finding.mechanism
    assert finding.steps is not None
    assert 60 <= finding.steps[0] < 68  # modules take turns of eight steps
    assert finding.steps[1] == 119
    assert "None of" in finding.mechanism
    back = found("nonfinite-weight", broken(until=90))
    assert "All are finite again" in back.mechanism
    assert back.steps is not None
    assert 90 <= back.steps[1] < 98


def test_running_statistics_that_are_nan_are_told_apart_from_weights(healthy: Run) -> None:
    def before(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if step == 50:
            with torch.no_grad():
                model(torch.full((4, FEATURES), math.inf))  # a forward whose step was left out

    run = train(classifier(), 100, before=before, probes=("weights", "losses"))
    finding = found("nonfinite-weight", run)
    assert (finding.module, finding.severity) == ("1", "error")
    assert "Running statistics" in finding.title
    assert run.series("loss/total").stats.nonfinite == 0  # type: ignore[union-attr]
    assert look("nonfinite-weight", healthy) == []


def test_sigmoids_in_a_row_let_the_gradient_vanish() -> None:
    finding = found("vanishing-gradients", train(deep(10, nn.Sigmoid, 1.0), 80, lr=1e-3, probes=GRADS))
    assert finding.module in ("0", "1")  # farthest from the loss
    assert look("vanishing-gradients", train(deep(10, nn.ReLU, math.sqrt(2)), 80, lr=1e-3, probes=GRADS)) == []


def test_frozen_and_unused_modules_do_not_vanish(healthy: Run) -> None:
    model = classifier()
    model.unused = nn.Linear(3, 3)
    model[0].requires_grad_(False)

    def losses(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = x
        for part in list(model)[:8]:  # type: ignore[call-overload]
            h = part(h)
        return {"classes": nn.functional.cross_entropy(h, labels), "nothing": 0.0 * model.unused.weight.sum()}  # type: ignore

    assert look("vanishing-gradients", train(model, 80, losses=losses, probes=GRADS)) == []
    assert look("vanishing-gradients", healthy) == []


def test_a_gradient_that_grows_through_the_layers_explodes_and_does_not_vanish(healthy: Run) -> None:
    run = train(deep(24, nn.Tanh, 6.0), 60, lr=1e-6, probes=("grads", "weights", "losses"))
    finding = found("exploding-module", run)
    assert "grows through the layers" in finding.title
    assert look("vanishing-gradients", run) == []
    assert look("exploding-module", healthy) == []


def test_a_module_that_outgrows_all_others_is_named() -> None:
    """One head beyond the edge of stability beside a classifier that learns."""
    fixed = torch.randn(64, FEATURES)
    steepest = torch.linalg.eigvalsh(2 * fixed.T @ fixed / 64)[-1].item()
    model = nn.ModuleDict({"good": classifier(), "bad": nn.Linear(FEATURES, 1, bias=False)})
    model["bad"].weight.data.mul_(0.01)

    def losses(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        squares = model["bad"](fixed).square().mean()  # type: ignore[index]
        return {**cross_entropy(model["good"], x, labels), "squares": squares}  # type: ignore[index]

    groups = [{"params": model["good"].parameters(), "lr": 0.05}, {"params": model["bad"].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=2.06 / steepest)
    finding = found(
        "exploding-module", train(model, 220, losses=losses, optimizer=optimizer, probes=("grads", "losses"))
    )
    assert (finding.module, finding.severity) == ("bad", "warning")
    assert "outgrows" in finding.title


def test_outputs_that_keep_growing_are_named() -> None:
    """A product of three matrices that is pushed up without a bound."""
    model = nn.Sequential(*(nn.Linear(FEATURES, FEATURES, bias=False) for _ in range(3)))
    for part in model:
        nn.init.eye_(part.weight)
    run = train(
        model,
        220,
        losses=lambda model, x, _: {"up": -model(x.abs()).mean()},
        optimizer=torch.optim.AdamW(model.parameters(), lr=5e-2),
        probes=("activations", "losses"),
    )
    finding = found("exploding-module", run)
    assert "keep growing" in finding.title
    ends = {name: run.series(f"activations/{name}/max").value[-5:] for name in "012"}  # type: ignore[union-attr]
    assert finding.module == next(name for name in "012" if ends[name].min() > 1000)
    assert look("exploding-module", run, activation_absmax=1e9) == []


def test_a_relu_that_nothing_lights_is_dead(healthy: Run) -> None:
    model = classifier()
    model[3].bias.data.fill_(-100.0)
    finding = found("dead-units", train(model, 80, lr=1e-3, probes=("activations", "losses")))
    assert finding.module == "4"
    assert finding.evidence[1].reading.value == 1.0  # type: ignore[union-attr]
    assert look("dead-units", healthy) == []


def test_an_activation_that_leaks_cannot_be_dead() -> None:
    model = nn.Sequential(nn.Linear(FEATURES, CLASSES), nn.LeakyReLU())
    assert isinstance(look("dead-units", train(model, 60, probes=("activations", "losses"))), NotMeasured)


@pytest.mark.parametrize("rule", ["nonfinite-weight", "vanishing-gradients", "exploding-module", "dead-units"])
def test_without_its_probe_a_rule_says_so(rule: str) -> None:
    gap = look(rule, train(classifier(), 5, probes=("losses",)))
    assert isinstance(gap, NotMeasured)
    assert "probe" in gap.reason
