"""What the benchmark of faults makes of findings: every fault has its right rules, and a wrong one counts as wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fault_cases import CASES
from benchmarks.fault_findings import RIGHT, right_rules, score
from benchmarks.fault_run import Outcome, run_case, truth_of
from benchmarks.faults import WORKLOADS, cases, finding_totals
from bifusion_diag.diagnosis.rules import page_of


def test_every_fault_has_its_right_rules_and_they_exist() -> None:
    healthy = {name for name, case in CASES.items() if case.place == "healthy"}
    faults = [name for name in cases(WORKLOADS) if name not in healthy and not name.endswith("-from-scratch")]
    assert len(faults) > 90
    for name in faults:
        assert all(page_of(rule) for rule in right_rules(name)), name


def test_a_finding_and_its_remedy_are_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])  # the capsule's entry is found from there
    outcome = run_case(CASES["fusion/nan-point"], tmp_path)
    found = score(outcome, remedies=True)
    assert found.rule_right
    assert found.restored is not False
    assert found.remedy
    monkeypatch.setitem(RIGHT, "fusion/nan-point", ("incident-lr-jump",))
    wrong = score(outcome, remedies=False)
    assert not wrong.rule_right
    assert wrong.restored is None
    assert finding_totals([found, wrong])["finding: right rule"] == "1 of 2 (50%)"


def test_a_fault_that_was_missed_has_no_finding() -> None:
    found = score(Outcome(truth_of(CASES["images/term-turned"]), detected=False), remedies=True)
    assert (found.rule, found.rule_right, found.term_right) == ("", False, False)
