"""Why a module gets no gradient, in models whose cut is known by construction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bifusion_diag.errors import UserError
from bifusion_diag.replay.examine.gradient_end import where_gradient_ends
from bifusion_diag.replay.incident import Cause
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Training

X = torch.linspace(-1, 1, 32).reshape(8, 4)


class Net(nn.Module):
    """An encoder, of which a head sees only what a function lets through, beside a branch that always learns."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.beside, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.encoder(x)) + self.beside(x))


def _training(model: nn.Module) -> tuple[Training, StepNotes]:
    return Training(model, lambda given: model(given).square().mean()), StepNotes(model, 0, X)


def ends(between: Callable[[Tensor], Tensor], module: str = "encoder.0") -> Cause | None:
    return where_gradient_ends(*_training(Net(between)), module)


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Nothing(Identity):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return None


class Zero(Identity):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 0  # in a backward


def _new_tensor(x: Tensor) -> Tensor:
    return torch.from_numpy(x.detach().numpy().copy())  # to numpy


def _filled(x: Tensor) -> Tensor:
    y = torch.zeros(8, 4)
    y[:, 1:] = x.detach()[:, 1:]  # filled
    return y


def _block(x: Tensor) -> Tensor:
    y = x * 2
    with torch.no_grad():  # the block
        y = y + 1
        return torch.tanh(y)


@torch.no_grad()  # the decorator
def _decorated(x: Tensor) -> Tensor:
    return torch.tanh(x)


def _hooked(x: Tensor) -> Tensor:
    y = x * 2
    y.register_hook(lambda g: torch.zeros_like(g))  # the hook
    return y


CUTS: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "detach": (lambda x: x.detach() * 2, "Tensor.detach", "x.detach() * 2"),
    "data": (lambda x: x.data * 2, "Tensor.data", "x.data * 2"),
    "numpy": (_new_tensor, "Tensor.detach", "# to numpy"),
    "filled": (_filled, "Tensor.detach", "# filled"),
    "sign": (lambda x: (x > 0).float(), "Tensor.gt", "(x > 0).float()"),
    "argmax": (lambda x: x.argmax(1, keepdim=True).float(), "Tensor.argmax", "x.argmax("),
    "block": (_block, "no_grad", "with torch.no_grad():  # the block"),
    "decorator": (_decorated, "no_grad", "# the decorator"),
    "custom function before it": (lambda x: Identity.apply(x).detach(), "Tensor.detach", "Identity.apply(x).detach()"),
    "checkpoint": (
        lambda x: checkpoint(lambda y: (y * 2).detach(), x, use_reentrant=False),
        "Tensor.detach",
        "(y * 2).detach()",
    ),
}


@pytest.mark.parametrize("name", CUTS)
def test_what_cuts_the_graph_is_named(name: str) -> None:
    between, op, text = CUTS[name]
    for module in ("encoder.0", "encoder.1", "encoder"):
        found = ends(between, module)
        assert found is not None
        assert (found.module, found.direction, found.op) == ("(root)", "graph", op)
        assert found.source is not None
        assert found.source.startswith("test_gradient_end.py:")
        assert text in found.source
    assert ends(between, "head") is None
    assert ends(between, "beside") is None


ZEROS: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "dead relu": (lambda x: (x - 1e3).relu(), "ReluBackward0", "(x - 1e3).relu()"),
    "times 0": (lambda x: x * 2 * 0.0, "MulBackward0", "x * 2 * 0.0"),
    "saturated": (lambda x: torch.sigmoid(x * 1e3 + 1e5), "SigmoidBackward0", "torch.sigmoid("),
    "clamped": (lambda x: x.clamp(10, 11), "ClampBackward1", "x.clamp(10, 11)"),
    "rounded": (lambda x: x.round(), "RoundBackward0", "x.round()"),
    "selected away": (lambda x: torch.where(x > 1e3, x, 1.0), "WhereBackward0", "torch.where("),
    "hook": (_hooked, "hook on the gradient before MulBackward0", "# the hook"),
    "function": (Zero.apply, "ZeroBackward", "# in a backward"),
    "function without": (Nothing.apply, "NothingBackward", "def backward"),
    "mask by a power of 0": (lambda x: (x * 0) ** 2, "PowBackward0", "(x * 0) ** 2"),
}


@pytest.mark.parametrize("name", ZEROS)
def test_where_a_gradient_becomes_zero_is_named(name: str) -> None:
    between, op, text = ZEROS[name]
    found = ends(between)
    assert found is not None
    assert (found.module, found.direction, found.op) == ("(root)", "backward", op)
    assert found.source is not None
    assert text in found.source or name == "function without"
    assert ends(between, "beside") is None


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x * 2,
        Identity.apply,
        lambda x: x.detach() + x,
        lambda x: checkpoint(torch.tanh, x, use_reentrant=True),
    ],
)
def test_a_module_that_learns_has_no_end(between: Callable[[Tensor], Tensor]) -> None:
    assert ends(between) is None


def test_parameters_that_are_frozen_and_modules_that_are_not_used() -> None:
    model = Net(torch.tanh)
    model.encoder.requires_grad_(False)
    training, notes = _training(model)
    assert where_gradient_ends(training, notes, "encoder.1") == Cause(
        "encoder.1", "graph", "requires_grad=False", None, "encoder.1.weight"
    )
    model = Net(lambda x: x[0:0].sum())  # nothing is selected
    found = where_gradient_ends(*_training(model), "encoder.1")
    assert found is not None
    assert found.direction == "backward"
    model = Net(torch.tanh)
    unused = Training(model, lambda x: (model.encoder(x), model.head(model.beside(x)).mean())[1])
    assert where_gradient_ends(unused, StepNotes(model, 0, X), "encoder.1") == Cause("encoder.1", "graph", "unused")
    without = Training(model, lambda x: model.head(model.beside(x)).mean())
    assert where_gradient_ends(without, StepNotes(model, 0, X), "encoder.1") == Cause("encoder.1", "graph", "not run")


def test_a_module_without_grad_around_its_call() -> None:
    model = Net(torch.tanh)

    def step(x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # around the call
            features = model.encoder(x)
        return model.head(features + model.beside(x)).mean()

    found = where_gradient_ends(Training(model, step), StepNotes(model, 0, X), "encoder.1")
    assert found is not None
    assert (found.module, found.direction, found.op) == ("encoder.1", "graph", "no_grad")
    assert found.source is not None
    assert found.source.endswith("# around the call")


def test_a_forward_hook_that_detaches_is_the_modules() -> None:
    model = Net(torch.tanh)
    model.encoder[1].register_forward_hook(lambda module, given, output: output.detach())  # detached here
    found = where_gradient_ends(*_training(model), "encoder.0")
    assert found is not None
    assert (found.module, found.op) == ("encoder.1", "Tensor.detach")
    assert found.source is not None
    assert found.source.endswith("# detached here")


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_whose_inputs_need_no_gradient() -> None:
    model = Net(torch.tanh)
    model.encoder.forward = lambda x: checkpoint(model.encoder[1], model.encoder[0](x), use_reentrant=True)
    assert where_gradient_ends(*_training(model), "encoder.1") is None
    model.encoder.forward = lambda x: checkpoint(model.encoder[0], x, use_reentrant=True)  # the checkpoint
    found = where_gradient_ends(*_training(model), "encoder.0")
    assert found is not None
    assert (found.module, found.direction, found.op) == ("encoder.0", "graph", "checkpoint")
    assert found.source is not None
    assert found.source.endswith("# the checkpoint")


def test_a_hook_goes_before_a_sum_over_nothing() -> None:
    class Both(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.encoder(x)
            nothing = hidden[:0].sum()  # a loss over no element, as of a batch without such points
            hidden.register_hook(lambda g: g * 0)
            return self.head(hidden + self.beside(x)) + nothing

    found = where_gradient_ends(*_training(Both(lambda x: x)), "encoder.0")
    assert found is not None
    assert found.direction == "backward"
    assert "hook" in (found.op or "")


def test_hooks_on_a_parameter() -> None:
    model = Net(torch.tanh)
    for parameter in model.head.parameters():
        parameter.register_hook(lambda g: g * 0)  # no more
    found = where_gradient_ends(*_training(model), "head")
    assert found is not None
    assert (found.module, found.direction) == ("head", "after backward")
    assert found.parameter in ("head.weight", "head.bias")
    model = Net(torch.tanh)
    for parameter in model.head.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    found = where_gradient_ends(*_training(model), "head")
    assert found is not None
    assert (found.module, found.direction) == ("head", "after backward")


def test_an_unknown_module_is_the_users_error() -> None:
    with pytest.raises(UserError, match=r"no module 'encoder\.7'"):
        ends(torch.tanh, "encoder.7")
