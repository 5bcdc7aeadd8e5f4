"""What a run record holds, in memory. The file format is described in docs/run-json.md.

Legend: K buckets of a reduced series · B bins of a histogram. A series of a short run is *exact*: one bucket is one
step. A bucket of a longer run stands for several consecutive recorded steps and keeps their extremes, so that
reduction never loses a spike or a non-finite value.
"""

from __future__ import annotations

import fnmatch
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bifusion_diag.errors import UserError
from bifusion_diag.record.scenes import Snapshot

SCHEMA_VERSION = "2.1"
FINGERPRINT = "fingerprint"  # kind of the event with a digest of the weights; data: done (steps), weights
STATUSES = ("running", "completed", "interrupted", "failed")
UNITS = {"throughput/*_seconds": "s", "throughput/*_mib": "MiB"}  # of the probes' series, where the run states no other

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class RecordError(UserError):
    """A run record that cannot be read: corrupt, of another kind, or from a newer version."""


@dataclass(frozen=True)
class ModuleInfo:
    """One module of the model."""

    name: str  # dotted name as in named_modules(); "(root)" is the model itself
    type: str  # class name
    order: int  # rank by execution in the first forward; modules never executed follow, in definition order
    part: str  # the part of the model that it is counted under: a key of RunHeader.parameters, or the first component
    parameters: int  # parameters that it owns itself, without its children's
    trainable: int  # those of them that require a gradient


@dataclass(frozen=True)
class Event:
    """Something that happened at a step: a stage began, a schedule changed, an incident, a signal."""

    step: int | None
    kind: str
    message: str
    data: dict[str, Any] = field(default_factory=dict)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass
class RunHeader:
    """What is known of a run before its first step, except for the modules' order."""

    name: str
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: str = field(default_factory=_now)  # ISO 8601 with time zone
    command: str = ""
    preset: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)  # python, platform, packages, device, threads, git, ...
    provenance: dict[str, Any] = field(default_factory=dict)  # clip_weights, data, labels, ...
    parameters: dict[str, dict[str, int]] = field(default_factory=dict)  # part -> {"total": ..., "trainable": ...}
    modules: list[ModuleInfo] = field(default_factory=list)  # in execution order
    probes: list[str] = field(default_factory=list)
    steps_planned: int | None = None
    units: dict[str, str] = field(default_factory=dict)  # unit by series name pattern; the first match holds

    def unit(self, name: str) -> str:
        """The unit of a series, "" where none is stated."""
        known = {**self.units, **UNITS}.items()
        return next((unit for pattern, unit in known if fnmatch.fnmatchcase(name, pattern)), "")


@dataclass(frozen=True)
class SeriesStats:
    """Statistics over every recorded step of a series, whatever its reduction. None where there is no finite value."""

    count: int  # values recorded: finite and non-finite, not missing
    missing: int
    nonfinite: int
    nan: int  # of the non-finite ones, those that are NaN
    first_nonfinite_step: int | None
    min: float | None
    max: float | None
    mean: float | None
    p1: float | None
    p5: float | None
    p50: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, steps: Ints, values: Floats, missing: NDArray[np.bool_]) -> SeriesStats:
        """Measure a series at full resolution: see :meth:`of_columns`."""
        return cls.of_columns(steps, values[:, None], missing[:, None])[0]

    @classmethod
    def of_columns(cls, steps: Ints, values: Floats, missing: NDArray[np.bool_]) -> list[SeriesStats]:
        """Measure C series at full resolution: steps (R,), values (R, C), missing (R, C).

        Percentiles are interpolated linearly between order statistics. Results have float32 precision.
        """
        finite = np.isfinite(values) & ~missing
        nonfinite = ~finite & ~missing
        good, bad = finite.sum(0), nonfinite.sum(0)
        numbers = _numbers(values, finite, good).astype(np.float32).astype(np.float64)
        nan = (np.isnan(values) & nonfinite).sum(0)
        first = steps[np.argmax(nonfinite, axis=0)] if len(steps) else np.zeros(len(bad), np.int64)
        counts = np.stack([good + bad, missing.sum(0), bad, nan, first], axis=1).tolist()
        found: list[SeriesStats] = []
        for (count, gone, wrong, nans, step), row in zip(counts, numbers.tolist(), strict=True):
            measured = row if count > wrong else [None] * 8
            found.append(cls(count, gone, wrong, nans, step if wrong else None, *measured))
        return found


def _numbers(values: Floats, finite: NDArray[np.bool_], count: Ints) -> Floats:
    """Min, max, mean and the percentiles of the finite values of each column: (R, C) → (C, 8)."""
    if not len(values):
        return np.full((values.shape[1], 8), np.nan)
    ordered = np.sort(np.where(finite, values, np.inf), axis=0)
    column, last = np.arange(values.shape[1]), np.maximum(count - 1, 0)
    total = np.where(finite, values, 0.0).sum(0)
    found = [ordered[0], ordered[last, column], total / np.maximum(count, 1)]
    for percent in (1, 5, 50, 95, 99):
        place = last * (percent / 100)
        below = place.astype(np.int64)
        low, high = ordered[below, column], ordered[np.minimum(below + 1, last), column]
        with np.errstate(invalid="ignore"):  # a column without a finite value holds only infinities here
            found.append(low + (high - low) * (place - below))
    return np.stack(found, axis=1)


@dataclass(frozen=True, eq=False)
class Series:
    """One scalar over time. Every array has K entries, in order of steps."""

    name: str
    unit: str
    steps: Ints  # first step of the bucket
    last: Ints  # last step of the bucket; equals `steps` where exact
    rows: Ints  # recorded steps in the bucket, missing values included
    value: Floats  # mean of the finite values. NaN where there is none; where exact, the value itself: NaN or ±Inf too
    min: Floats  # over finite values, NaN where there is none
    max: Floats
    nonfinite: Ints  # how many values are NaN or infinite
    missing: Ints  # how many steps have no value: not measured, frozen, no gradient
    stats: SeriesStats
    exact: bool  # every bucket is one step

    @classmethod
    def from_values(
        cls,
        name: str,
        steps: ArrayLike,
        values: ArrayLike,
        missing: ArrayLike | None = None,
        unit: str = "",
        stats: SeriesStats | None = None,
    ) -> Series:
        """An exact series.

        Args:
            name: name of the series.
            steps: (K,) ascending steps.
            values: (K,) values, stored with float32 precision; entries that are missing are ignored.
            missing: (K,) bool, True where there is no value. None: every value is there.
            unit: of the values.
            stats: where they are known.
        """
        step = np.asarray(steps, dtype=np.int64)
        value = np.asarray(values, dtype=np.float32).astype(np.float64)
        gone = np.zeros(step.shape, bool) if missing is None else np.asarray(missing, dtype=bool)
        value = np.where(gone, np.nan, value)
        finite = np.where(np.isfinite(value), value, np.nan)
        bad = (~np.isfinite(value) & ~gone).astype(np.int64)
        stats = SeriesStats.of(step, value, gone) if stats is None else stats
        ones = np.ones(step.shape, np.int64)
        return cls(name, unit, step, step, ones, value, finite, finite, bad, gone.astype(np.int64), stats, exact=True)


@dataclass(frozen=True, eq=False)
class Histogram:
    """A histogram over time."""

    name: str
    edges: Floats  # (B + 1,)
    steps: Ints  # (K,) first step of the bucket
    last: Ints  # (K,) last step of the bucket
    counts: Floats  # (K, B) summed over the bucket's steps


@dataclass(frozen=True)
class IncidentFiles:
    """What lies beside a record of one incident, and is too large for it."""

    tables: Mapping[str, Any] = field(default_factory=dict)  # "modules": one mapping a call, in execution order; ...
    trials: Sequence[Mapping[str, Any]] = ()  # remedies that were tried on it, best first


@dataclass(frozen=True, eq=False)
class Run:
    """A run, complete or not."""

    header: RunHeader
    status: str  # one of STATUSES; a killed run stays "running"
    error: str | None  # the error's text where the run failed
    steps: Ints  # the recorded steps, ascending
    all_series: Mapping[str, Series]
    histograms: Mapping[str, Histogram]
    events: list[Event]
    measures: dict[str, Any]  # computed at full resolution when the run ended
    events_dropped: int = 0  # events beyond those kept
    incident_files: Mapping[int, IncidentFiles] = field(default_factory=dict)  # by step
    snapshots: tuple[Snapshot, ...] = ()  # α of a scene at a few moments, in their order

    def series(self, name: str) -> Series | None:
        """The series of that name, None where it was not recorded."""
        return self.all_series.get(name)

    def names(self, prefix: str = "") -> list[str]:
        """Names of the recorded series that begin with `prefix`, in the order in which they were first recorded."""
        return [name for name in self.all_series if name.startswith(prefix)]

    def histogram(self, name: str) -> Histogram | None:
        """The histogram of that name, None where it was not recorded."""
        return self.histograms.get(name)

    @property
    def modules(self) -> list[ModuleInfo]:
        """The model's modules in execution order."""
        return self.header.modules

    @property
    def settings(self) -> dict[str, Any]:
        """The run's settings."""
        return self.header.settings

    @property
    def provenance(self) -> dict[str, Any]:
        """Where data, labels and weights came from."""
        return self.header.provenance

    @property
    def environment(self) -> dict[str, Any]:
        """The machine and the versions."""
        return self.header.environment

    @property
    def parameters(self) -> dict[str, dict[str, int]]:
        """Parameters by part of the model: total and trainable."""
        return self.header.parameters
