"""Bad values followed from the operation that made them, through views, copies, in-place writes and selections."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from bifusion_diag.replay.examine.origin import Leaf, OpWatch, inputs_of, leaves_of, storage_of


@contextmanager
def watch() -> Iterator[OpWatch]:
    seen = OpWatch(nn.Module(), {})
    with seen.watching():
        yield seen


def test_bad_values_are_followed_through_views_copies_and_writes() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    with watch() as seen:
        logs = x.log()  # of 0
        moved = logs.T[:2].clone().reshape(-1) + 1
        target = torch.zeros(8)
        target[2:] = moved[:6]
        other = (x * 0 - 1).sqrt()
        both = torch.cat([other, logs])
        selected = torch.where(logs.isfinite(), logs, 0.0)
        cleaned = torch.nan_to_num(other)
    assert [origin.op for origin in seen.origins] == ["aten.log", "aten.sqrt"]
    for tensor in (logs, moved, target):
        assert [origin.op for origin in seen.origins_of(tensor)] == ["aten.log"]
    assert [origin.op for origin in seen.origins_of(both)] == ["aten.log", "aten.sqrt"]
    assert not seen.origins_of(selected)
    assert not seen.origins_of(cleaned)
    log, root = seen.origins
    assert (log.nan, log.bad, log.arguments[0].low, log.arguments[0].least) == (False, 1, 0, 0)
    assert (root.nan, root.bad, root.arguments[0].high) == (True, 12, -1)
    assert log.source is not None
    assert log.source.endswith("logs = x.log()  # of 0")


def test_memory_that_is_overwritten_is_clean_again() -> None:
    with watch() as seen:
        x = torch.ones(4)
        x.sub_(1).log_()
        x.zero_()
        y = x + 1
        y.div_(0)
        y.log_()
    assert [origin.op for origin in seen.origins] == ["aten.log_", "aten.div_"]
    assert not torch.isfinite(y).any()
    assert [origin.op for origin in seen.origins_of(y)] == ["aten.div_"]


def test_memory_that_was_never_written_is_no_origin() -> None:
    with watch() as seen:
        x = torch.empty(64)
        x.fill_(1.0)
        x.sum()
    assert not seen.origins


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.masked_fill(x > 1, -math.inf),
        lambda x: torch.where(x > 1, -math.inf, x),
        lambda x: x.index_fill(0, torch.tensor([1]), -math.inf),
        lambda x: x + torch.full((3,), -math.inf),
        lambda x: x + torch.tensor([0.0, -math.inf, 0.0]),
        lambda x: x + (x < 1).float().log(),
        lambda x: x + torch.full((3, 3), -math.inf).triu(1),
    ],
)
def test_infinities_that_are_written_are_meant(write: object) -> None:
    assert callable(write)
    x = torch.arange(3.0)
    with watch() as seen:
        y = write(x)
    assert seen.origins
    assert all(origin.written for origin in seen.origins)
    assert seen.origins_of(y)[0].written


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.index_fill(0, torch.tensor([1]), math.inf),
        lambda x: x.masked_fill(x > 1, math.inf),
        lambda x: x.clone().index_put_((torch.tensor([1]),), torch.tensor(math.inf)),
    ],
)
def test_infinities_above_zero_are_no_mask(write: object) -> None:
    assert callable(write)
    x = torch.arange(3.0)
    with watch() as seen:
        y = write(x).log_softmax(0)
    (origin,) = seen.origins_of(y)
    assert (origin.written, origin.nan) == (False, False)
    assert origin.op != "aten._log_softmax"


def test_a_cast_that_overflows_is_not_meant() -> None:
    with watch() as seen:
        y = torch.full((3,), 1e6).half()
    assert [(origin.op, origin.written) for origin in seen.origins_of(y)] == [("aten._to_copy", False)]


def test_averages_that_batch_norm_changes_are_no_inputs() -> None:
    """A variance that overflows makes them infinite in the operation that makes the output so."""
    model = nn.BatchNorm1d(2)
    seen = OpWatch(model, {})
    with seen.watching():
        y = model(torch.tensor([[1e30, 1.0], [-1e30, 2.0]])) * torch.tensor([math.inf, 1.0])
    assert not model.running_var.isfinite().all()
    assert {origin.parameter for origin in seen.origins_of(y)} == {None}
    assert "aten.native_batch_norm" in {origin.op for origin in seen.origins}


def test_what_was_made_comes_before_what_was_meant() -> None:
    x = torch.arange(3.0)
    with watch() as seen:
        masked = x.masked_fill(x > 1, -math.inf)
        y = masked + (x * 0 - 1).log()
    assert [(origin.op, origin.written) for origin in seen.origins_of(y)] == [
        ("aten.log", False),
        ("aten.masked_fill", True),
    ]


def test_leaves_and_inputs_are_named() -> None:
    model = nn.Sequential(OrderedDict(norm=nn.BatchNorm1d(3), wrapped=nn.Sequential(nn.Linear(3, 3))))
    model.wrapped.table = torch.full((3,), torch.nan)
    batch = {"image": torch.ones(2, 3), "targets": [{"boxes": torch.full((1, 3), torch.nan)}]}
    inputs = inputs_of(batch)
    assert {name: len(tensors) for name, tensors in inputs.items()} == {"image": 1, "targets.boxes": 1}
    leaves = leaves_of(model, inputs)
    assert leaves[storage_of(model.norm.running_mean)] == Leaf("norm.running_mean", "norm", "buffer")
    assert leaves[storage_of(model.wrapped[0].weight)] == Leaf("wrapped.0.weight", "wrapped.0", "parameter")
    seen = OpWatch(model, inputs)
    with seen.watching():
        one = batch["targets"][0]["boxes"][:, :2] + 1
        two = model.wrapped.table * 2
    assert seen.origins_of(one)[0].parameter == "targets.boxes"
    assert seen.origins_of(one)[0].direction == "data"
    assert seen.origins_of(two)[0].parameter == "wrapped.table"


def test_its_own_measurements_are_not_seen() -> None:
    with watch() as seen, seen.quiet():
        x = torch.zeros(3).log()
    assert not seen.origins
    assert not seen.origins_of(x)


def test_results_are_the_same_to_the_bit() -> None:
    def compute(x: Tensor) -> Tensor:
        layer = nn.Linear(8, 8)
        y = torch.dropout(layer(x), 0.5, True).softmax(1)
        y.square().sum().backward()
        assert layer.weight.grad is not None
        return torch.cat([y.detach(), layer.weight.grad])

    x = torch.randn(8, 8)
    torch.manual_seed(3)
    plain = compute(x)
    torch.manual_seed(3)
    with watch():
        watched = compute(x)
    assert torch.equal(plain, watched)
