"""The audit as a whole: what it leaves behind, what it prints, its rules' pages."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bifusion_diag.config import load_settings
from bifusion_diag.diagnosis.rules.pages import SECTIONS, page_of, rule_ids
from bifusion_diag.diagnosis.thresholds import Thresholds
from bifusion_diag.experiments.audit import Audit, audit
from bifusion_diag.experiments.audit.bench import Bench
from bifusion_diag.experiments.audit.slopes import temperature
from bifusion_diag.experiments.audit.terminal import patch, print_audit
from tests.experiments.audit.conftest import tiny

ROOT = Path(__file__).resolve().parents[3]
Make = Callable[..., Bench]
OWN = (
    "few-points", "few-row-batchnorm", "frozen-in-optimiser", "frozen-with-gradient", "labels-missing",
    "not-in-optimiser", "pose-not-rigid", "stage-too-short", "step-fails", "trainable-without-gradient",
)  # fmt: skip


def printed(found: Audit, width: int = 100) -> str:
    stream = StringIO()
    print_audit(Console(file=stream, width=width), found)
    return stream.getvalue()


def test_the_failing_state_on_flawed_scenes_fails_for_the_right_reasons(fragile: Audit) -> None:
    errors = {finding.rule for finding in fragile.findings if finding.severity == "error"}
    assert errors == {"projection-nonfinite", "empty-match"}
    assert "near-zero-norm" in {finding.rule for finding in fragile.findings}
    assert fragile.findings[0].severity == "error"


def test_it_fits_a_screen_and_the_json_is_strict(fragile: Audit, clean: Audit) -> None:
    for found in (fragile, clean):
        text = printed(found)
        assert len(text.splitlines()) < 60
        assert found.findings[0].title in text
        stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert stored["counts"]["error"] == found.count("error")
        assert {section["id"] for section in stored["sections"]} >= {"flow", "data", "sanitise", "mechanisms"}
    assert "--set losses.instance.empty_match=zero" in printed(fragile)


def test_nothing_is_left_behind() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    flag = torch.are_deterministic_algorithms_enabled()
    found = audit(tiny("baseline-5cm", model__decoder__semantic_classes=10), scenes=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (threads, flag)
    assert list(Path().iterdir()) == []
    # the rooms have more classes than this model: the step fails, and what needs it says so
    assert {"step-fails", "labels-out-of-range"} <= {one.rule for one in found.findings if one.severity == "error"}
    assert found.section("coarse").not_measured is not None
    assert "not measured" in printed(found)


def test_every_rule_of_the_audit_has_a_page() -> None:
    source = "".join(path.read_text() for path in (ROOT / "bifusion_diag/experiments/audit").glob("*.py"))
    used = set(re.findall(r'report\(\s*"([a-z-]+)"', source)) | {"clip-leak", "frozen-with-gradient"}
    assert set(OWN) <= used | {"schedule-fights-warm-up"}
    assert set(OWN) <= set(rule_ids())


@pytest.mark.parametrize("rule", OWN)
def test_a_page_has_all_sections(rule: str) -> None:
    page = page_of(rule)
    assert page.startswith(f"# {rule}\n")
    assert tuple(re.findall(r"^## (.*)$", page, re.MULTILINE)) == SECTIONS


def test_no_number_and_no_title_is_cut_where_80_characters_are_shown(clean: Audit, fragile: Audit) -> None:
    for found in (clean, fragile):
        text = printed(found, width=80)
        assert "…" not in text
        assert "Gradient norm by part and term, unweighted\n" in text
    assert "|dL/dcos| of clip_align" in printed(clean)
    assert "|dL/dcos| of clip_align" not in printed(audit(tiny("baseline-5cm"), scenes=1))  # it has no such loss


def test_one_bound_for_what_audit_and_record_both_look_for(bench: Make) -> None:
    own = bench(losses__clip_align__temperature=0.02)
    assert [one.rule for one in temperature(own).findings] == ["temperature-gain"]
    own.thresholds = Thresholds(temperature_gain=100.0)
    assert temperature(own).findings == ()


def test_a_remedy_can_be_pasted_whatever_scenes_are_called() -> None:
    names = ["room 1", "it's, a [room]: #2"]
    words = shlex.split(patch({"data.exclude": names, "optim.lr": 1e-05}))
    assert words[::2] == ["--set", "--set"]
    settings = load_settings("bifusion", overrides=words[1::2])
    assert (list(settings.data.exclude), settings.optim.lr) == (names, 1e-05)
