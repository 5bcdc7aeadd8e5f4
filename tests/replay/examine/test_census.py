"""Each extreme that a forward can hold is seen, with its value, its module and its line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bifusion_diag.replay.examine.census import KINDS, evidence, take_census
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Training


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


X = torch.tensor([[3.0, 4.0], [6e-9, 8e-9], [-1.0, 2.0]])

#: What is done to X, the kind that it is seen as, and its value.
CASES: dict[str, tuple[Callable[[Tensor], Tensor], str, float]] = {
    "normalize": (lambda x: F.normalize(x, dim=1), "tiny norm", 1e-8),
    "normalize by hand": (lambda x: x / (x.norm(dim=1, keepdim=True) + 1e-12), "tiny norm", 1e-8),
    "cosine": (lambda x: F.cosine_similarity(x, x + 1), "tiny norm", 1e-8),
    "division": (lambda x: 1 / x.abs(), "denominator", 6e-9),
    "division by a count of nothing": (lambda x: x.sum() / (x > 9).sum(), "denominator", 0),
    "division by a number": (lambda x: x / 1e-9, "denominator", 1e-9),
    "log": (lambda x: (x + 1).log(), "log", 0.0),
    "log1p": (lambda x: x.log1p(), "log", 0.0),
    "sqrt": (lambda x: x.square().sum(1).sqrt(), "sqrt", 1e-16),
    "power": (lambda x: x.abs().pow(0.5), "power", 6e-9),
    "acos": (lambda x: (x / 4).clamp(-1, 1).acos(), "arc", 1.0),
    "exp": (lambda x: (30 * x).exp(), "exp", 120.0),
    "logits": (lambda x: (100 * x).softmax(1), "logits", 400.0),
    "cross-entropy": (lambda x: F.cross_entropy(100 * x, torch.tensor([0, 1, 1])), "logits", 400.0),
    "masked": (lambda x: x.masked_fill(x > 0, -torch.inf).softmax(1), "masked row", 2),
    "attention": (
        lambda x: F.scaled_dot_product_attention(
            x[None, None], x[None, None], x[None, None], torch.zeros(3, 3, dtype=torch.bool)
        ),
        "masked row",
        3,
    ),
    "mean of nothing": (lambda x: x[x > 9].mean(), "empty mean", 1),
    "binary cross-entropy of nothing": (
        lambda x: F.binary_cross_entropy_with_logits(x[:0], x[:0]),
        "empty mean",
        1,
    ),
    "cross-entropy of ignored targets": (
        lambda x: F.cross_entropy(x, torch.full((3,), -100)),
        "empty mean",
        1,
    ),
    "variance of one": (lambda x: torch.var(x[:, :1], dim=1), "variance of one", 3),
    "selection of nothing": (lambda x: x[x > 9], "empty selection", 1),
    "layer norm": (lambda x: F.layer_norm(x * torch.tensor([[1.0], [1], [0]]), (2,)), "layer norm variance", 0.0),
}


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("case", CASES)
def test_what_is_extreme_is_seen_where_it_is(case):
    """Tolerance: float32 sums."""
    function, kind, value = CASES[case]
    model = nn.Sequential(nn.Identity(), Apply(function))
    training = Training(model, lambda x: model(x.requires_grad_()).sum())
    census = take_census(training, StepNotes(model, 0, X))
    sight = census[kind]
    assert sight.value == pytest.approx(value, rel=1e-4, abs=1e-8)
    assert sight.alarming
    assert sight.module == "1"
    assert sight.source is not None
    assert sight.source.startswith("test_census.py:")
    found = evidence(census)[KINDS[kind].meaning]
    assert found == f"{sight.value:.4g} in 1 ({sight.source})"
    assert KINDS[kind].meaning not in evidence(census, census)  # a healthy step has as much of it


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_tells_how_few_values_its_statistics_are_of(affine):
    x = torch.tensor([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    model = nn.Sequential(nn.BatchNorm1d(2, affine=affine))
    training = Training(model, lambda x: model(x.requires_grad_()).sum())
    census = take_census(training, StepNotes(model, 0, x))
    assert (census["batch norm rows"].value, census["batch norm rows"].module) == (3, "0")
    assert census["batch norm variance"].value == pytest.approx(0.0, abs=1e-9)
    assert census["batch norm variance"].alarming
    model.eval()
    assert "batch norm rows" not in take_census(training, StepNotes(model, 0, x))


def test_an_ordinary_step_has_no_evidence_and_nothing_is_changed():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    model = nn.Sequential(nn.Conv1d(4, 16, 3, padding=1), nn.BatchNorm1d(16), nn.Flatten(2), layer, nn.Linear(16, 3))
    model[2] = Apply(lambda x: x.transpose(1, 2))
    training = Training(model, lambda b: F.cross_entropy(F.normalize(model(b[0]), dim=2).mean(1), b[1]))
    notes = StepNotes(model, 0, (torch.randn(8, 4, 10), torch.randint(3, (8,))))
    state, buffers = torch.get_rng_state(), {name: b.clone() for name, b in model.named_buffers()}
    census = take_census(training, notes)
    assert {"tiny norm", "logits", "batch norm rows", "layer norm variance"} <= set(census)
    assert evidence(census) == {}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffers[name], b) for name, b in model.named_buffers())


def test_of_a_step_that_raises_what_came_before_is_known():
    model = nn.Sequential(Apply(lambda x: x.log()), nn.Linear(5, 1))
    census = take_census(Training(model, lambda x: model(x).sum()), StepNotes(model, 0, torch.ones(2, 3)))
    assert census["log"].value == 1.0
