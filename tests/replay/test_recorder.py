"""The flight recorder in a loop: policies, and that it changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bifusion_diag.errors import UserError
from bifusion_diag.probes import Monitor
from bifusion_diag.record import load_run
from bifusion_diag.replay.incident import Incident
from bifusion_diag.replay.recorder import BadStepError, FlightRecorder

Batch = tuple[Tensor, Tensor]
BAD = 14


class Net(nn.Module):
    """BatchNorm, dropout, and a log that one input sends to −∞."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        scale = x[:, :1].abs().log().mul(0.01)
        logits: Tensor = self.head(self.body(x)) + scale
        return logits


def batch_of(step: int, bad: int | None = BAD) -> Batch:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=generator)
    if step == bad:
        x[3, 0] = 0.0
    return x, (x.sum(1) > 0).long()


def run(
    out: Path | None,
    recorder: Callable[[Net], FlightRecorder] | None,
    steps: int = 20,
    bad: int | None = BAD,
    edit: Callable[[int, Net, torch.optim.Optimizer], None] = lambda *_: None,
) -> dict[str, Any]:
    """Train and return all that is left."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    made = None if recorder is None else recorder(model)
    kept: dict[int, dict[str, Tensor]] = {}
    with Monitor(model, optimizer, ["losses"], out, recorder=made) as monitor:
        for step in range(steps):
            x, labels = batch_of(step, bad)
            edit(step, model, optimizer)
            optimizer.zero_grad()
            kept[step] = {name: value.clone() for name, value in model.state_dict().items()}
            with monitor.step((x, labels)):
                loss = nn.functional.cross_entropy(model(x), labels)
                loss.backward()
                optimizer.step()
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "before": kept,
        "optimizer": optimizer.state_dict(),
        "streams": [random.random(), np.random.random(), torch.rand(3)],
        "incidents": [] if made is None else made.incidents,
    }


def recorder_of(**options: Any) -> Callable[[Net], FlightRecorder]:
    def make(model: Net) -> FlightRecorder:
        return FlightRecorder(lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1]), **options)

    return make


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a.nan_to_num(1e9), b.nan_to_num(1e9))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_a_recorder_leaves_every_bit_of_a_run_as_it_would_have_been(tmp_path: Path) -> None:
    bare = run(tmp_path / "bare.json", None)
    watched = run(tmp_path / "watched.json", recorder_of())
    assert watched["incidents"]
    for part in ("state", "optimizer", "streams"):
        assert same(bare[part], watched[part]), part


def test_the_bad_step_is_caught_explained_and_run_again_bit_for_bit(tmp_path: Path) -> None:
    first: Incident = run(tmp_path / "run.json", recorder_of(on_incident="skip"))["incidents"][0]
    assert (first.step, first.family) == (BAD, "non-finite")
    assert first.reproduction.identical is True, first.reproduction
    assert [sample.index for sample in first.samples] == [3]
    assert first.cause is not None
    assert "log" in str(first.cause.op)
    assert "x[:, :1].abs().log()" in str(first.cause.source)
    assert first.action == "skip"
    event = next(event for event in load_run(tmp_path / "run.json").events if event.step == BAD)
    assert event.kind == "non-finite"
    assert event.data["scenes"] == ["sample 3"]
    assert Incident.from_dict(event.data["incident"]).cause == first.cause


def test_skip_leaves_the_update_out_and_takes_the_buffers_back(tmp_path: Path) -> None:
    left = run(tmp_path / "run.json", recorder_of(on_incident="skip"))
    assert same(left["before"][BAD], left["before"][BAD + 1])
    assert all(value.isfinite().all() for value in left["state"].values())
    assert [incident.step for incident in left["incidents"]] == [BAD]


def test_record_does_the_update_all_the_same(tmp_path: Path) -> None:
    left = run(tmp_path / "run.json", recorder_of())
    assert not all(value.isfinite().all() for value in left["before"][BAD + 1].values())
    assert left["incidents"][0].action == "record"


def test_rollback_goes_back_to_an_earlier_state(tmp_path: Path) -> None:
    left = run(tmp_path / "run.json", recorder_of(on_incident="rollback", keep_every=5))
    assert left["incidents"][0].action == "rollback"
    assert same(left["before"][BAD + 1], left["before"][5])


def test_stop_ends_the_run_before_the_update_and_keeps_the_row(tmp_path: Path) -> None:
    with pytest.raises(BadStepError, match=f"step {BAD}: ") as caught:
        run(tmp_path / "run.json", recorder_of(on_incident="stop"))
    stopped = load_run(tmp_path / "run.json")
    assert (stopped.status, int(stopped.steps[-1])) == ("failed", BAD)
    assert caught.value.incident.step == BAD


def test_an_error_in_the_step_is_told_with_what_led_to_it(tmp_path: Path) -> None:
    def make(model: Net) -> FlightRecorder:
        made = recorder_of()(model)
        made_ones.append(made)
        return made

    made_ones: list[FlightRecorder] = []

    def fail(step: int, model: Net, optimizer: torch.optim.Optimizer) -> None:
        if step == 12:
            model.head.register_forward_hook(raising)

    def raising(module: nn.Module, inputs: Any, output: Tensor) -> None:
        raise RuntimeError("matrix entries must be finite")

    with pytest.raises(RuntimeError, match="must be finite"):
        run(tmp_path / "run.json", make, bad=None, edit=fail)
    assert [(i.step, i.kind) for i in made_ones[0].incidents] == [(12, "exception")]
    assert "matrix entries must be finite" in made_ones[0].incidents[0].message


def test_incidents_that_follow_each_other_are_not_all_taken_apart(tmp_path: Path) -> None:
    incidents = run(tmp_path / "run.json", recorder_of(), steps=20)["incidents"]  # NaN weights from the bad step on
    assert len(incidents) == 20 - BAD
    assert [incident.reproduction.identical is True for incident in incidents] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]


def test_a_rule_that_raises_switches_the_recorder_off_and_training_goes_on(tmp_path: Path) -> None:
    def broken(vitals: Any) -> str | None:
        return str(1 / 0) if vitals.step == 5 else None

    bare = run(tmp_path / "bare.json", None, bad=None)
    with pytest.warns(RuntimeWarning, match="the flight recorder is off: .*ZeroDivisionError"):
        watched = run(tmp_path / "run.json", recorder_of(rules=[broken]), bad=None)
    assert same(bare["state"], watched["state"])
    assert [event.step for event in load_run(tmp_path / "run.json").events if event.kind == "recorder"] == [5]


def test_bad_options_are_refused() -> None:
    with pytest.raises(UserError, match=r"no policy\. Did you mean 'skip'"):
        FlightRecorder(on_incident="skipp")  # type: ignore[arg-type]
