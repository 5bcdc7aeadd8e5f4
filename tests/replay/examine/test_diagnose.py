"""A diagnosis changes nothing, says whether the step ran again as it had run, and what it could not measure."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bifusion_diag.replay.examine import diagnose as module
from bifusion_diag.replay.examine.diagnose import diagnose
from bifusion_diag.replay.incident import Incident, Trigger
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Fingerprint, Training, fingerprint
from bifusion_diag.replay.watch.vitals import Vitals

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """BatchNorm, dropout and a logarithm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x)) + 0.01 * x[:, :1].abs().log()
        return logits


def batch_of(seed: int, bad: int | None = None) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 6, generator=generator)
    if bad is not None:
        x[bad, 0] = 0.0
    return x, x[:, 1:4].argmax(1)


class Case:
    """A healthy step and then a bad one, up to its update."""

    def __init__(self, bad: int | None = 3) -> None:
        torch.manual_seed(0)
        self.model = Net()
        self.training = Training(
            self.model, lambda b: F.cross_entropy(self.model(b[0]), b[1]), (torch.optim.AdamW(self.model.parameters()),)
        )
        self.healthy, _ = self._run(0, None)
        self.training.optimizers[0].step()
        self.model.zero_grad()
        self.notes, self.first = self._run(1, bad)
        loss = math.nan if bad is not None else 1.0
        self.vitals = Vitals(1, terms={"loss": loss}, total=loss)

    def _run(self, step: int, bad: int | None) -> tuple[StepNotes, Fingerprint]:
        batch = batch_of(step, bad)
        notes = StepNotes(self.model, step, batch)
        loss = self.training.loss(batch)
        self.training.backward(loss)
        return notes, fingerprint(loss, self.training.gradients())

    def diagnose(self, first: Fingerprint | None = None, **more: Any) -> Incident:
        trigger = Trigger("nonfinite-loss", "loss term loss is infinite", term="loss", value=math.inf)
        plain = Incident(1, trigger.kind, (trigger,), step_seconds=0.01)
        given: dict[str, Any] = {"contrast": self.healthy, "history": {}, **more}
        return diagnose(plain, self.training, self.notes, self.vitals, first or self.first, **given)

    def state(self) -> list[Tensor]:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return [t.clone() for t in (*self.model.state_dict().values(), *gradients, torch.get_rng_state())]


def test_it_finds_operation_and_sample_and_changes_nothing() -> None:
    case = Case()
    before = case.state()
    modes = [m.training for m in case.model.modules()]
    incident = case.diagnose()
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, case.state(), strict=True))
    assert modes == [m.training for m in case.model.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.modules())
    assert incident.reproduction.identical
    assert "gradients" in incident.reproduction.compared
    assert incident.mechanism == "log-of-zero"
    assert incident.cause is not None
    assert (incident.cause.module, incident.cause.op) == ("(root)", "aten.log")
    assert "abs().log()" in str(incident.cause.source)
    assert [sample.index for sample in incident.samples] == [3]
    assert incident.remedies[0] == "drop-sample"
    assert {"terms", "samples", "modules"} <= set(incident.tables)
    assert incident.seconds > 0
    assert Incident.from_dict(incident.to_dict()).message == incident.message


def test_a_step_that_runs_otherwise_is_said_to() -> None:
    case = Case()
    other = Fingerprint({**case.first.losses, "loss": "0"}, case.first.gradients)
    incident = case.diagnose(other)
    assert incident.reproduction.identical is False
    assert incident.reproduction.difference == "loss loss"
    assert incident.mechanism == "log-of-zero", "it is bad again all the same"

    incident = Case(bad=None).diagnose(Fingerprint({"loss": "0"}, {}))
    assert incident.reproduction.identical is False
    assert "did not happen again" in incident.evidence["left out"]
    assert incident.samples == ()
    assert incident.mechanism == "unknown"


def test_what_cannot_be_measured_is_said_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory for it")

    for name in ("sample_shares", "term_gradients"):
        monkeypatch.setattr(module, name, broken)
    incident = Case().diagnose()
    assert incident.evidence["left out"].count("no memory for it") == 2
    assert "not measured: the samples" in incident.evidence["left out"]
    assert incident.mechanism == "log-of-zero"
    assert incident.samples == ()


def test_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_LEAST", 0.0)
    monkeypatch.setattr(module, "STEP_TIMES", 0.0)
    incident = Case().diagnose()
    assert "the time for it is used up" in incident.evidence["left out"]
    assert incident.reproduction.identical is None


def test_without_a_healthy_step_to_compare_with() -> None:
    incident = Case().diagnose(contrast=None)
    assert incident.mechanism == "log-of-zero"
    assert "the last healthy step with these weights" not in incident.evidence


def test_a_bad_weight_is_nobodys_sample() -> None:
    case = Case(bad=None)
    with torch.no_grad():
        case.model.head.weight[0, 0] = torch.nan
    case.first = Fingerprint({}, {})
    incident = case.diagnose()
    assert incident.mechanism == "nonfinite-weights"
    assert incident.cause is not None
    assert (incident.cause.direction, incident.cause.parameter) == ("update", "head.weight")
    assert incident.samples == ()
    assert incident.evidence["the last healthy step with these weights"] == "bad too"
