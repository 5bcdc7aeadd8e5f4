"""``bifusion-diag audit``: exit codes, what is printed, what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str]]
TINY = [
    "--scale", "small", "--steps", "40", "--batch-size", "2", "--scan", "2", "--set", "data.scenes=2",
    "--set", "data.max_points=500", "--set", "data.image_height=48", "--set", "data.image_width=64",
    "--set", "data.superpoint_size=0.5", "--set", "model.clip.architecture=ViT-B-32",
]  # fmt: skip


def test_a_sound_run_ends_with_0_and_writes_nothing(command: Command) -> None:
    code, text = command("audit", "--model", "baseline-5cm", *TINY)
    assert code == 0, text
    assert text.startswith("errors: 0")
    assert list(Path().iterdir()) == []


def test_lost_poses_that_are_replaced_end_with_1(command: Command) -> None:
    flaws = ["--set", "data.flaws.lost_tracking=1"]
    code, text = command("audit", "--model", "bifusion-fragile", *TINY, *flaws, "--json", "out/audit.json")
    assert code == 1, text
    assert "--set model.projection.sanitize=strict" in text
    stored = json.loads(Path("out/audit.json").read_text())
    assert stored["counts"]["error"] >= 1
    assert stored["findings"][0]["rule"] == "projection-nonfinite"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "bifusio"], "bifusion"),
        (["--data", "nowhere"], "no such folder"),
        (["--threshold", "few_row=3"], "few_rows"),
        (["--json", "."], "is a folder"),
        (["--config", "none.yaml"], "none.yaml"),
    ],
)
def test_bad_input_ends_with_2_before_anything_is_measured(command: Command, arguments: list[str], words: str) -> None:
    code, text = command("audit", *arguments)
    assert (code, words in text) == (2, True), text
