"""The benchmark measures what it says."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from benchmarks.median import interval
from benchmarks.overhead import BARE, PRICED_APART, Workload, measure, show, ways_to_watch


def workload() -> Workload:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = model(batch)
        terms = {"square": out.square().mean(), "size": out.abs().mean()}
        return terms["square"] + terms["size"], terms

    return Workload(model, torch.optim.AdamW(model.parameters()), torch.randn(4, 8), forward)


def test_every_way_of_ours_is_timed_while_it_measures(capsys: pytest.CaptureFixture[str]) -> None:
    names = (*BARE, "grads+losses", "all", PRICED_APART, "naive", "anomaly")
    work, known = workload(), ways_to_watch()
    result = measure(work, "tiny", {name: known[name] for name in names}, rounds=2)
    for name, cost in result.costs.items():
        assert len(cost.cpu) == len(cost.clock) == 2
        assert min(cost.cpu) > 0
        assert (cost.numbers > 0, cost.write_seconds > 0) == (
            (name not in BARE and name not in ("naive", "anomaly")),
        ) * 2
    assert result.costs["all"].numbers > result.costs["grads+losses"].numbers
    assert not any(module._forward_hooks for module in work.model.modules())
    show(result)
    table = capsys.readouterr().out
    assert "range" in table
    assert "95 %" not in table


def test_the_probe_that_is_priced_apart_measures_at_the_step_that_is_timed() -> None:
    work = workload()
    steps = []
    for _ in range(2):
        with ways_to_watch()[PRICED_APART](work) as monitor:
            assert monitor is not None
            for _ in range(2):
                work.step(monitor)
            monitor.end_step()
            assert "loss_gradients/cosine/square/size" in monitor.latest()
    way = ways_to_watch()["all"]
    for _ in range(3):
        with way(work) as monitor:
            assert monitor is not None
            work.step(monitor)
            steps.append(monitor._number)
    assert steps == [0, 1, 2]


@pytest.mark.parametrize("n", [6, 9, 12])
def test_the_interval_holds_the_median_in_95_of_100_cases_and_a_smaller_one_does_not(n: int) -> None:
    """Every value lies below or above the median with probability one half: all 2^n cases are counted."""
    low, high = interval(range(n))

    def share(low: int, high: int) -> float:
        below = [sum(case) for case in itertools.product((0, 1), repeat=n)]
        return sum(low < count <= high for count in below) / len(below)

    assert share(int(low), int(high)) >= 0.95 > share(int(low) + 1, int(high) - 1)
