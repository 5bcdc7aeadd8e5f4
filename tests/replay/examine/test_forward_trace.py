"""Where NaN and infinite values of a forward are said to come from, in models whose fault is known by construction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bifusion_diag.replay.examine.forward_trace import ForwardTrace, first_forward_jump, trace_forward
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Training

X = torch.linspace(-1, 1, 32).reshape(8, 4)


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.9)  # nothing saturates: a bad value arrives at the loss


class Part(nn.Module):
    """A linear layer and one function of its output."""

    def __init__(self, function: Callable[[Tensor], Tensor] = _leaky) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


class Net(nn.Module):
    """Three parts, the middle one of which is at fault."""

    def __init__(self, function: Callable[[Tensor], Tensor] = _leaky) -> None:
        super().__init__()
        self.first, self.middle, self.last = Part(), Part(function), Part()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


def trace(
    model: nn.Module, batch: Any = X, loss: Callable[[Tensor], Any] = lambda y: y.square().mean()
) -> ForwardTrace:
    return trace_forward(Training(model, lambda given: loss(model(given))), StepNotes(model, 0, batch))


class NumpyLog(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with np.errstate(all="ignore"):
            return torch.from_numpy(np.log(x.detach().numpy() * 0))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class LogZero(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x * 0
        return y.log() - 1  # here it goes wrong

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def _in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y.mul_(0).log_()  # in place
    return y


def _masked_row(x: Tensor) -> Tensor:
    mask = torch.zeros(len(x), 1, dtype=torch.bool)
    mask[2] = True
    scores = x.masked_fill(mask, float("-inf"))
    return torch.softmax(scores, 1)  # row 2 has nothing left


def _log_mask(x: Tensor) -> Tensor:
    keep = (torch.arange(len(x)) != 3)[:, None].float()
    scores = x + keep.log()
    return scores.softmax(1)  # row 3 has nothing left


def _written(x: Tensor) -> Tensor:
    y = x.clone()
    y[1, 2] = float("nan")  # written
    return y


CASES: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "log of 0": (lambda x: torch.log(x.clamp(max=0) * 0), "aten.log", "torch.log("),
    "log of less": (lambda x: torch.log(x - 10), "aten.log", "torch.log("),
    "0 * inf": (lambda x: x.mul(0) * torch.full((4,), torch.inf), "aten.mul", "x.mul(0) *"),
    "inf - inf": (lambda x: (x * 0 + 100).exp() - (x * 0 + 99).exp(), "aten.exp", "99).exp()"),
    "x / 0": (lambda x: x / (x - x), "aten.div", "x / (x - x)"),
    "exp overflows": (lambda x: torch.exp(x * 0 + 200), "aten.exp", "torch.exp("),
    "half overflows": (lambda x: ((x.half() * 0 + 6e4) * 2).float(), "aten.mul", "6e4) * 2"),
    "cast overflows": (lambda x: (x * 0 + 1e6).half().float(), "aten._to_copy", ".half().float()"),
    "fully masked row": (_masked_row, "aten._softmax", "# row 2 has nothing left"),
    "logarithm of a mask": (_log_mask, "aten._softmax", "# row 3 has nothing left"),
    "mean of nothing": (lambda x: x + x[x > 1e9].mean(), "aten.mean", "x[x > 1e9].mean()"),
    "acos beyond 1": (lambda x: torch.acos(x.abs() + 2), "aten.acos", "torch.acos("),
    "power of less": (lambda x: (x.abs() + 1).neg() ** 0.5, "aten.pow", ".neg() ** 0.5"),
    "sqrt of less": (lambda x: (x.abs() + 1).neg().sqrt(), "aten.sqrt", ".neg().sqrt()"),
    "in place": (_in_place, "aten.log_", "# in place"),
    "custom function": (LogZero.apply, "aten.log", "# here it goes wrong"),
    "written": (_written, "aten.fill_", "# written"),
    "checkpoint": (lambda x: checkpoint(lambda y: (y - y).log(), x, use_reentrant=False), "aten.log", "(y - y).log()"),
    "re-entrant": (lambda x: checkpoint(lambda y: (y - y).log(), x, use_reentrant=True), "aten.log", "(y - y).log()"),
    "norm of 0, divided": (lambda x: x / (x * 0).norm(dim=1, keepdim=True), "aten.div", "keepdim=True)"),
    "no gradient": (lambda x: x + torch.no_grad()(torch.log)(x.detach() * 0), "aten.log", "no_grad()(torch.log)"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_operation_its_line_and_its_module_are_named(name: str) -> None:
    function, op, text = CASES[name]
    found = trace(Net(function)).cause()
    assert found is not None
    assert (found.module, found.direction, found.op) == ("middle", "forward", op)
    assert found.source is not None
    assert found.source.startswith("test_forward_trace.py:")
    assert text in found.source


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_found_where_the_same_operations_do_no_harm(name: str) -> None:
    """Bad values that are selected away reach no loss."""
    function, _, _ = CASES[name]
    found = trace(Net(lambda x: torch.where(torch.tensor(True), x, function(x).float())))
    assert found.cause() is None
    assert not found.bad_terms


def test_a_part_that_pytorch_never_sees_is_named_by_its_module() -> None:
    found = trace(Net(NumpyLog.apply))
    assert found.bad_module is not None
    assert found.bad_module.name == "middle"
    cause = found.cause()
    assert cause is not None
    assert cause.module == "middle"
    assert cause.source is not None
    assert "test_forward_trace.py" in cause.source


def test_masks_are_no_fault() -> None:
    def attend(x: Tensor) -> Tensor:
        scores = (x @ x.T).masked_fill(torch.ones(8, 8).triu(1).bool(), float("-inf"))
        scores = scores + torch.full((8, 8), float("-inf")).triu(1)
        return scores.softmax(1) @ x

    assert trace(Net(attend)).cause() is None
    model = Net(lambda x: ((x @ x.T + model.mask).softmax(1) @ x) * torch.where(x > 9, x, 1.0))
    model.register_buffer("mask", torch.full((8, 8), float("-inf")).triu(1))
    assert trace(model).cause() is None
    model.mask[5] = float("-inf")
    found = trace(model).cause()
    assert found is not None
    assert (found.module, found.op) == ("middle", "aten._softmax")


def test_a_bad_weight_buffer_or_input_is_the_cause_itself() -> None:
    model = Net()
    model.middle.register_buffer("scale", torch.ones(4))
    model.middle.function = lambda x: x * model.middle.scale
    model.middle.scale[1] = float("nan")
    found = trace(model).cause()
    assert found is not None
    assert (found.module, found.direction, found.parameter, found.op) == ("middle", "update", "middle.scale", None)
    model.middle.scale.fill_(1)
    with torch.no_grad():
        model.last.linear.weight[0, 0] = float("inf")
    found = trace(model).cause()
    assert found is not None
    assert (found.module, found.direction, found.parameter) == ("last.linear", "update", "last.linear.weight")
    bad = X.clone()
    bad[3, 1] = float("nan")
    model = Net()
    training = Training(model, lambda batch: model(batch["views"][0]["image"].double().float()).sum())
    found = trace_forward(training, StepNotes(model, 0, {"views": [{"image": bad}]})).cause()
    assert found is not None
    assert (found.module, found.direction, found.parameter) == (None, "data", "views.image")


def test_a_bad_array_of_the_batch_is_the_cause() -> None:
    model = Net()
    bad = np.ones((2, 4), np.float32)
    bad[1, 1] = -np.inf
    training = Training(model, lambda batch: model(torch.tensor(batch["points"])).sum())
    found = trace_forward(training, StepNotes(model, 0, {"points": bad})).cause()
    assert found is not None
    assert (found.direction, found.parameter) == ("data", "points")


def test_a_hook_that_corrupts_is_named_by_its_module_and_line() -> None:
    model = Net()

    def corrupt(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output / 0  # by a hook

    model.middle.linear.register_forward_hook(corrupt)
    found = trace(model).cause()
    assert found is not None
    assert (found.module, found.op) == ("middle.linear", "aten.div")
    assert found.source is not None
    assert found.source.endswith("return output / 0  # by a hook")
    model = Net()
    model.last.register_forward_pre_hook(lambda module, inputs: (inputs[0] * float("nan"),))
    found = trace(model).cause()
    assert found is not None
    assert (found.module, found.op) == ("last", "aten.mul")


class Pair(NamedTuple):
    one: Tensor
    other: dict[str, Tensor]


def test_infinities_that_were_written_are_to_blame_for_nan_elsewhere() -> None:
    """BatchNorm makes NaN of them, also of its own averages, and only a mask may hold them."""
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Conv1d(4, 1, 1))
    model[0].register_forward_hook(lambda m, i, y: y.index_fill(1, torch.tensor([2]), float("inf")))  # filled
    found = trace(model, torch.randn(4, 1, 9), loss=lambda y: (y + 1).softmax(1).square().mean()).cause()
    assert found is not None
    assert found.module == "0"
    assert found.source is not None
    assert found.source.endswith("# filled")


def test_of_an_overflow_it_is_told_where_the_numbers_grew() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.keys = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return (self.queries(x) @ self.keys(x).T).softmax(1) @ x

    model = Attention()
    swell = model.queries.register_forward_hook(lambda m, i, y: y * 1e25)
    model.keys.register_forward_hook(lambda m, i, y: y * 1e14)
    found = trace(model)
    origin, cause = found.origin(), found.cause()
    assert origin is not None
    assert (origin.module, origin.op) == ("(root)", "aten.mm")
    assert cause is not None
    assert (cause.module, cause.op) == ("queries", "aten.mul")
    swell.remove()
    assert trace(model).cause() is None
    large = X.clone()
    large[2, 2] = 1e30
    training = Training(model, lambda batch: model(batch["x"]).sum())
    cause = trace_forward(training, StepNotes(model, 0, {"x": large})).cause()
    assert cause is not None
    assert (cause.direction, cause.parameter) == ("data", "x")


def test_a_hook_that_pytorch_does_not_see_is_named_by_its_definition() -> None:
    model = Net()

    def corrupt(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.detach().numpy()[2] = np.nan

    model.middle.linear.register_forward_hook(corrupt)
    found = trace(model).cause()
    assert found is not None
    assert (found.module, found.op) == ("middle.linear", None)
    assert found.source is not None
    assert "def corrupt" in found.source


def test_named_tuples_dicts_and_sparse_outputs() -> None:
    class Many(nn.Module):
        def forward(self, x: Tensor) -> Pair:
            sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), x[:2], (3, 4), check_invariants=False)
            return Pair(x, {"sparse": sparse, "log": (x - x).log()})

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.many = nn.Linear(4, 4), Many()

        def forward(self, x: Tensor) -> Tensor:
            pair = self.many(self.layer(x))
            return pair.one.sum() + pair.other["sparse"].to_dense().sum() + pair.other["log"].sum()

    found = trace(Model(), loss=lambda y: y)
    cause = found.cause()
    assert cause is not None
    assert (cause.module, cause.op) == ("many", "aten.log")
    assert found.bad_module is not None
    assert found.bad_module.name == "many"
    assert found.bad_module.output_bad == 32
    assert [call.name for call in found.modules] == ["layer", "many", "(root)"]


def test_the_loss_outside_of_modules_and_its_terms() -> None:
    def loss(y: Tensor) -> dict[str, Tensor]:
        return {
            "fine": y.square().mean(),
            "empty": F.cross_entropy(y, torch.full((8,), -100)),  # nothing to learn
            "root": (y * 0 - 1).sqrt().mean(),
        }

    found = trace(Net(), loss=loss)
    assert found.bad_terms == ("empty", "root")
    empty, root = found.cause("empty"), found.cause("root")
    assert empty is not None
    assert (empty.module, empty.direction, empty.op) == (None, "loss", "aten.nll_loss_forward")
    assert empty.source is not None
    assert empty.source.endswith("# nothing to learn")
    assert root is not None
    assert root.op == "aten.sqrt"
    assert found.cause("fine") is None
    origin = found.origin("root")
    assert origin is not None
    assert origin.arguments[0].high == -1


def test_shared_and_nested_modules() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Part(lambda x: torch.log(x + 1e6))
            self.again = self.block

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.block(x) * 0 - 1e9)

    found = trace(Shared())
    assert [call.name for call in found.modules if call.name == "block"] == ["block", "block"]
    cause = found.cause()
    assert cause is not None
    assert (cause.module, cause.op) == ("block", "aten.log")


def test_an_error_is_told_where_it_was_raised() -> None:
    found = trace(Net(lambda x: x @ x))
    cause = found.cause()
    assert cause is not None
    assert (cause.module, cause.op) == ("middle", "RuntimeError")
    assert cause.source is not None
    assert "lambda x: x @ x" in cause.source


def test_an_error_that_the_model_catches_leaves_nothing_behind() -> None:
    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.other = Part(lambda x: x @ x), Part(lambda x: (x - x).log())

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.part(x)
            except RuntimeError:
                return self.other(x)

    cause = trace(Catches()).cause()
    assert cause is not None
    assert (cause.module, cause.op) == ("other", "aten.log")


@pytest.mark.parametrize("size", [1e3, 1e4, 1e6])
@pytest.mark.parametrize("where", ["first", "middle.linear", "last"])
def test_what_was_multiplied_is_named(size: float, where: str) -> None:
    model = Net()
    notes = StepNotes(model, 0, X)
    training = Training(model, lambda batch: model(batch).square().mean())
    healthy = trace_forward(training, notes)
    assert first_forward_jump(healthy, healthy) is None

    def swell(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * size  # swollen

    handle = model.get_submodule(where).register_forward_hook(swell)
    jump = first_forward_jump(trace_forward(training, notes), healthy)
    assert jump is not None
    assert (jump.cause.module, jump.cause.op) == (where, "aten.mul")
    assert jump.cause.source is not None
    assert jump.cause.source.endswith("# swollen")
    assert jump.growth == pytest.approx(size, rel=1e-3)
    handle.remove()


def test_a_large_input_is_no_modules_fault() -> None:
    model = Net()
    training = Training(model, lambda batch: model(batch["x"]).square().mean())
    healthy = trace_forward(training, StepNotes(model, 0, {"x": X}))
    large = X.clone()
    large[4] *= 1e4
    jump = first_forward_jump(trace_forward(training, StepNotes(model, 0, {"x": large})), healthy)
    assert jump is not None
    assert (jump.cause.direction, jump.cause.parameter) == ("data", "x")
    assert jump.ratio == pytest.approx(float(large.abs().max() / X.abs().max()), rel=1e-5)


def test_nothing_is_changed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    training = Training(model, lambda batch: model(batch).mean())
    notes = StepNotes(model, 0, X)
    training.backward(training.loss(X))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: value.clone() for name, value in training.gradients().items()}
    random = torch.get_rng_state()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    found = trace_forward(training, notes)
    assert found.total == pytest.approx(float(_again(training, notes)))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert all(torch.equal(value, gradients[name]) for name, value in training.gradients().items())
    assert torch.equal(random, torch.get_rng_state())
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def _again(training: Training, notes: StepNotes) -> Tensor:
    with notes.again() as batch:
        total = training.loss(batch).total
        assert total is not None
        return total.detach()
