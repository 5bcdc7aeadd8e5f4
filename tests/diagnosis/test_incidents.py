"""Recorded incidents become findings that say each thing once, and the verdict names their cause."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bifusion_diag.diagnosis import assess_run, compare_runs
from bifusion_diag.diagnosis.findings import Finding
from bifusion_diag.diagnosis.incidents import GuiltySample, incidents_of
from bifusion_diag.record.codec import decode, encode
from bifusion_diag.record.schema import Event, IncidentFiles, Run
from bifusion_diag.replay.incident import Cause, Incident, Reproduction, SampleShare, Trigger

MakeRun = Callable[..., Run]
STEPS = 100
CRITERION = Cause("criterion", "loss", "aten.mean", "loss.py:18: return x.mean()")
SCENE = SampleShare(1, "scene-7", "without it the step is finite", ("empty crop",))


def incident(step: int, kind: str = "nonfinite-loss", mechanism: str = "empty-selection", **more: Any) -> Incident:
    trigger = Trigger(kind, "loss term mask is NaN", term="mask", value=float("nan"))
    made = Incident(
        step, kind, (trigger,), CRITERION, ("mask",), mechanism=mechanism, explanation="A mean over nothing is NaN.",
        evidence={"elements": 0, "ratio": 2.5, "the diagnosis took, in step times": 6.0},
        reproduction=Reproduction(True, "2 losses", ""),
    )  # fmt: skip
    return replace(made, **more)


def event(found: Incident) -> Event:
    """As a record gives it back."""
    return Event(found.step, found.family, found.message, decode(encode(found.facts())))


def run_with(make_run: MakeRun, incidents: Sequence[Incident], bad: Sequence[int] = (), **more: Any) -> Run:
    """A run of 100 steps whose term "mask" is NaN at some, its gradient norm finite."""
    mask = np.full(STEPS, 0.5)
    mask[list(bad)] = np.nan
    series = {"loss/mask/raw": mask, "loss/mask/weighted": mask, "loss/total": mask, "train/grad_norm": 5.0}
    return make_run({**series, **more.pop("series", {})}, events=[event(found) for found in incidents], **more)


def of_rule(findings: Sequence[Finding], rule: str) -> list[Finding]:
    return [found for found in findings if found.rule == rule]


def test_an_incident_is_read_as_it_was_told(make_run: MakeRun) -> None:
    told = incident(41, samples=(SCENE,), action="skip", harmless=True, capsule="/runs/a.incidents/000041")
    spike = incident(7, "gradient-spike", "lr-jump", cause=Cause(None, "update"), terms=())
    spike = replace(spike, triggers=(Trigger("gradient-spike", "up", module="head", value=9.5, limit=2.5),))
    run = replace(run_with(make_run, [told, spike]), incident_files={41: IncidentFiles({"modules": []}, [{"a": 1}])})
    early, late = incidents_of(run)
    assert (early.step, early.family, early.kind, early.value, early.limit) == (7, "spike", "gradient-spike", 9.5, 2.5)
    assert (early.alarm, early.place, early.heading) == (
        "gradient spike of head", "the update", "The learning rate has jumped"
    )  # fmt: skip
    assert (late.step, late.family, late.value, late.identical) == (41, "non-finite", None, True)
    assert (late.module, late.op, late.source) == ("criterion", "aten.mean", "loss.py:18: return x.mean()")
    assert (late.heading, late.place) == ("A mean over nothing (criterion)", "criterion")
    assert late.samples == (GuiltySample("scene-7", "without it the step is finite", ("empty crop",)),)
    assert (late.action, late.harmless, late.capsule) == ("skip", True, "/runs/a.incidents/000041")
    assert (late.trials, late.tables) == (({"a": 1},), {"modules": []})


HOSTILE: list[Any] = [
    None,
    7,
    "text",
    [1, [2]],
    {"a": {"b": None}},
    float("nan"),
    10**400,
    True,
    [None, "x", {"name": 3}],
]
FIELDS = (
    "kind", "triggers", "cause", "terms", "samples", "mechanism", "explanation", "evidence", "reproduction", "action",
    "harmless", "capsule", "title",
)  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: type(value).__name__)
def test_damaged_and_unknown_fields_are_passed_over(make_run: MakeRun, value: Any) -> None:
    whole = incident(5).facts()["incident"]
    stored: list[Any] = [{**whole, field: value, "of a later version": value} for field in FIELDS]
    stored += [
        {},
        {"incident": value},
        dict.fromkeys(FIELDS, value),
        {**whole, "triggers": [value], "samples": [value]},
    ]
    stored += [{**whole, "cause": dict.fromkeys(("module", "direction", "op", "source"), value)}]
    stored += [{**whole, "triggers": [{"kind": value, "value": value, "module": value}]}]
    events = [Event(step, "non-finite", "bad", {"incident": one}) for step, one in enumerate([*stored, value])]
    trials: list[Mapping[str, Any]] = [{"patch": value, "helps": True}, {"patch": {"a": value}, "helps": value}]
    run = make_run({"loss/total": np.ones(STEPS), "train/grad_norm": np.ones(STEPS)}, events=events)
    run = replace(run, incident_files={step: IncidentFiles({}, trials) for step in range(STEPS)})
    assert len(incidents_of(run)) == len(stored) + isinstance(value, dict)
    assert assess_run(run).findings  # whatever they say, they are told


def test_one_finding_a_mechanism_and_place(make_run: MakeRun) -> None:
    other = incident(60, cause=Cause("head", "forward"))
    found = assess_run(run_with(make_run, [incident(31), incident(46, samples=(SCENE,)), other], [31, 46, 60])).findings
    first, second = of_rule(found, "incident-empty-selection")
    assert (first.title, first.steps, first.count) == ("A mean over nothing (criterion)", (31, 46), 2)
    assert (second.title, second.steps, second.count) == ("A mean over nothing (head)", (60, 60), 1)
    assert "2 of 2 steps ran again bit for bit" in first.mechanism
    assert "Step 60 ran again bit for bit" in second.mechanism
    assert first.samples == ("scene-7 [empty crop]",)
    assert [item.label for item in first.evidence] == ["steps taken apart", "first step", "elements", "ratio"]
    assert of_rule(found, "nonfinite-loss") == []  # the same steps, with less
    one_left = assess_run(run_with(make_run, [incident(31)], [31, 80])).findings
    (left,) = of_rule(one_left, "nonfinite-loss")
    assert left.steps == (80, 80)


@pytest.mark.parametrize(
    ("changes", "bad", "severity"),
    [
        ({}, [10], "error"),
        ({"harmless": True}, [10], "warning"),
        ({"kind": "gradient-spike"}, [], "warning"),
        ({"kind": "nonfinite-input"}, [], "warning"),  # the step was fine all the same
        ({"kind": "nonfinite-input"}, [10], "error"),
        ({"kind": "nonfinite-buffers"}, [], "error"),
    ],
)
def test_how_bad_it_is(make_run: MakeRun, changes: dict[str, Any], bad: list[int], severity: str) -> None:
    (found,) = of_rule(
        assess_run(run_with(make_run, [incident(10, **changes)], bad)).findings, "incident-empty-selection"
    )
    assert found.severity == severity


def test_an_unknown_mechanism_is_told_where_no_other_rule_tells_it(make_run: MakeRun) -> None:
    frozen = Trigger("frozen-module", "head does not require a gradient any more", module="head")
    silent = Incident(20, "frozen-module", (frozen,), Cause("head", "graph"))
    nan = Incident(30, "nonfinite-loss", (Trigger("nonfinite-loss", "mask is NaN"),))
    found = assess_run(run_with(make_run, [silent, nan], [30])).findings
    (one,) = [finding for finding in found if finding.rule.startswith("incident-")]
    assert (one.rule, one.title) == ("incident-frozen-module", "Frozen module (head)")
    assert "does not require a gradient any more" in one.mechanism
    assert [finding.steps for finding in of_rule(found, "nonfinite-loss")] == [(30, 30)]


def test_an_unknown_mechanism_whose_place_was_found_is_told_with_its_place(make_run: MakeRun) -> None:
    nan = Incident(30, "nonfinite-loss", (Trigger("nonfinite-loss", "mask is NaN"),), Cause("head", "forward"))
    found = assess_run(run_with(make_run, [nan], [30])).findings
    (one,) = [finding for finding in found if finding.severity == "error"]
    assert (one.rule, one.module, one.steps) == ("incident-nonfinite-loss", "head", (30, 30))


def test_what_is_seen_from_outside_joins_the_incident(make_run: MakeRun) -> None:
    at = np.isin(np.arange(STEPS), [31, 46]).astype(float)
    nan = np.isin(np.arange(STEPS), [2, 9, 50]).astype(float)
    series = {"matching/empty": at, "data/pose/nonfinite": nan, "projection/nan": nan, "projection/inf": 0.0}
    lost = incident(2, "nonfinite-input", "nonfinite-input", cause=Cause(None, "data"), terms=())
    settings = {"model": {"projection": {"sanitize": "clamp"}}, "losses": {"instance": {"empty_match": "nan"}}}
    run = run_with(make_run, [incident(31), lost], [31, 46], series=series, settings=settings)
    found = assess_run(run).findings
    assert {finding.rule for finding in found} & {"empty-match", "data-nonfinite", "projection-nonfinite"} == set()
    (pose,), (mean,) = of_rule(found, "incident-nonfinite-input"), of_rule(found, "incident-empty-selection")
    assert (pose.steps, pose.count, pose.remedy) == ((2, 50), 3, {"model.projection.sanitize": "strict"})
    assert "The batches hold NaN or infinity at 3 steps." in pose.mechanism
    assert "pose, over all steps" in [item.label for item in pose.evidence]
    assert (mean.steps, mean.count, mean.remedy) == ((31, 46), 2, {"losses.instance.empty_match": "zero"})
    later = run_with(make_run, [incident(90)], [90], series=series, settings=settings)
    kept = assess_run(later).findings  # other steps: another thing
    assert len(of_rule(kept, "empty-match")) == len(of_rule(kept, "data-nonfinite")) == 1


def test_a_remedy_that_was_tried_goes_before_one_that_was_not(make_run: MakeRun) -> None:
    settings = {"losses": {"instance": {"empty_match": "nan"}}}
    run = run_with(make_run, [incident(31), incident(46)], [31, 46], settings=settings)
    (found,) = of_rule(assess_run(run).findings, "incident-empty-selection")
    assert (found.remedy, found.tried) == ({"losses.instance.empty_match": "zero"}, False)
    assert assess_run(run).verdict.tried is False
    trials = [  # as `replay --what-if` writes them, the best first
        {"name": "mine", "patch": {}, "code": ["loss = ..."], "helps": True, "result": "finite, no spike"},
        {"name": "lower-lr", "patch": {"optim.lr": 2e-05}, "code": [], "helps": True, "result": "finite, no spike"},
        {"name": "as it was", "patch": {}, "code": [], "helps": False, "result": "1 of 4 steps not finite"},
    ]
    tried = replace(run, incident_files={46: IncidentFiles({}, trials)})
    (found,) = of_rule(assess_run(tried).findings, "incident-empty-selection")
    assert (found.remedy, found.tried) == ({"optim.lr": 2e-05}, True)
    assert found.mechanism.endswith("Tried on step 46: lower-lr, finite, no spike.")
    verdict = assess_run(tried).verdict
    assert (verdict.remedy, verdict.tried) == ({"optim.lr": 2e-05}, True)
    useless = replace(run, incident_files={46: IncidentFiles({}, trials[2:])})
    assert assess_run(useless).verdict.tried is False


def test_the_verdict_names_the_cause_of_most_bad_steps(make_run: MakeRun) -> None:
    data = incident(50, cause=Cause(None, "data"), mechanism="wrong-labels")
    run = run_with(make_run, [incident(31), incident(46, samples=(SCENE,)), data], [31, 46, 50, 70])
    verdict = assess_run(run).verdict
    assert verdict.detail == "2 of 4 start in criterion (a mean over nothing), at step 46 on scene-7 [empty crop]."
    baseline = run_with(make_run, [], name="calm")
    assert compare_runs(baseline, run).verdict.detail.startswith(verdict.detail)
    named = assess_run(run_with(make_run, [incident(46, samples=(SCENE,))], [46])).verdict
    assert named.detail == "It starts in criterion (a mean over nothing), on scene-7 [empty crop]."
    assert assess_run(run_with(make_run, [], [31, 46])).verdict.detail == "2 of 2 start in loss term mask."
    unknown = assess_run(run_with(make_run, [incident(31, mechanism="unknown")], [31])).verdict
    assert unknown.detail == "It starts in criterion."  # its place was found


def test_the_verdict_takes_the_remedy_of_the_cause_that_it_names(make_run: MakeRun) -> None:
    """Not that of an earlier incident at a step that was fine."""
    lost = incident(2, "nonfinite-input", "nonfinite-input", cause=Cause(None, "data"), terms=())
    settings = {"model": {"projection": {"sanitize": "clamp"}}, "losses": {"instance": {"empty_match": "nan"}}}
    means = [incident(step, harmless=True) for step in (31, 46)]
    verdict = assess_run(run_with(make_run, [lost, *means], [31, 46], settings=settings)).verdict
    assert verdict.remedy == {"losses.instance.empty_match": "zero"}


def test_what_explains_bad_steps_goes_before_what_is_earlier(make_run: MakeRun) -> None:
    masked = np.zeros(STEPS)
    masked[3] = 2
    run = run_with(
        make_run,
        [incident(40, harmless=True), incident(60, harmless=True)],
        bad=(40, 60),
        series={"attention/decoder.layers.0/masked_rows": masked},
    )
    findings = assess_run(run).findings
    same = [found for found in findings if found.severity == "warning"]
    assert [found.rule for found in same][:2] == ["incident-empty-selection", "attention-masked-rows"]
    assert [found.bad_steps for found in same][:2] == [2, 0]


def never_learns(end: str, op: str, since: int) -> Incident:
    trigger = Trigger("detached-module", "has never got a gradient", module="decoder.mask", since=since)
    cause = Cause(end, "graph", op)
    return incident(
        11, "detached-module", "detached", triggers=(trigger,), cause=cause, terms=(), samples=(), harmless=False
    )


@pytest.mark.parametrize(
    ("end", "op", "since", "severity"),
    [
        ("decoder", "no_grad", 0, "warning"),  # a mask that is made without a gradient by design
        ("decoder", "no_grad", 5, "error"),  # it had a gradient
        ("decoder.mask.0", "no_grad", 0, "error"),  # the module itself runs without
        ("decoder", "Tensor.detach", 0, "error"),
    ],
)
def test_a_part_that_feeds_only_a_no_grad_block(
    make_run: MakeRun, end: str, op: str, since: int, severity: str
) -> None:
    (found,) = of_rule(assess_run(run_with(make_run, [never_learns(end, op, since)])).findings, "incident-detached")
    assert found.severity == severity
