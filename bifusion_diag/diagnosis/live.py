"""Findings of a run that is still going on."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from bifusion_diag.diagnosis.assess import assess_run
from bifusion_diag.diagnosis.findings import Finding
from bifusion_diag.diagnosis.full import load_measured
from bifusion_diag.diagnosis.thresholds import DEFAULT_THRESHOLDS, Thresholds
from bifusion_diag.record.follow import RecordFollower
from bifusion_diag.record.schema import Run, Series, SeriesStats


def findings_of(run: Path | str | Run, thresholds: Thresholds = DEFAULT_THRESHOLDS) -> tuple[Finding, ...]:
    """The findings of a record, worst first; of a run that goes on, of the rows that are written.

    Args:
        run: a record, or where it lies: a run.json, its .record folder, or the folder that holds one of them.
        thresholds: when a rule fires.

    Raises:
        UserError: there is no record, or nothing in it yet.
    """
    return assess_run(run if isinstance(run, Run) else load_measured(run), thresholds).findings


class LiveFindings:
    """Findings of the rows that a follower holds, kept up to date at a bounded cost.

    Args:
        thresholds: when a rule fires.
    """

    SHARE = 0.05  # of the time may be spent on looking

    def __init__(self, thresholds: Thresholds = DEFAULT_THRESHOLDS) -> None:
        self._thresholds = thresholds
        self._seen: tuple[str, int, str] | None = None  # run, its newest step, its status
        self._rest_until = 0.0
        self._found: tuple[Finding, ...] = ()

    def of(self, follower: RecordFollower) -> tuple[Finding, ...]:
        """Worst first; looked for again only where new rows have come, and not right after a look that took long."""
        if not len(follower.steps):
            return ()
        now = follower.header.run_id, int(follower.steps[-1]), follower.status
        rests = time.monotonic() < self._rest_until and follower.status == "running"
        other_run = self._seen is None or self._seen[0] != now[0]
        if now != self._seen and (not rests or other_run):
            began = time.monotonic()
            self._found = findings_of(window_of(follower), self._thresholds)
            self._seen = now
            self._rest_until = time.monotonic() + (time.monotonic() - began) / self.SHARE
        return self._found


def window_of(follower: RecordFollower) -> Run:
    """The rows that a follower holds, as a record: what rules see of a run while it is watched."""
    steps, missing = follower.steps, follower.missing
    values = np.where(missing, np.nan, follower.values.astype(np.float64))
    stats = SeriesStats.of_columns(steps, values, missing) if len(steps) else []
    series = {
        name: Series.from_values(name, steps, values[:, i], missing[:, i], follower.header.unit(name), one)
        for i, (name, one) in enumerate(zip(follower.names, stats, strict=False))
    }
    return Run(follower.header, follower.status, follower.error, steps, series, {}, list(follower.events), {})
