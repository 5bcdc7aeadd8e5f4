"""Where NaN and infinite gradients are said to come from, and where they grew, in models whose fault is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bifusion_diag.replay.examine.backward_trace import BackwardTrace, first_backward_jump, trace_backward
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Training

X = torch.linspace(-1, 1, 32).reshape(8, 4)


class Part(nn.Module):
    """A linear layer and one function of its output."""

    def __init__(self, function: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


class Net(nn.Module):
    """Three parts, the middle one of which is at fault."""

    def __init__(self, function: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.first, self.middle, self.last = Part(), Part(function), Part()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


def _training(model: nn.Module) -> tuple[Training, StepNotes]:
    return Training(model, lambda given: model(given).square().mean()), StepNotes(model, 0, X)


def trace(model: nn.Module) -> BackwardTrace:
    return trace_backward(*_training(model))


class BadBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + 1

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g / 0  # in a backward


class Slipped(torch.autograd.Function):
    """PyTorch sees nothing of what it does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + 1

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        import numpy as np

        return torch.from_numpy(np.full(g.shape, np.nan, np.float32))


def _tensor_hook(x: Tensor) -> Tensor:
    y = x * 2
    y.register_hook(lambda g: g * float("nan"))  # the hook
    return y


def _where(x: Tensor) -> Tensor:
    zero = x * 0
    return torch.where(zero > 0, zero.sqrt(), x)  # the trap


def _negative_where(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 9, x, (x * 0 - 1).sqrt())  # NaN that is selected away


def _normalised(x: Tensor) -> Tensor:
    rows = x * torch.zeros(4)
    return x + rows / (rows.square().sum(1, keepdim=True).sqrt() + 1e-6)  # a norm by hand


def _in_place(x: Tensor) -> Tensor:
    y = x * 0
    y.sqrt_()  # in place
    return y + x


CASES: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "sqrt at 0": (lambda x: x + (x * 0).sqrt(), "SqrtBackward0", "(x * 0).sqrt()"),
    "where": (_where, "SqrtBackward0", "# the trap"),
    "negative where": (_negative_where, "SqrtBackward0", "# NaN that is selected away"),
    "acos at 1": (lambda x: x + torch.acos(x * 0 + 1), "AcosBackward0", "torch.acos("),
    "norm by hand": (_normalised, "SqrtBackward0", "# a norm by hand"),
    "power below 1": (lambda x: x + (x * 0) ** 0.5, "PowBackward0", "(x * 0) ** 0.5"),
    "log beside a where": (lambda x: torch.where(x > 9, (x * 0).log(), x), "LogBackward0", "(x * 0).log()"),
    "in place": (_in_place, "SqrtBackward0", "# in place"),
    "custom function": (BadBackward.apply, "aten.div", "return g / 0  # in a backward"),
    "tensor hook": (_tensor_hook, "aten.mul", "# the hook"),
    "checkpoint": (
        lambda x: checkpoint(lambda y: y + (y * 0).sqrt(), x, use_reentrant=False),
        "SqrtBackward0",
        "(y * 0).sqrt()",
    ),
    "re-entrant": (
        lambda x: checkpoint(lambda y: y + (y * 0).sqrt(), x, use_reentrant=True),
        "SqrtBackward0",
        "(y * 0).sqrt()",
    ),
    "overflow": (lambda x: x + (x - x.detach()) * 1e30 * 1e30, "MulBackward0", "* 1e30 * 1e30"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_node_its_line_and_its_module_are_named(name: str) -> None:
    function, op, text = CASES[name]
    found = trace(Net(function))
    cause = found.cause()
    assert cause is not None
    assert (cause.module, cause.direction, cause.op) == ("middle", "backward", op)
    assert cause.source is not None
    assert cause.source.startswith("test_backward_trace.py:")
    assert text in cause.source
    assert found.bad_parameters[:2] == ("first.linear.weight", "first.linear.bias")
    assert "last.linear.weight" not in found.bad_parameters


def test_a_function_that_pytorch_does_not_see_is_named() -> None:
    cause = trace(Net(Slipped.apply)).cause()
    assert cause is not None
    assert (cause.module, cause.direction) == ("middle", "backward")
    assert cause.source is not None
    assert "test_backward_trace.py" in cause.source


def test_a_norm_at_zero_is_no_fault() -> None:
    """PyTorch's own norm has the subgradient 0 there, although NaN comes up on the way."""
    assert trace(Net(lambda x: x + (x * 0).norm(dim=1, keepdim=True))).cause() is None


@pytest.mark.parametrize("kind", ["full", "pre", "parameter", "accumulated"])
def test_hooks_that_corrupt_are_named(kind: str) -> None:
    model = Net()
    bad = float("nan")
    linear = model.middle.linear
    if kind == "full":
        linear.register_full_backward_hook(lambda module, given, taken: (given[0] * bad,))  # a hook
    elif kind == "pre":
        linear.register_full_backward_pre_hook(lambda module, taken: (taken[0] * bad,))  # a hook
    elif kind == "parameter":
        linear.weight.register_hook(lambda g: g * bad)  # a hook
    else:
        linear.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad * bad))  # a hook
    found = trace(model)
    cause = found.cause()
    assert cause is not None
    assert cause.module == "middle.linear"
    assert cause.direction == ("backward" if kind in ("full", "pre") else "after backward")
    assert cause.source is not None
    assert cause.source.endswith("# a hook")
    if kind in ("parameter", "accumulated"):
        assert cause.parameter == "middle.linear.weight"
        assert found.bad_parameters == ("middle.linear.weight",)


def test_gradients_of_modules_are_those_that_arrive_at_their_outputs() -> None:
    model = Net()
    found = trace(model)
    outputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: outputs.update({name or "(root)": o}))
    loss = model(X).square().mean()
    names = list(outputs)
    truth = dict(zip(names, torch.autograd.grad(loss, list(outputs.values())), strict=True))
    assert {call.name for call in found.modules} == set(names)
    for call in found.modules:
        assert call.gradient_norm == pytest.approx(float(truth[call.name].norm()), rel=1e-5)
        assert call.gradient_bad == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_of_checkpointed_modules(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net.last, self.net.middle(self.net.first(x)), use_reentrant=reentrant)

    model = Checkpointed()
    plain = {f"net.{call.name}": call for call in trace(model.net).modules}
    found = trace(model).modules
    assert {"net.last.linear", "net.middle"} <= {call.name for call in found}
    assert [call.name for call in found].count("net.last.linear") == 1
    for call in found:
        if call.name in plain:
            assert call.gradient_norm == pytest.approx(plain[call.name].gradient_norm, rel=1e-5)


@pytest.mark.parametrize("size", [1e3, 1e4, 1e6])
@pytest.mark.parametrize("kind", ["full", "pre", "tensor", "parameter", "accumulated", "function"])
def test_where_a_gradient_was_multiplied_is_named(size: float, kind: str) -> None:
    class Swell(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * on[0]

    def hook(x: Tensor) -> None:
        x.register_hook(lambda g: g * size)

    on = [1.0]
    model = Net(Swell.apply)
    linear = model.middle.linear
    training, notes = _training(model)
    healthy = trace_backward(training, notes)
    assert first_backward_jump(healthy, healthy) is None
    if kind == "full":
        linear.register_full_backward_hook(lambda module, given, taken: (given[0] * size,))
    elif kind == "pre":
        linear.register_full_backward_pre_hook(lambda module, taken: (taken[0] * size,))
    elif kind == "tensor":
        linear.register_forward_hook(lambda module, given, output: hook(output))
    elif kind == "parameter":
        linear.weight.register_hook(lambda g: g * size)
    elif kind == "accumulated":
        linear.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad * size))
    else:
        on[0] = size
    jump = first_backward_jump(trace_backward(training, notes), healthy)
    assert jump is not None
    assert jump.cause.module == ("middle" if kind == "function" else "middle.linear")
    assert jump.growth == pytest.approx(size, rel=1e-3)


def test_a_term_that_grew_is_the_losses_own() -> None:
    model = Net()
    weight = [1.0]
    training = Training(model, lambda x: {"a": model(x).mean(), "b": model(x).square().sum() * weight[0]})
    notes = StepNotes(model, 0, X)
    healthy = trace_backward(training, notes)
    weight[0] = 1e4
    jump = first_backward_jump(trace_backward(training, notes), healthy)
    assert jump is not None
    assert jump.cause.module is None
    assert jump.cause.source is not None
    assert "weight[0]" in jump.cause.source


def test_a_backward_of_one_term() -> None:
    model = Net(lambda x: x + (x * 0).sqrt())
    training = Training(model, lambda x: {"a": model(x).sum(), "b": model.last(x).sum()})
    notes = StepNotes(model, 0, X)
    assert trace_backward(training, notes, terms=["b"]).cause() is None
    assert trace_backward(training, notes, terms=["a"]).cause() is not None


def test_batch_norm_over_equal_rows_is_where_the_gradient_grows() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, eps=1e-12), nn.Linear(4, 1))
    training = Training(model, lambda x: F.softplus(model(x)).mean())
    healthy = trace_backward(training, StepNotes(model, 0, torch.randn(16, 4)))
    alike = torch.ones(16, 4) + 1e-6 * torch.randn(16, 4)
    jump = first_backward_jump(trace_backward(training, StepNotes(model, 0, alike)), healthy)
    assert jump is not None
    assert jump.cause.module == "1"
    assert jump.cause.op == "NativeBatchNormBackward0"
    assert jump.growth > 1e4


def test_mixed_precision_is_unscaled() -> None:
    model = Net()
    training, notes = _training(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(1))
    scaled = Training(model, training.step, scaler=scaler)
    plain, found = trace_backward(training, notes), trace_backward(scaled, notes)
    assert found.gradients == pytest.approx(plain.gradients)
    assert found.accumulated == pytest.approx(plain.gradients)


def test_nothing_is_changed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    training = Training(model, lambda batch: model(batch).mean())
    notes = StepNotes(model, 0, X)
    training.backward(training.loss(X))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: value.clone() for name, value in training.gradients().items()}
    random = torch.get_rng_state()
    trace_backward(training, notes)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert all(torch.equal(value, gradients[name]) for name, value in training.gradients().items())
    assert torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
