"""Rules on a run that still goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rule_runs import FEATURES, classifier, train
from torch import nn

from bifusion_diag.diagnosis import LiveFindings, Thresholds, findings_of
from bifusion_diag.diagnosis.live import window_of
from bifusion_diag.errors import UserError
from bifusion_diag.record import RecordFollower, RunHeader, RunWriter, load_run

DOCS = Path(__file__).resolve().parents[3] / "docs" / "rules.md"


def test_the_example_of_the_docs_tells_findings_while_it_trains(capsys: pytest.CaptureFixture[str]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = classifier()
            self.net[3].bias.data.fill_(-100.0)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return self.net(batch).square().mean()

    model = Model()
    code = DOCS.read_text().split("```python\n")[1].split("```")[0]
    loader = [torch.randn(16, FEATURES) for _ in range(100)]
    exec(code, {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=1e-3), "loader": loader})
    assert (
        "warning dead-units The units of net.4 are dead net.4 (49, 98)" in capsys.readouterr().out
    )  # step 99 is still open


def test_findings_of_a_path_are_those_of_the_record_and_of_its_bounds(tmp_path: Path) -> None:
    train(classifier(), 60, clip=1e-3, out=tmp_path / "run", probes=("grads", "losses"))
    found = [finding.rule for finding in findings_of(tmp_path / "run")]
    assert found == ["clipping-always-on"]
    assert findings_of(load_run(tmp_path / "run"), Thresholds(clipped_share=1.0)) == ()
    with pytest.raises(UserError):
        findings_of(tmp_path / "nowhere")


def test_a_window_of_a_follower_reads_as_the_record(tmp_path: Path) -> None:
    train(classifier(), 60, out=tmp_path / "run")
    run, seen = load_run(tmp_path / "run"), window_of(RecordFollower(tmp_path / "run" / "run.record"))
    assert seen.all_series.keys() == run.all_series.keys()
    for name, series in seen.all_series.items():
        assert series.stats == run.all_series[name].stats
        assert np.array_equal(series.value, run.all_series[name].value, equal_nan=True)
    assert seen.modules == run.modules


def test_live_findings_look_again_only_when_rows_have_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    real = findings_of
    monkeypatch.setattr("bifusion_diag.diagnosis.live.findings_of", lambda *given: looks.append(1) or real(*given))
    writer = RunWriter(tmp_path / "run.json", RunHeader("run"))
    follower = RecordFollower(writer.folder)
    live = LiveFindings()
    assert live.of(follower) == ()  # nothing is written yet
    rows = np.arange(60)
    writer.append(rows, {"train/clip_coefficient": np.full(60, 0.5), "loss/total": np.ones(60)})
    writer.flush()
    follower.poll()
    assert [finding.rule for finding in live.of(follower)] == ["clipping-always-on"]
    live.of(follower)
    assert len(looks) == 1
    live._rest_until = 0.0
    writer.append(rows + 60, {"train/clip_coefficient": np.full(60, 1.0), "loss/total": np.ones(60)})
    writer.flush()
    follower.poll()
    assert live.of(follower) == ()  # half of the steps
    assert len(looks) == 2
    writer.append(rows + 120, {"train/clip_coefficient": np.full(60, 1.0), "loss/total": np.ones(60)})
    writer.flush()
    follower.poll()
    live._rest_until = float("inf")  # the last look took long
    live.of(follower)
    assert len(looks) == 2
    writer.finish("completed")
    follower.poll()
    live.of(follower)
    assert len(looks) == 3  # what is shown last is of all rows


def test_a_window_that_begins_later_does_not_say_that_nothing_was_learnt(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run.json", RunHeader("run"))
    loss = np.concatenate([np.linspace(5, 1, 300), np.ones(700)]) + 0.05 * np.random.default_rng(0).normal(size=1000)
    writer.append(np.arange(1000), {"loss/total": loss})
    writer.finish("completed")
    assert findings_of(window_of(RecordFollower(writer.folder, window=500))) == ()
