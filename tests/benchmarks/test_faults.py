"""The benchmark of faults judges as it says, and its cases run, replay and can be missed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.fault_cases import CASES
from benchmarks.fault_run import PLACES, Truth, bifusion_truth, judge, run_case, spec_of
from benchmarks.faults import cases, main, totals
from bifusion_diag.config import load_settings
from bifusion_diag.model.build import build_model
from bifusion_diag.replay.incident import KINDS, Cause, Incident, Reproduction, SampleShare, Trigger
from bifusion_diag.training.faults import FAULTS, Faults

TRUTH = Truth("x/y", "data", ("nonfinite-loss",), 40, False, ("layers.1",), "mask", (3,))


def incident(step: int = 40, kind: str = "nonfinite-loss", module: str = "layers.1.mlp", sample: int = 3) -> Incident:
    return Incident(
        step,
        kind,
        (Trigger(kind, "bad"),),
        cause=Cause(module, "forward"),
        terms=("mask",),
        samples=(SampleShare(sample, None, "why"),),
        reproduction=Reproduction(True),
        seconds=2.0,
    )


def test_what_is_right() -> None:
    found = judge(TRUTH, [incident()], 0.1)
    judged = (found.detected, found.kind_right, found.module_right, found.term_right, found.sample_right)
    assert judged == (True,) * 5
    assert found.ratio == pytest.approx(20)
    assert found.false_alarms == []


@pytest.mark.parametrize(
    ("wrong", "attribute"),
    [
        ({"step": 41}, "detected"),
        ({"kind": "loss-spike"}, "kind_right"),
        ({"module": "layers.10"}, "module_right"),
        ({"sample": 2}, "sample_right"),
    ],
)
def test_what_is_wrong(wrong: dict[str, object], attribute: str) -> None:
    found = judge(TRUTH, [incident(**wrong)], 0.1)  # type: ignore[arg-type]
    assert getattr(found, attribute) is False


def test_silent_faults_have_ten_steps_and_what_is_never_found_is_missed() -> None:
    silent = replace(TRUTH, silent=True)
    assert [judge(silent, [incident(step=step)], 0.1).detected for step in (40, 50, 51)] == [True, True, False]
    assert judge(silent, [], 0.1).detected is False


def test_alarms_before_a_fault_and_in_controls_are_false_and_innocents_are_counted() -> None:
    early = judge(TRUTH, [incident(step=12), incident()], 0.1)
    assert early.detected
    assert len(early.false_alarms) == 1
    control = judge(replace(TRUTH, place="healthy"), [incident()], 0.1)
    assert len(control.false_alarms) == 1
    nobody = judge(replace(TRUTH, samples=()), [incident()], 0.1)
    assert nobody.sample_right is False
    found = totals([early, control, nobody])
    assert found["controls without an alarm"] == "0 of 1 (0%)"
    assert found["no innocent sample named"] == "0 of 1 (0%)"


def test_there_are_as_many_cases_as_promised_and_their_kinds_exist() -> None:
    every = cases(("images", "sequences", "fusion", "bifusion", "ranks"))
    healthy = [case for case in CASES.values() if case.place == "healthy"]
    assert len(healthy) >= 12
    assert len(every) - len(healthy) >= 24
    assert [case.name for case in CASES.values() if set(case.kinds) - KINDS.keys()] == []


def test_places_are_those_of_the_model() -> None:
    model = build_model(load_settings("bifusion", scale="small"))
    specs = [spec_of(fault) for fault in FAULTS.values() if fault.where != "rank"]
    placed = Faults(specs, model, batch_size=4).injections
    assert [i.where for i in placed if i.fault.name in PLACES] == [
        PLACES[i.fault.name] for i in placed if i.fault.name in PLACES
    ]
    assert bifusion_truth(FAULTS["nan-output"]).modules == (PLACES["nan-output"],)


def test_a_case_runs_and_its_capsule_replays_in_a_new_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    chosen = ["images/nan-pixel", "fusion/from-scratch"]
    assert main(["--only", *chosen, "--json", str(out)]) == 0
    found = {case["truth"]["name"]: case for case in json.loads(out.read_text())["cases"]}
    assert found["images/nan-pixel"]["samples"] == [5]
    assert found["images/nan-pixel"]["replayed"] is True
    assert found["fusion/from-scratch"]["false_alarms"] == []
    assert "capsules bit-identical in a new process       1 of 1 (100%)" in capsys.readouterr().out


def test_a_case_without_its_fault_is_missed(tmp_path: Path) -> None:
    case = replace(CASES["images/nan-pixel"], edit=lambda job, batch: batch)
    assert run_case(case, tmp_path).detected is False
