"""The benchmark of the presets can fail, and says what failed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.presets import main, problems_of

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("losses", "norms", "may_be_nan", "expected"),
    [
        ([3.0, 2.0], [1.0, 5.0], False, []),
        ([3.0], [1.0], False, ["1 of 2 steps"]),
        ([NAN, 2.0], [1.0, 5.0], False, ["non-finite loss in 1 steps"]),
        ([NAN, 2.0], [1.0, 5.0], True, []),  # an empty match, as the preset's own settings have it
        ([INF, 2.0], [1.0, 5.0], True, ["non-finite loss in 1 steps"]),
        ([NAN, 2.0], [NAN, 5.0], True, ["non-finite gradient in 1 steps"]),
        ([3.0, 2.0], [0.0, 0.0], False, ["no gradient"]),
        ([], [], False, ["0 of 2 steps", "no gradient"]),
    ],
)
def test_problems(losses: list[float], norms: list[float], may_be_nan: bool, expected: list[str]) -> None:
    assert problems_of(losses, norms, steps=2, may_be_nan=may_be_nan) == expected


def test_a_preset_that_trains(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    assert main(["--presets", "bifusion-simple", "--scale", "small", "--steps", "2", "--json", str(out)]) == 0
    assert "1 of 1 presets trained" in capsys.readouterr().out
    (found,) = json.loads(out.read_text())["measurements"]
    assert (found["preset"], len(found["losses"]), found["problems"]) == ("bifusion-simple", 2, [])
    assert 0 < found["step_seconds"] < found["seconds"]
    assert 0.1 < found["peak_gib"] < 16


def test_a_preset_that_fails_is_named_with_its_error_and_the_exit_code_is_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "found.json"
    assert main(["--presets", "baseline", "--batch", "0", "--json", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "baseline" in printed
    assert "FAILED: exit code 2" in printed
    assert "0 of 1 presets trained" in printed
    assert json.loads(out.read_text())["measurements"][0]["losses"] is None
