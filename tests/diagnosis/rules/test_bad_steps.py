"""Rules of single bad steps, and of counts that ought to be zero, on steps that go wrong for real."""

from __future__ import annotations

import dataclasses
import itertools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from rule_runs import CLASSES, FEATURES, batch_of, classifier, cross_entropy, found, look, train
from torch import Tensor, nn

from bifusion_diag.diagnosis import NotMeasured, assess_run
from bifusion_diag.diagnosis.full import load_measured
from bifusion_diag.probes import DataProbe, Monitor
from bifusion_diag.record.schema import Run

GRADS = ("grads", "losses")
AT = 70  # the step that goes wrong


class At:
    """Losses that go wrong at one step."""

    def __init__(self, wrong: Any) -> None:
        self.wrong, self.step = wrong, -1

    def __call__(self, model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.step += 1
        terms = dict(cross_entropy(model, x, labels))
        return self.wrong(model, x, terms) if self.step == AT else {**terms, "more": 0.01 * model(x).square().mean()}


def test_a_mean_over_nothing_is_a_bad_loss_with_sound_gradients(healthy: Run) -> None:
    run = train(
        classifier(),
        100,
        losses=At(lambda model, x, terms: {**terms, "more": model(x)[:0].detach().mean()}),
        probes=GRADS,
    )
    finding = found("nonfinite-loss", run)
    assert (finding.term, finding.steps, finding.count) == ("more", (AT, AT), 1)
    assert "At 1 of 1 steps every gradient is finite" in finding.mechanism
    assert look("nonfinite-loss", healthy) == []


def test_the_root_of_zero_is_a_bad_gradient_of_a_sound_loss(healthy: Run) -> None:
    kept: dict[str, Tensor] = {}

    def before(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if step == AT:
            kept.update({name: value.clone() for name, value in model.state_dict().items()})
        if step == AT + 1:
            model.load_state_dict(kept)
            optimizer.state.clear()

    losses = At(lambda model, x, terms: {**terms, "more": (model[-1].weight * 0).sum().sqrt()})
    run = train(classifier(), 100, losses=losses, before=before, probes=GRADS)
    finding = found("nonfinite-gradient", run)
    assert (finding.module, finding.steps) == ("7", (AT, AT))
    assert look("nonfinite-gradient", healthy) == []


def outlier(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    outlier.step += 1  # type: ignore[attr-defined]
    x, labels = batch_of(generator)
    return x * (300.0 if outlier.step == AT else 1.0), labels  # type: ignore[attr-defined]


def test_a_batch_that_is_far_out_makes_the_norm_jump(healthy: Run) -> None:
    outlier.step = -1  # type: ignore[attr-defined]
    model = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    run = train(model, 100, batch=outlier, lr=1e-3, probes=GRADS)
    finding = found("gradient-spike", run)
    assert (finding.steps, finding.severity) == ((AT, AT), "warning")
    assert look("gradient-spike", healthy) == []


def test_of_means_over_a_window_a_rule_of_single_steps_says_so() -> None:
    gap = look("gradient-spike", _smoothed(train(classifier(), 80, probes=GRADS), 50))
    assert isinstance(gap, NotMeasured)
    assert "smoothed over 50" in gap.reason
    losses = At(lambda model, x, terms: {**terms, "more": model(x)[:0].detach().mean()})
    bad = _smoothed(train(classifier(), 100, losses=losses, probes=GRADS), 50)
    assert "means over 50 steps" in found("nonfinite-loss", bad).mechanism


def _smoothed(run: Run, window: int) -> Run:
    header = dataclasses.replace(run.header, provenance={"imported": {"smoothing": window}})
    return dataclasses.replace(run, header=header)


def test_an_output_beyond_all_numbers_is_traced_to_its_module(healthy: Run) -> None:
    class Exp(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.exp()

    def before(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model[1].weight.data.fill_(1000.0 if step == 20 else 0.1)  # type: ignore[index, union-attr]

    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Linear(8, 8), Exp(), nn.Linear(8, CLASSES))
    run = train(
        model,
        30,
        losses=lambda model, x, labels: {"sum": model(x.abs()).nan_to_num(0.0, 0.0, 0.0).mean() * 1e-6},
        before=before,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        probes=("activations", "losses"),
    )
    finding = found("nonfinite-output", run)
    assert (finding.module, finding.steps) == ("2", (20, 20))
    assert look("nonfinite-output", healthy) == []


@pytest.mark.parametrize("blocked", [False, True])
def test_a_row_without_a_key_is_counted(blocked: bool) -> None:
    attention = nn.MultiheadAttention(FEATURES, 2, batch_first=True)

    def losses(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        rows = x.reshape(4, 8, FEATURES)
        mask = torch.zeros(4, 8, dtype=torch.bool)
        mask[1] = blocked
        out, _ = model(rows, rows, rows, key_padding_mask=mask)
        return {"mean": out.nan_to_num().mean()}

    run = train(
        attention, 10, losses=losses, optimizer=torch.optim.SGD(attention.parameters(), lr=0.0), probes=["attention"]
    )
    if blocked:
        assert found("attention-masked-rows", run).count == 10
    else:
        assert look("attention-masked-rows", run) == []


class Matched(NamedTuple):
    total: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, float]
    matches: list[tuple[Tensor, Tensor]]
    objects: list[int]


@pytest.mark.parametrize("limit", [-1.0, 1e9])
def test_a_scene_whose_objects_find_no_query_is_counted(limit: float) -> None:
    """A matcher that only takes pairs nearer than a limit."""

    class Criterion(nn.Module):
        def forward(self, queries: Tensor, objects: Tensor) -> Matched:
            near = torch.cdist(queries, objects).min(0)
            kept = torch.nonzero(near.values < limit)[:, 0]
            loss = queries.square().mean()
            matches = [(near.indices[kept], kept)]
            return Matched(loss, {"fit": loss}, {"fit": 1.0}, matches, [len(objects)])

    model = nn.ModuleDict({"net": nn.Linear(FEATURES, FEATURES), "criterion": Criterion()})

    def losses(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"fit": model["criterion"](model["net"](x), x[:3]).total}  # type: ignore[index]

    run = train(model, 10, losses=losses, probes=["matching"])
    if limit < 0:
        assert found("empty-match", run).count == 10
    else:
        assert look("empty-match", run) == []


@pytest.mark.parametrize("wrong", [False, True])
def test_labels_and_data_are_counted_as_the_loader_hands_them_out(wrong: bool) -> None:
    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, labels = batch_of(generator)
        if wrong:
            labels[0], x[3, 1] = CLASSES + 3, math.nan
        return x, labels

    run = train(
        classifier(),
        10,
        batch=batch,
        losses=lambda model, x, labels: cross_entropy(model, x.nan_to_num(), labels.clamp(max=CLASSES - 1)),
        probes=[DataProbe(labels={"labels": (0, CLASSES - 1)})],
    )
    for rule in ("labels-out-of-range", "data-nonfinite"):
        if wrong:
            assert found(rule, run).evidence[0].reading.value == 10  # type: ignore[union-attr]
        else:
            assert look(rule, run) == []


def test_a_bad_step_that_was_taken_apart_is_one_finding_of_its_mechanism(tmp_path: Any) -> None:
    from bifusion_diag.probes import Monitor
    from bifusion_diag.record import load_run
    from bifusion_diag.replay import FlightRecorder

    model = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)

    def step(batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    recorder = FlightRecorder(step)
    with Monitor(model, optimizer, probes=GRADS, out=tmp_path / "run", recorder=recorder) as monitor:
        for number in range(30):
            batch = batch_of(generator)
            if number == 20:
                batch[0][5] = math.nan
            with monitor.step(batch):
                optimizer.zero_grad()
                loss = step(batch)
                monitor.losses({"classes": loss})
                loss.backward()
                if number != 20:
                    optimizer.step()
    run = load_run(tmp_path / "run")
    finding = found("incident", run)
    assert finding.rule == "incident-nonfinite-input"
    assert finding.steps == (20, 20)
    assert "ran again bit for bit" in finding.mechanism
    assert not [one for one in assess_run(run).findings if one.rule == "nonfinite-loss"]  # said once


def test_a_watched_run_without_a_bad_step_has_no_incident(healthy: Run) -> None:
    header = dataclasses.replace(healthy.header, provenance={"flight_recorder": "record"})
    assert look("incident", dataclasses.replace(healthy, header=header)) == []
    assert isinstance(look("incident", healthy), NotMeasured)


def _spiked(size: float) -> Run:
    """A loss whose scale falls to a hundredth after 20 steps, with one step whose gradient is so large."""
    steps = itertools.count()

    def losses(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        step = next(steps)
        scale = size if step == AT else 1.0 if step < 20 else 0.01
        return {"more": scale * model(x).square().mean()}

    torch.manual_seed(0)
    model = classifier()
    return train(model, 100, losses=losses, optimizer=torch.optim.SGD(model.parameters(), lr=1e-5), probes=GRADS)


def test_a_jump_says_how_high_and_one_within_what_the_run_began_with_is_a_note() -> None:
    high, low = found("gradient-spike", _spiked(10.0)), found("gradient-spike", _spiked(0.5))
    assert (high.severity, low.severity) == ("warning", "note")
    stated = {item.label: item.reading.value for item in high.evidence}  # type: ignore[union-attr]
    assert stated["largest gradient norm of these steps"] / stated["median of the steps before it"] > 500
    assert "The run began with norms as large" in low.mechanism


@pytest.mark.parametrize(("field", "values"), [("coords", 400), ("depth", 5000)])
def test_coordinates_of_another_unit_are_a_note_and_an_outlier_a_warning(field: str, values: int) -> None:
    """Voxels and millimetres are so at every step; what a camera misread is so at some."""

    def run_of(largest: Any) -> Run:
        model, steps = nn.Linear(1, 1), itertools.count()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with tempfile.TemporaryDirectory() as folder:
            with Monitor(model, optimizer, probes=["data"], out=Path(folder) / "run") as monitor:
                for _ in range(20):
                    batch = {field: torch.rand(64) * largest(next(steps))}
                    with monitor.step(batch):
                        model(batch[field][:, None]).mean().backward()
                        optimizer.step()
            return load_measured(Path(folder) / "run")

    always = found("data-range", run_of(lambda step: values))
    once = found("data-range", run_of(lambda step: values if step == 9 else 5))
    assert (always.severity, once.severity) == ("note", "warning")
    assert "may be no metres" in always.mechanism


def test_a_total_loss_that_is_nan_in_a_log_without_terms_is_no_gradient(make_run: Callable[..., Run]) -> None:
    """As Transformers and many CSV exports log it: the gradient norm of that row is finite."""
    loss, norm = np.ones(100), np.random.default_rng(0).lognormal(0, 0.1, 100)
    loss[40] = np.nan
    (found,) = [
        one
        for one in assess_run(make_run({"loss/total": loss, "train/grad_norm": norm})).findings
        if one.rule in ("nonfinite-loss", "nonfinite-gradient")
    ]
    assert (found.rule, found.term, found.evidence[0].series) == ("nonfinite-loss", None, "loss/total")
    assert found.title == "The total loss is non-finite, and none of its recorded terms"
