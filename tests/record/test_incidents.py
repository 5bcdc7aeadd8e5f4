"""What lies beside a run of its incidents is read; whatever is damaged is left out, and never costs the record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bifusion_diag.record import RunHeader, RunWriter, incident_folder, load_run
from bifusion_diag.record import incidents as module
from bifusion_diag.record.incidents import read_incident_files
from bifusion_diag.replay.incident import Cause, Incident, Reproduction, SampleShare, Trigger

ROWS = [{"name": "head", "output_absmax": 2.5, "output_bad": 1}, {"name": "loss", "output_absmax": "Infinity"}]


def capsule(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "capsule.json").write_text(content, encoding="utf-8")
    return folder


def test_tables_and_trials_are_read_by_step(tmp_path: Path) -> None:
    run = tmp_path / "run.json"
    assert incident_folder(run) == tmp_path / "run.incidents" == incident_folder(tmp_path / "run.record")
    assert read_incident_files(run) == {}
    folder = incident_folder(run)
    capsule(folder / "000012", json.dumps({"incident": {"tables": {"modules": ROWS}}, "later": 1}))
    trials = [{"name": "skip", "helps": True}, "not a trial", {"name": "lower"}]
    (folder / "000012" / "what_if.json").write_text(json.dumps({"trials": trials}))
    capsule(folder / "1000000", "{}")
    (folder / "000013").write_text("a file")
    (folder / "notes").mkdir()
    found = read_incident_files(run)
    assert sorted(found) == [12, 1_000_000]
    assert found[12].tables == {"modules": ROWS}
    assert list(found[12].trials) == [{"name": "skip", "helps": True}, {"name": "lower"}]
    assert (found[1_000_000].tables, list(found[1_000_000].trials)) == ({}, [])


def binary(folder: Path) -> None:
    (folder / "capsule.json").write_bytes(b"\xff\xfe\x00\x80")


def a_folder(folder: Path) -> None:
    (folder / "capsule.json").mkdir()


def text(content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "capsule.json").write_text(content)
        (folder / "what_if.json").write_text(content)

    return write


DAMAGED = {
    "cut": text('{"incident": {"tables": {"modules": [{"na'),
    "empty": text(""),
    "list": text("[1, 2]"),
    "null": text("null"),
    "no tables": text('{"incident": {"tables": [1]}, "trials": {"a": 1}}'),
    "no incident": text('{"incident": 7, "trials": 7}'),
    "brackets": text("[" * 200_000),
    "digits": text('{"incident": ' + "9" * 5000 + "}"),
    "binary": binary,
    "folder": a_folder,
    "none": lambda folder: None,
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_leave_an_incident_without_tables(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = incident_folder(tmp_path / "run.json") / "000001"
    folder.mkdir(parents=True)
    damage(folder)
    found = read_incident_files(tmp_path / "run.json")
    assert (found[1].tables, list(found[1].trials)) == ({}, [])


def test_files_that_are_far_too_large_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.dumps({"incident": {"tables": {"modules": ROWS}}})
    capsule(incident_folder(tmp_path / "run.json") / "000001", content)
    monkeypatch.setattr(module, "MAX_BYTES", len(content))
    assert read_incident_files(tmp_path / "run.json")[1].tables
    monkeypatch.setattr(module, "MAX_BYTES", len(content) - 1)
    assert not read_incident_files(tmp_path / "run.json")[1].tables


LONG = "x" * 100_000


def hostile(step: int) -> Incident:
    """An incident with all that can grow."""
    return Incident(
        step=step,
        kind="nonfinite-loss",
        triggers=tuple(Trigger("nonfinite-loss", LONG, module=LONG, value=float("nan")) for _ in range(300)),
        cause=Cause(LONG, "forward", LONG, LONG),
        terms=tuple(f"{LONG}{number}" for number in range(300)),
        samples=tuple(SampleShare(number, LONG, LONG, (LONG,) * 50) for number in range(300)),
        mechanism="empty-selection",
        explanation=LONG,
        evidence={f"{number} {LONG}": [[[[[LONG]]]]] for number in range(300)} | {"big": 10**400, "path": Path("a")},
        tables={"modules": [{"name": LONG}]},
        reproduction=Reproduction(True, LONG, LONG),
        capsule="/runs/" + "d" * 900,
        capsule_note=LONG,
    )


def test_an_event_holds_an_incident_of_any_size_in_a_few_kilobytes() -> None:
    incident = hostile(3)
    stored = json.loads(json.dumps(incident.facts()["incident"]))
    assert len(json.dumps(stored)) < 17_000  # of 1e8 characters; the path is not counted
    assert len(incident.message) <= 600
    assert "tables" not in stored
    assert (stored["kind"], stored["title"]) == ("nonfinite-loss", "A mean over nothing")
    assert stored["capsule"] == incident.capsule  # whole: it is a path
    assert stored["explanation"].endswith("…")
    plain = Incident(3, "loss-spike", (Trigger("loss-spike", "up", value=2.5),), evidence={"α": 0.5, "ok": True})
    kept = plain.facts()["incident"]
    assert (kept["evidence"], kept["triggers"][0]["value"]) == ({"α": 0.5, "ok": True}, 2.5)
    assert Incident.from_dict(kept).facts() == plain.facts()


@pytest.mark.parametrize(("count", "made"), [(1500, "plain"), (100, "hostile")])
def test_a_run_of_incidents_stays_small_and_keeps_its_series(tmp_path: Path, count: int, made: str) -> None:
    """1500 incidents as large as those of real runs, 3 kB each, or 100 that are as large as can be."""
    steps = np.arange(2000)
    with RunWriter(tmp_path / "run.json", RunHeader("run")) as writer:
        writer.append(steps, {"loss/total": np.sin(steps), "train/grad_norm": np.cos(steps)})
        for step in range(count):
            trigger = Trigger("loss-spike", "m" * 100)
            evidence = {f"sight {number}": "e" * 120 for number in range(16)}
            plain = Incident(step, "loss-spike", (trigger,), mechanism="log-of-zero", evidence=evidence)
            incident = plain if made == "plain" else hostile(step)
            writer.event(step, incident.family, incident.message, **incident.facts())
        writer.finish("completed", measures={})
    assert (tmp_path / "run.json").stat().st_size < 5_000_000
    run = load_run(tmp_path / "run.json")
    told = [event for event in run.events if "incident" in event.data]
    assert len(told) >= min(count, 40)
    assert told[0].step == 0  # the first one tells the cause
    series = run.series("loss/total")
    assert series is not None
    assert series.exact
