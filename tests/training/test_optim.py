"""Clipping against torch's own, the learning rate against its closed form."""

from __future__ import annotations

import math

import pytest
import torch

from bifusion_diag.config.settings import OptimSettings
from bifusion_diag.training.optim import build_optimizer, clip_gradient, learning_rate, set_learning_rate


def parameters_with(*gradients: list[float] | None) -> list[torch.nn.Parameter]:
    result = []
    for gradient in gradients:
        parameter = torch.nn.Parameter(torch.zeros(len(gradient or [0.0])))
        parameter.grad = None if gradient is None else torch.tensor(gradient)
        result.append(parameter)
    return result


@pytest.mark.parametrize("max_norm", [0.5, 5.0, 100.0])
def test_clipping_does_what_torch_does(max_norm: float) -> None:
    mine = parameters_with([3.0, -4.0], None, [12.0])
    theirs = parameters_with([3.0, -4.0], None, [12.0])
    clipped = clip_gradient(mine, max_norm)
    norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert clipped.norm.item() == pytest.approx(13.0) == norm.item()
    assert clipped.coefficient.item() == pytest.approx(min(1.0, max_norm / 13.0), rel=1e-6)
    for a, b in zip(mine, theirs, strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)


def test_no_limit_measures_and_leaves_the_gradient_alone() -> None:
    parameters = parameters_with([3.0, -4.0])
    clipped = clip_gradient(parameters, None)
    assert (clipped.norm.item(), clipped.coefficient.item()) == (5.0, 1.0)
    assert parameters[0].grad.tolist() == [3.0, -4.0]


def test_one_nan_makes_every_gradient_nan_as_it_does_in_users_loops() -> None:
    parameters = parameters_with([math.nan], [1.0, 2.0])
    assert clip_gradient(parameters, 10.0).norm.isnan()
    assert parameters[1].grad.isnan().all()


def test_an_overflowed_norm_silently_loses_the_step() -> None:
    parameters = parameters_with([3e38, 3e38], [1.0])
    assert clip_gradient(parameters, 10.0).norm.item() == math.inf
    assert parameters[1].grad.item() == 0.0


def test_learning_rate_is_mmengines_poly() -> None:
    settings = OptimSettings(lr=1e-4, schedule="poly", poly_power=0.9)
    assert learning_rate(settings, 0, 100) == 1e-4
    assert learning_rate(settings, 75, 100) == pytest.approx(1e-4 * 0.25**0.9)
    assert learning_rate(OptimSettings(lr=1e-4, schedule="constant"), 99, 100) == 1e-4


def test_the_optimiser_leaves_out_what_is_frozen_for_good() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    (group,) = build_optimizer(model, OptimSettings()).param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in model[1].parameters()}


class WithClip(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Module()
        self.encoder.clip = torch.nn.Linear(2, 2, bias=False)
        self.decoder = torch.nn.Linear(2, 2, bias=False)


def test_clip_is_a_group_of_its_own_with_a_rate_of_its_own() -> None:
    model = WithClip()
    optimizer = build_optimizer(model, OptimSettings(weight_decay=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    recorded = set_learning_rate(optimizer, 1e-2, clip_scale=0.1)
    assert recorded == {"train/lr": 1e-2, "train/lr_clip": pytest.approx(1e-3)}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    # Adam's first step is the learning rate times the gradient's sign
    for name, rate in (("encoder.clip.weight", 1e-3), ("decoder.weight", 1e-2)):
        torch.testing.assert_close(before[name] - model.get_parameter(name).detach(), torch.full((2, 2), rate))


def test_the_rate_of_clip_is_recorded_only_while_it_learns() -> None:
    model = WithClip()
    optimizer = build_optimizer(model, OptimSettings())
    model.encoder.clip.requires_grad_(False)
    assert set_learning_rate(optimizer, 1e-2, clip_scale=0.1) == {"train/lr": 1e-2}
    frozen = WithClip()
    frozen.encoder.clip.requires_grad_(False)
    assert set_learning_rate(build_optimizer(frozen, OptimSettings()), 1e-2, clip_scale=1.0) == {"train/lr": 1e-2}


def test_what_is_frozen_does_not_decay() -> None:
    model = WithClip()
    optimizer = build_optimizer(model, OptimSettings(lr=0.1, weight_decay=0.5))
    for frozen in (False, True):
        model.encoder.clip.requires_grad_(not frozen)
        before = model.encoder.clip.weight.detach().clone()
        loss = model.decoder(torch.ones(2)).sum() + (0 if frozen else model.encoder.clip(torch.ones(2)).sum())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert torch.equal(model.encoder.clip.weight, before) == frozen
