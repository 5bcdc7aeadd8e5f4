"""What lies beside a run of its incidents: their capsules' tables, and the remedies that were tried on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bifusion_diag.record.schema import IncidentFiles

CAPSULE = "capsule.json"  # {"incident": {"tables": {name: rows}, ...}, ...}
WHAT_IF = "what_if.json"  # {"trials": [{"name", "patch", "helps", ...}, ...]}, best first
MAX_BYTES = 32_000_000  # of such a file; a capsule.json of 400 modules has half a megabyte


def incident_folder(run: Path) -> Path:
    """Where the capsules of a run lie, given its run.json or its .record folder."""
    run = run if run.name not in ("", "..") else run.resolve()  # the folder that one stands in
    return run.with_name(f"{run.stem}.incidents")


def read_incident_files(run: Path) -> dict[int, IncidentFiles]:
    """The files of every incident of a run, by step. What cannot be read is left out: a record is whole without it."""
    found = {}
    for folder in sorted(incident_folder(run).glob("*")):
        if folder.name.isdecimal() and folder.is_dir():
            tables = _mapping(_mapping(_read(folder / CAPSULE).get("incident")).get("tables"))
            trials = _read(folder / WHAT_IF).get("trials")
            trials = [trial for trial in trials if isinstance(trial, Mapping)] if isinstance(trials, list) else []
            found[int(folder.name)] = IncidentFiles(tables, trials)
    return found


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            return {}
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):  # the last: brackets without end
        return {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
