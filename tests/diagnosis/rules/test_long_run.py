"""Rules of the long run, on trainings whose course is known from theory."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rule_runs import CLASSES, FEATURES, batch_of, classifier, cross_entropy, found, look, train
from torch import Tensor, nn

from bifusion_diag.diagnosis import NotMeasured, assess_run
from bifusion_diag.diagnosis.full import load_measured
from bifusion_diag.diagnosis.trend import BLOCKS, trend_of
from bifusion_diag.probes import Monitor
from bifusion_diag.record import Event
from bifusion_diag.record.schema import Run, Series


def least_squares(edge: float, steps: int = 220) -> Run:
    """Gradient descent on a fixed quadratic: the error along the steepest direction changes by 1 − edge a step."""
    x = torch.randn(64, FEATURES)
    y = x.sum(1, keepdim=True) + 0.1 * torch.randn(64, 1)
    steepest = torch.linalg.eigvalsh(2 * x.T @ x / 64)[-1].item()
    model = nn.Linear(FEATURES, 1, bias=False)
    return train(
        model,
        steps,
        losses=lambda model, x, y: {"squares": (model(x) - y).square().mean()},
        batch=lambda _: (x, y),
        optimizer=torch.optim.SGD(model.parameters(), lr=edge / steepest),
        probes=("grads", "losses"),
    )


@pytest.fixture(scope="module")
def unstable() -> Run:
    torch.manual_seed(0)
    return least_squares(2.04)


def test_a_learning_rate_beyond_the_edge_makes_the_gradient_drift(unstable: Run) -> None:
    finding = found("drifting-gradients", unstable)
    assert (finding.severity, finding.module) == ("warning", "(root)")
    # From the first to the last block's middle are fifteen blocks; the error grows by 4 % a step.
    block = sum(step >= finding.steps[0] for step in unstable.steps) // BLOCKS  # type: ignore[index]
    assert finding.evidence[0].reading.value == pytest.approx(1.04 ** (block * (BLOCKS - 1)), rel=0.2)  # type: ignore[union-attr]
    assert "does not" not in finding.title


def test_within_the_edge_nothing_drifts() -> None:
    assert look("drifting-gradients", least_squares(1.9)) == []


def test_too_few_steps_for_a_drift_are_said() -> None:
    gap = look("drifting-gradients", least_squares(2.04, steps=100))
    assert isinstance(gap, NotMeasured)
    assert "are needed" in gap.reason


def test_a_loss_that_climbs_above_its_beginning_has_diverged(unstable: Run) -> None:
    finding = found("loss-divergence", unstable)
    assert finding.severity == "error"
    assert "above where it began" in finding.mechanism


def test_a_learning_rate_that_is_raised_too_far_costs_what_was_learnt(healthy: Run) -> None:
    def raised(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[0]["lr"] = 1e-2 if step < 150 else 1.0

    run = train(classifier(), 240, before=raised, probes=("losses",))
    finding = found("loss-divergence", run)
    assert finding.steps is not None
    assert 140 <= finding.steps[0] <= 180
    assert finding.steps[1] == 239
    assert look("nothing-learned", run) == []  # it had learnt, and lost it
    assert look("loss-divergence", healthy) == []


def test_weights_that_hardly_move_learn_nothing(healthy: Run) -> None:
    finding = found("nothing-learned", train(classifier(), lr=1e-8))
    assert finding.severity == "warning"
    stated = {item.label: item.reading.value for item in finding.evidence}  # type: ignore[union-attr]
    assert stated["median of ‖Δw‖ ÷ ‖w‖ over modules"] < 1e-6
    assert look("nothing-learned", healthy) == []


def test_labels_that_are_shuffled_teach_nothing() -> None:
    generator = torch.Generator().manual_seed(1)

    def shuffled(_: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(32, FEATURES, generator=generator), torch.randint(CLASSES, (32,), generator=generator)

    model = classifier()
    nn.init.zeros_(model[-1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(model[-1].bias)  # type: ignore[arg-type]  # it begins with the best guess there is
    run = train(model, batch=shuffled, lr=1e-3, probes=("losses",))
    assert found("nothing-learned", run).severity == "warning"


def test_a_run_from_trained_weights_may_have_been_at_its_best() -> None:
    model = classifier()
    train(model, 400, probes=("losses",))
    resumed = train(model, lr=1e-8, settings={"model": {"init_from": "trained.pt"}}, probes=("losses",), seed=1)
    finding = found("nothing-learned", resumed)
    assert finding.severity == "note"
    assert "trained weights" in finding.mechanism


def test_a_record_that_goes_on_does_not_tell_what_was_learnt_before(tmp_path: Any) -> None:
    run = train(classifier(), lr=1e-8, probes=("losses",))
    later = _from_step(run, 5000)
    assert isinstance(look("nothing-learned", later), NotMeasured)


def test_a_stage_that_adds_a_term_is_no_divergence() -> None:
    def staged(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        later = 5.0 if staged.steps >= 200 else 0.0  # type: ignore[attr-defined]
        staged.steps += 1  # type: ignore[attr-defined]
        return {**cross_entropy(model, x, labels), "more": later * (1 + model(x).square().mean())}

    staged.steps = 0  # type: ignore[attr-defined]
    run = train(classifier(), 400, losses=staged, probes=("losses",))
    assert found("loss-divergence", run)
    run.events.append(Event(200, "stage", "stage later"))
    assert look("loss-divergence", run) == []
    assert look("nothing-learned", run) == []


def test_a_trend_is_that_of_the_medians() -> None:
    rng = np.random.default_rng(0)
    values = np.linspace(0, 3, 1600) + rng.normal(size=1600)
    values[::7] = 100  # spikes do not count
    trend = trend_of(values)
    assert trend.change == pytest.approx(3 * 15 / 16, abs=0.4)
    assert trend.p < 1e-6
    assert trend_of(rng.normal(size=1600)).p > 0.01
    assert trend_of(np.ones(160)).p == 1.0


def test_a_healthy_run_has_no_finding(healthy: Run) -> None:
    assert [finding.rule for finding in assess_run(healthy).findings] == []


def _from_step(run: Run, first: int) -> Run:
    import dataclasses

    moved = {
        name: Series.from_values(name, one.steps + first, one.value, one.missing > 0)
        for name, one in run.all_series.items()
    }
    return dataclasses.replace(run, steps=run.steps + first, all_series=moved)


def _reconstruct(steps: int, seen: int) -> Run:
    """A loss that turns round at half of the run and is then driven up, with so many optimisers."""
    torch.manual_seed(0)
    model = classifier()
    parts = [list(model[:4].parameters()), list(model[4:].parameters())]
    optimizers = [torch.optim.SGD(part, lr=0.1) for part in (parts if seen == 2 else [parts[0] + parts[1]])]
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        with Monitor(model, optimizers, probes=["losses"], out=Path(folder) / "run") as monitor:
            for step in range(steps):
                x, labels = batch_of(generator)
                with monitor.step():
                    loss = nn.functional.cross_entropy(model(x), labels)
                    monitor.losses({"loss": loss})
                    (loss if step < steps // 2 else -0.1 * loss).backward()
                    for optimizer in optimizers:
                        optimizer.step()
                        optimizer.zero_grad()
        return load_measured(Path(folder) / "run")


def test_the_sum_of_losses_that_pull_against_each_other_need_not_fall() -> None:
    alone, opposed = (found("loss-divergence", _reconstruct(320, seen)) for seen in (1, 2))
    assert (alone.severity, opposed.severity) == ("error", "warning")
    assert "several optimisers" in opposed.mechanism
    assert "several optimisers" not in alone.mechanism


def test_a_loss_a_little_above_its_beginning_is_no_error() -> None:
    """A regulariser that gains weight, as in KL annealing, without a stage that announces it."""
    steps = itertools.count()

    def annealed(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {**cross_entropy(model, x, labels), "more": torch.tensor(next(steps) / 240 * 1.5)}

    torch.manual_seed(0)
    run = train(classifier(), 240, losses=annealed, probes=("losses",))
    finding = found("loss-divergence", run)
    assert finding.severity == "warning"
    assert "above where it began" in finding.mechanism
    run.provenance["optimizers"] = 2
    assert found("loss-divergence", run).severity == "note"
