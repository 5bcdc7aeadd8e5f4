"""The benchmark of healthy trainings: its settings are valid, and an error among the findings makes it fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import healthy
from bifusion_diag.config import load_settings


def test_there_are_twenty_and_all_are_valid() -> None:
    assert len(healthy.RUNS) == 20
    for preset, changes in healthy.RUNS:
        load_settings(preset, scale="small", values={**healthy.SMALL, **changes})


@pytest.mark.parametrize(("severity", "code"), [("error", 1), ("warning", 0)])
def test_an_error_makes_it_fail(
    severity: str, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(number: int, folder: Path) -> healthy.Found:
        return healthy.Found(f"run {number}", "stable", ((severity, "gradient-spike", "It jumps"),), 1.0)

    monkeypatch.setattr(healthy, "train", train)
    assert healthy.main(["--only", "0", "1", "--json", str(tmp_path / "found.json")]) == code
    assert "in 2 of 2 runs" in capsys.readouterr().out
    assert (tmp_path / "found.json").stat().st_size
