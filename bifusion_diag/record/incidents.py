"""What lies beside a run of its incidents: the remedies that were tried on their capsules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WHAT_IF = "what_if.json"  # in a capsule's folder: {"trials": [{"name", "patch", "helps", ...}]}, best first


def incident_folder(run: Path) -> Path:
    """Where the capsules of a run lie, given its run.json or its .record folder."""
    return run.with_name(f"{run.stem}.incidents")


def read_trials(run: Path) -> dict[int, list[Mapping[str, Any]]]:
    """The remedies that were tried, by the incident's step, best first. What cannot be read is left out: a record is
    whole without it."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for path in sorted(incident_folder(run).glob(f"*/{WHAT_IF}")):
        try:
            trials = json.loads(path.read_text(encoding="utf-8"))["trials"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if path.parent.name.isdecimal() and isinstance(trials, list):
            found[int(path.parent.name)] = [trial for trial in trials if isinstance(trial, Mapping)]
    return found
