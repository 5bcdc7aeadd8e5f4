"""Rules of updates, clipping and mixed precision."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from rule_runs import CLASSES, FEATURES, classifier, cross_entropy, found, look, train
from torch import Tensor, nn

from bifusion_diag.diagnosis import NotMeasured
from bifusion_diag.record.schema import Run

UPDATES = ("grads", "updates", "weights", "losses")


def test_a_rate_that_replaces_the_weights_is_told_with_a_smaller_one(healthy: Run) -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    # Where a step and the decay balance, the ratio is √(2 · rate · decay) = 0.45 (Kosson et al. 2023).
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.1)
    run = train(model, 80, optimizer=optimizer, probes=UPDATES, settings={"optim": {"lr": 1.0}})
    finding = found("update-ratio-off", run)
    assert finding.title == "Updates are too long for the weights"
    usual = finding.evidence[2].reading.value  # type: ignore[union-attr]
    assert finding.remedy is not None
    assert finding.remedy["optim.lr"] == pytest.approx(1.0 * 0.01 / usual, rel=0.5)  # one digit
    assert look("update-ratio-off", healthy) == []


def test_a_parameter_group_with_next_to_no_rate_is_named() -> None:
    model = classifier()
    slow = list(model[5].parameters())
    rest = [p for p in model.parameters() if all(p is not one for one in slow)]
    optimizer = torch.optim.AdamW([{"params": rest}, {"params": slow, "lr": 1e-9}], lr=1e-3)
    finding = found("update-ratio-off", train(model, 80, optimizer=optimizer, probes=UPDATES))
    assert (finding.module, finding.severity) == ("5", "warning")
    assert "too short" in finding.title


def test_frozen_unused_and_zero_modules_are_not_off() -> None:
    model = classifier()
    model[3].requires_grad_(False)
    model.unused = nn.Linear(3, 3)
    nn.init.zeros_(model[-1].weight) if isinstance(model[-1], nn.Linear) else None
    model.start = nn.Linear(FEATURES, FEATURES)
    nn.init.zeros_(model.start.weight)
    nn.init.zeros_(model.start.bias)

    def losses(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = x + model.start(x)  # type: ignore[operator]
        for part in list(model.children())[:8]:
            h = part(h)
        return {"classes": nn.functional.cross_entropy(h, labels)}

    assert look("update-ratio-off", train(model, 80, losses=losses, probes=UPDATES)) == []


def test_clipping_that_never_rests_is_noted(healthy: Run) -> None:
    finding = found("clipping-always-on", train(classifier(), 60, clip=1e-3, probes=("grads", "losses")))
    assert finding.severity == "note"
    assert finding.evidence[0].reading.value == 1.0  # type: ignore[union-attr]
    assert look("clipping-always-on", healthy) == []


def scaled(overflows: Callable[[int], bool], steps: int = 80) -> Run:
    """A run of mixed precision whose loss overflows at some steps."""
    count = iter(range(steps))

    def losses(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        factor = math.inf if overflows(next(count)) else 1.0
        return {name: term * factor for name, term in cross_entropy(model, x, labels).items()}

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return train(classifier(), steps, losses=losses, scaler=scaler, probes=("updates", "losses"))


def test_a_scale_that_keeps_falling_ends_in_a_standstill(healthy: Run) -> None:
    finding = found("amp-scale-collapse", scaled(lambda step: step >= 40))
    assert (finding.severity, finding.steps, finding.count) == ("error", (40, 79), 40)
    stated = {item.label: item.reading.value for item in finding.evidence}  # type: ignore[union-attr]
    assert stated["steps without an update at the end"] == 40
    assert stated["the scale at the end"] == 1024.0 / 2**39  # as it was when the last step began
    assert look("amp-scale-collapse", healthy) == []


def test_steps_left_out_now_and_then_are_a_warning() -> None:
    assert found("amp-scale-collapse", scaled(lambda step: step % 8 == 0)).severity == "warning"


def test_the_search_for_a_scale_is_none(healthy: Run) -> None:
    assert look("amp-scale-collapse", scaled(lambda step: step < 9)) == []
    assert isinstance(look("amp-scale-collapse", train(classifier(), 30, probes=("updates", "losses"))), NotMeasured)
