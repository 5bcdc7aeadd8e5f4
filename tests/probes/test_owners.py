"""Who owns what, and sums by owner."""

from __future__ import annotations

import math

import torch
from torch import nn

from bifusion_diag.probes.owners import Slots, owners_of


def test_owners() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 3, bias=False)))
    model[2][0].weight = nn.Parameter(torch.ones(3, 3))
    names, parameters, slots = owners_of(model)
    assert names == ("0", "2.0")
    assert [tuple(p.shape) for p in parameters] == [(3, 2), (3,), (3, 3)]
    assert slots == (0, 0, 1)
    assert owners_of(model, ["2.*"]).names == ("2.0",)


def test_numbers_by_slot() -> None:
    slots, values = [2, 0, 2], torch.tensor([3.0, math.inf, 4.0])
    summing = Slots()
    assert summing.sum(values, slots, 3).tolist() == [math.inf, 0.0, 7.0]
    assert summing.root_sum_squares(values, slots, 3).tolist() == [math.inf, 0.0, 5.0]
    least = summing.extreme(values, slots, 3, "amin").tolist()
    assert (least[0], math.isnan(least[1]), least[2]) == (math.inf, True, 3.0)
    assert summing.extreme(torch.tensor([math.nan, 1.0, 5.0]), slots, 3, "amax").isnan().tolist() == [False, True, True]
    assert summing.constant([1, 2], torch.device("cpu")) is summing.constant((1, 2), torch.device("cpu"))
    assert summing.constant([math.nan], torch.device("cpu"), torch.float64).isnan().all()
