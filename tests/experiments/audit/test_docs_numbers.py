"""The numbers in docs/audit.md are what its commands measure."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from bifusion_diag.config import load_settings
from bifusion_diag.diagnosis.quantity import number
from bifusion_diag.experiments.audit import audit

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "audit.md").read_text()
#: Each command that writes audit.json from the example, and the numbers that follow it.
BLOCKS = re.split(r"```sh\n(?=bifusion-diag audit .*examples/audit\.yaml)", PAGE)[1:]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: shlex.split(block.splitlines()[0])[3])
def test_the_numbers_of_the_page_are_measured(block: str) -> None:
    words = shlex.split(block.splitlines()[0])
    settings = load_settings(words[words.index("--model") + 1], config=ROOT / words[words.index("--config") + 1])
    found = audit(settings)
    rows = re.findall(r"^\| `([^`]+)` \| (\S+) \|", block, re.MULTILINE)
    assert len(rows) > 8
    wrong = [
        (key, stated, number(found.number(key)))
        for key, stated in rows
        if number(found.number(key)) != pytest.approx(float(stated), rel=5e-3, abs=1e-12)
    ]
    assert wrong == []


def test_the_failing_state_ends_as_the_page_says() -> None:
    assert len(BLOCKS) == 2
    assert "It ends with exit code 1: lost poses are replaced." in PAGE
