"""The page's incidents: what it says of them, what it escapes, and that no run makes it large."""

from __future__ import annotations

import html as escapes
import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from bifusion_diag.diagnosis import assess_run, compare_runs
from bifusion_diag.experiments.what_if import AS_IT_WAS, WhatIf, save
from bifusion_diag.record import Event, Run, RunHeader, RunWriter, incident_folder, load_run
from bifusion_diag.record.schema import IncidentFiles
from bifusion_diag.replay.incident import Cause, Incident, Reproduction, SampleShare, Trigger
from bifusion_diag.replay.trials.what_if import Change, Trial, TrialStep
from bifusion_diag.reports import print_run, render_comparison, render_run
from bifusion_diag.reports.incidents import AROUND, LENGTH, SHOWN, assignment, incident_groups

SOURCE = "loss.py:18: return x.mean()"
MODULES = [f"body.{number}" for number in range(20)]
ATTACK = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7*7 }}"


def incident(step: int, **more: Any) -> Incident:
    made = Incident(
        step, "nonfinite-loss", (Trigger("nonfinite-loss", "loss term mask is NaN", term="mask", value=float("nan")),),
        Cause("body.12", "loss", "aten.mean", SOURCE), ("mask",),
        (SampleShare(1, "scene 7", "alone, it is nan", ("a note",)),),
        "empty-selection", "A mean over nothing is 0/0.",
        {"first bad operation": f"aten.mean ({SOURCE})", "sample scene 7": "alone, it is nan", "rows": 0,
         "term mask": "its value is nan", "largest": float("inf"), "the diagnosis took, in step times": 6.2},
        reproduction=Reproduction(True, "2 losses"), action="skip", capsule="/my runs/a.incidents/000041",
    )  # fmt: skip
    return replace(made, **more)


def written(path: Path, *incidents: Incident) -> Run:
    """A run of 60 steps with these incidents."""
    steps = np.arange(60)
    with RunWriter(path, RunHeader("run")) as writer:
        writer.append(steps, {"loss/total": np.exp(-steps / 9), "train/grad_norm": 5 + np.sin(steps)})
        for found in incidents:
            writer.event(found.step, found.family, found.message, **found.facts())
        writer.finish("completed", measures={})
    return load_run(path)


def capsule(path: Path, step: int, tables: Mapping[str, Any]) -> Path:
    folder = incident_folder(path) / f"{step:06d}"
    folder.mkdir(parents=True)
    (folder / "capsule.json").write_text(json.dumps({"incident": {"tables": tables}}))
    return folder


def page_of(run: Run) -> str:
    return render_run(assess_run(run), run)


def test_a_run_without_incidents_has_no_such_section(tmp_path: Path, baseline: Run, candidate: Run) -> None:
    for text in (page_of(candidate), render_comparison([compare_runs(baseline, candidate)], baseline, [candidate])):
        assert "<h2>Incidents" not in text
        assert '<details class="incident' not in text
    with_one = written(tmp_path / "run.json", incident(41))
    without = replace(with_one, events=[event for event in with_one.events if "incident" not in event.data])
    there, gone = page_of(with_one), page_of(without)
    start, stop = there.index('<section id="incidents">'), there.index('<section id="where">')
    rest = there[:start] + there[stop:]
    after = "<h2>Where: gradients by module</h2>"  # nothing from there on depends on incidents, but for the settings
    said = [text.split(after)[1].split("<script")[0] for text in (rest, gone)]
    assert said[0] == said[1]


def test_what_an_incident_says(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    rows = [
        {"name": name, "input_absmax": 1.5, "output_absmax": 2.5, "output_bad": 3 if number >= 12 else 0}
        for number, name in enumerate(MODULES)
    ]
    rows[2] |= {"output_bad": 7, "output_absmax": "Infinity"}  # on purpose, such as a mask: not where it begins
    rows[12] |= {"output_absmax": None}
    capsule(path, 41, {"modules": rows})
    (group,) = incident_groups(["run"], [written(path, incident(41))])
    (article,) = group.articles
    assert (article.step, article.heading) == (41, "A mean over nothing (body.12), scene 7")
    assert article.rows == [
        ("begins in", "body.12 · loss · aten.mean"),
        ("source", SOURCE),
        ("loss term", "mask"),
        ("sample", "scene 7 [a note]: alone, it is NaN"),
        ("update", "left out"),
        ("rows", "0"),
        ("term mask", "its value is NaN"),
        ("largest", "∞"),
    ]  # what only repeats source or sample is not said twice
    assert article.again == (
        "The step ran again, and every loss and gradient was the same, bit for bit. "
        "The diagnosis took 6.2 times as long as the step."
    )
    assert article.command == "bifusion-diag replay '/my runs/a.incidents/000041' --trace"
    assert article.trace is not None
    assert [line.module for line in article.trace.lines] == MODULES[12 - AROUND : 12 + AROUND + 1]
    assert [line.module for line in article.trace.lines if line.here] == ["body.12"]
    (here,) = (line for line in article.trace.lines if line.here)
    assert (here.inputs, here.outputs) == ("1.50", "3 non-finite")
    assert (article.trace.gradients, article.trace.left_out) == (False, (6, 1))


def test_the_trace_without_a_module_is_that_of_the_first_bad_one(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    rows: list[dict[str, Any]] = [{"name": name, "gradient_norm": 0.5, "gradient_bad": 0} for name in MODULES]
    rows[4]["gradient_bad"] = rows[9]["gradient_bad"] = 2
    folder = capsule(path, 41, {"modules": rows})
    run = written(path, incident(41, cause=None))
    (article,) = incident_groups(["run"], [run])[0].articles
    assert article.trace is not None
    assert [line.module for line in article.trace.lines if line.here] == ["body.9"]  # a backward comes from the end
    assert article.trace.gradients
    (folder / "capsule.json").write_text(json.dumps({"incident": {"tables": {"modules": [{"name": "a"}, 3, None]}}}))
    (article,) = incident_groups(["run"], [load_run(path)])[0].articles
    assert article.trace is None  # all is finite, and the place is unknown


@pytest.mark.parametrize(
    ("reproduction", "said"),
    [
        (Reproduction(False, "2 losses", "loss mask"), "as it had run. The first difference: loss mask."),
        (Reproduction(None, "", "no batch was given"), "The step was not run again: no batch was given."),
        (Reproduction(None), ""),
    ],
)  # fmt: skip
def test_whether_it_ran_again(tmp_path: Path, reproduction: Reproduction, said: str) -> None:
    run = written(tmp_path / "run.json", incident(41, reproduction=reproduction, evidence={}))
    (article,) = incident_groups(["run"], [run])[0].articles
    assert article.again.endswith(said)
    assert bool(article.again) == bool(said)


def test_trials_as_the_what_if_command_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    folder = capsule(path, 41, {})
    good = TrialStep(2.0, {"mask": 0.5}, 6.853, updated=True, spike=False, seconds=1.0)
    bad = replace(good, loss=float("nan"), grad_norm=float("inf"))
    patch = {"data.exclude": ["scene 7"], "losses.empty": "zero"}
    drop = Trial(Change("drop", patch=patch, gives_up=("what it teaches",)), (good, good), 9.36, cost=0.79)
    same = Trial(Change(AS_IT_WAS), (bad, good), None, cost=1.0)
    failed = Trial(Change("half"), (), None, error="it raised RuntimeError: <b>")
    refused = Trial(Change("never"), refused="no setting does it")

    class Stored:
        """What of a capsule the files need."""

        step, settings, incident = 41, {"preset": "lite", "scale": "small"}, incident(41)

        def __init__(self) -> None:
            self.folder = folder

    save(WhatIf(Stored(), 1, [drop, same, failed, refused], [drop], "", "the loss"))  # type: ignore[arg-type]
    run = written(path, incident(41))
    (article,) = incident_groups(["run"], [run])[0].articles
    first, second, third = article.trials
    assert (first.name, first.helps, first.settings) == (
        "drop", True, [("data.exclude", '["scene 7"]'), ("losses.empty", "zero")]
    )  # fmt: skip
    assert (first.result, first.grad_norm, first.loss, first.cost) == (
        "finite, no spike; gives up what it teaches", "6.85", "9.36", "0.790"
    )  # fmt: skip
    assert (second.result, second.grad_norm, second.loss) == ("1 of 2 steps not finite, no spike", "∞", "none")
    assert (third.grad_norm, third.loss, third.cost, third.helps) == ("none", "none", "–", False)
    text = page_of(run)
    assert '<span class="pass">drop</span>' in text
    assert "it raised RuntimeError: &lt;b&gt;" in text
    command = escapes.unescape(
        text[text.index('<pre class="copy">--set') :].split("</pre>")[0].removeprefix('<pre class="copy">')
    )
    words = shlex.split(command)
    assert words[0::2] == ["--set", "--set"]
    read = {key: yaml.safe_load(value) for key, value in (word.split("=", 1) for word in words[1::2])}
    assert read == patch
    assert "It was tried on a bad step" in text


def test_an_assignment_is_one_word_of_a_shell() -> None:
    for value in ("zero", 1, 0.5, True, None, ["a b", 'c"d'], {"x": [1]}, "; rm -rf ~", "$(id)"):
        (word,) = shlex.split(assignment("some.key", value))
        key, _, text = word.partition("=")
        assert (key, yaml.safe_load(text)) == ("some.key", value)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    rows = [{"name": ATTACK, "output_bad": ATTACK, "output_absmax": ATTACK, "input_absmax": [ATTACK]}]
    folder = capsule(path, 41, {"modules": rows})
    trial = {"name": ATTACK, "patch": {ATTACK: ATTACK}, "result": ATTACK, "grad_norm": ATTACK, "loss": {"a": ATTACK},
             "gives_up": [ATTACK], "cost": ATTACK, "helps": True}  # fmt: skip
    (folder / "what_if.json").write_text(json.dumps({"trials": [trial, {}, {"patch": 3, "gives_up": 4}]}))
    bad = incident(
        41, kind=ATTACK, triggers=(Trigger(ATTACK, ATTACK),), cause=Cause(ATTACK, "loss", ATTACK, ATTACK),
        terms=(ATTACK,), samples=(SampleShare(0, ATTACK, ATTACK, (ATTACK,)),), mechanism=ATTACK, explanation=ATTACK,
        evidence={ATTACK: ATTACK}, action=ATTACK, capsule=ATTACK, reproduction=Reproduction(False, ATTACK, ATTACK),
    )  # fmt: skip
    run = written(path, bad)
    text = page_of(run)
    assert "<script>alert" not in text
    assert "<img" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "{{ 7*7 }}" in text
    assert render_comparison([compare_runs(run, run)], run, [run]).count("<script>alert") == 0


HUGE = '<&"' * 60_000


def test_no_run_makes_a_large_page(tmp_path: Path) -> None:
    """300 incidents in 300 places, every text, list and table of any length."""
    path = tmp_path / "run.json"
    rows = [{"name": f"{HUGE}{number}", "output_bad": HUGE, "gradient_norm": HUGE} for number in range(60)]
    trials = [{"name": HUGE, "patch": dict.fromkeys(map(str, range(99)), HUGE), "result": HUGE}] * 99
    run = written(path, incident(1))
    stored = {**incident(1).facts()["incident"], "explanation": HUGE, "title": HUGE, "samples": [{"name": HUGE}] * 99}
    stored |= {"terms": [HUGE] * 99, "evidence": {f"{number}{HUGE}": [HUGE] * 9 for number in range(60)}}
    events = [
        Event(step, "non-finite", HUGE, {"incident": {**stored, "cause": {"module": f"{step}{HUGE}"}}})
        for step in range(300)
    ]
    files = {step: IncidentFiles({"modules": rows}, trials) for step in range(300)}
    large = replace(run, events=events, incident_files=files)
    (group,) = incident_groups(["run"], [large])
    longest = max(len(text) for one in group.articles for row in one.rows for text in row)
    assert group.left_out == 300 - len(group.articles) < 300
    assert longest == LENGTH
    size = len(page_of(large).encode())
    assert size < 3_000_000
    text = render_comparison([compare_runs(large, large)], large, [large])
    size = len(text.encode())
    assert size < 3_000_000


def test_of_many_incidents_the_first_are_shown(tmp_path: Path) -> None:
    run = written(tmp_path / "run.json", *(incident(step) for step in range(30)))
    (group,) = incident_groups(["run"], [run])
    assert [article.step for article in group.articles] == list(range(SHOWN))
    assert group.left_out == 30 - SHOWN
    text = render_comparison([compare_runs(run, run)], run, [run])
    assert text.count('<details class="incident"') == SHOWN
    assert text.count(f"{30 - SHOWN // 2} more are in the record.") == 2


def test_the_terminal_says_whether_a_remedy_was_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    folder = capsule(path, 41, {})
    trials = [{"name": "lower-lr", "patch": {"optim.lr": 2e-5}, "helps": True, "result": "finite, no spike"}]
    (folder / "what_if.json").write_text(json.dumps({"trials": trials}))
    print_run(Console(width=200), assess_run(written(path, incident(41))))
    assert "Tried on a bad step, and it helped: --set optim.lr=2e-05" in capsys.readouterr().out
