"""Digests of the weights come every few steps: they take no room from events that tell what happened."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bifusion_diag.record import RecordFollower, RecordReader, RunHeader, RunWriter, load_run


def test_digests_take_no_room_from_what_happened() -> None:
    with RunWriter("run.json", RunHeader("run")) as writer:
        for step in range(3000):
            writer.event(step, "fingerprint", f"weights after {step + 1} steps", done=step + 1, weights="00")
            if step % 1000 == 500:
                writer.event(step, "spike", "spike")
        writer.append([0], {"loss/total": [1.0]})
        writer.flush()
        follower = RecordFollower(Path("run.record"))
        follower.poll()
        assert [event.kind for event in follower.events] == ["spike"] * 3
    run = load_run("run.json")
    assert [event.step for event in run.events if event.kind == "spike"] == [500, 1500, 2500]
    kept = np.array([event.step for event in run.events if event.kind == "fingerprint"])
    assert len(kept) == 200
    assert (np.diff(kept) == 15).all()
    assert run.events_dropped == 0
    assert len(RecordReader("run.record").events()) == 3003
