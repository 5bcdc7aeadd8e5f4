"""``bifusion-diag rules``, and the findings that watch and train tell."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from bifusion_diag.diagnosis.rules import RULES, page_of, rule_ids
from bifusion_diag.diagnosis.thresholds import Thresholds
from bifusion_diag.record import RunHeader, RunWriter

Command = Callable[..., tuple[int, str]]


def test_every_rule_is_listed_with_what_it_needs(command: Command) -> None:
    code, printed = command("rules")
    assert code == 0
    lines = {line.split()[0]: line for line in printed.splitlines() if line.strip()}
    assert set(rule_ids()) <= lines.keys()
    assert lines["dead-units"].endswith("activations") or "activations" in lines["dead-units"]
    assert all(rule.title in lines[rule.id] for rule in RULES)


def test_a_page_is_shown_and_a_typo_is_told(command: Command) -> None:
    code, printed = command("rules", "incident-masked-softmax-row")
    assert code == 0
    assert "Known false alarms" in printed
    code, printed = command("rules", "dead-unit")
    assert code == 2
    assert "dead-units" in printed


def test_every_bound_is_listed_with_its_reason(command: Command) -> None:
    code, printed = command("rules", "--thresholds")
    assert code == 0
    names = {line.split()[0] for line in printed.splitlines() if line.strip()}
    assert set(Thresholds.model_fields) <= names


def test_rules_and_bounds_as_json(command: Command, tmp_path: Path) -> None:
    assert command("rules", "--json", tmp_path / "rules.json")[0] == 0
    stored = json.loads((tmp_path / "rules.json").read_text())
    assert [rule["id"] for rule in stored["rules"]] == list(rule_ids())
    assert stored["rules"][0]["page"] == page_of(stored["rules"][0]["id"])
    assert {bound["name"]: bound["value"] for bound in stored["thresholds"]} == Thresholds().model_dump()
    assert command("rules", "dead-units", "--thresholds")[0] == 2


@pytest.fixture
def clipped(tmp_path: Path) -> Iterator[Path]:
    writer = RunWriter(tmp_path / "run.json", RunHeader("run", steps_planned=100))
    rows = np.arange(60)
    writer.append(rows, {"loss/total": 4 - rows / 100, "train/clip_coefficient": np.full(60, 0.5)})
    writer.flush()
    yield tmp_path / "run.json"
    writer.finish("completed")


def test_watch_shows_findings_and_takes_bounds(command: Command, clipped: Path) -> None:
    code, printed = command("watch", clipped, "--once")
    assert code == 0
    assert "note  Nearly every step is clipped  clipping-always-on" in printed
    assert "clipped" not in command("watch", clipped, "--once", "--threshold", "clipped_share=1")[1]
    code, printed = command("watch", clipped, "--once", "--threshold", "clipped_shore=1")
    assert code == 2
    assert "clipped_share" in printed


def test_train_ends_with_its_findings_and_the_next_command(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "mine.json"
    code, printed = command(
        "train", "--model", "baseline", "--scale", "small", "--steps", 2, "--batch-size", 2, "--out", out,
        "--set", "data.scenes=2", "--set", "data.max_points=500", "--set", "optim.clip_grad=1e-6",
    )  # fmt: skip
    assert code == 0
    lines = printed.splitlines()
    assert "note: Nearly every step is clipped (clipping-always-on)" in lines
    assert f"report with: bifusion-diag report {out}" in lines
