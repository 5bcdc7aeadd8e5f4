"""Which incident tells where a run became bad."""

from __future__ import annotations

from bifusion_diag.diagnosis.incidents import incidents_of
from bifusion_diag.experiments.bisect.hunt import telling
from bifusion_diag.experiments.bisect.result import assignment
from bifusion_diag.record import Event, Run, RunHeader


def test_a_harmless_incident_before_the_bad_step_is_not_to_blame() -> None:
    facts = [(1, "nonfinite-input"), (6, "nonfinite-loss"), (7, "nonfinite-loss")]
    events = [Event(step, "non-finite", kind, {"incident": {"kind": kind}}) for step, kind in facts]
    incidents = incidents_of(Run(RunHeader(name="r"), "completed", None, [], {}, {}, events, {}))
    assert [incident.step for incident in incidents] == [1, 6, 7]
    found = telling(incidents, (6, 7))
    assert found is not None
    assert (found.step, found.kind) == (6, "nonfinite-loss")
    first = telling(incidents, ())
    assert first is not None
    assert first.step == 1
    assert telling((), (6,)) is None


def test_a_value_is_written_as_set_reads_it() -> None:
    assert assignment("a.b", "strict") == "a.b=strict"
    assert assignment("a.b", "null") == "'a.b=\"null\"'"
    assert assignment("a.b", None) == "a.b=null"
    assert assignment("a.b", [1.0, 0.2]) == "'a.b=[1.0, 0.2]'"
    assert assignment("a.b", 1e-05) == "a.b=1e-05"
