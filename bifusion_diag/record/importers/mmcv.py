"""Logs of MMCV's age (before 2.0): ``<timestamp>.log.json`` (JSON lines), and ``<timestamp>.log``.

TextLoggerHook writes every `interval` iterations the mean of all iterations since the one before; the mean is begun
anew with every epoch. The learning rate is the last one. Iterations are counted from 1 in every epoch, or by the
iteration-based runner over the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bifusion_diag.record.importers.config_text import read_settings, settings_of
from bifusion_diag.record.importers.openmmlab import Head, environment_of, log_rows, planned_of, read_head
from bifusion_diag.record.importers.source import Raw, Segment, Smoothing, number, objects, whole

FORMAT = "MMCV"
NORM = "before clipping, as MMCV's optimiser hook measures it"
MEANS = r"(?!(.*lr|.*learning_rate|.*memory)).*"
GUESSED = (
    "The log does not say how many iterations an epoch has: the last one that was logged in any epoch is taken for its "
    "length, which is less than an interval too short."
)
_KEYS = ("mode", "iter")
_PLACES = ("mode", "epoch", "iter")


class Part(NamedTuple):
    """What one process left."""

    label: str
    json: Path | None
    text: Path | None
    config: Path | None

    @property
    def file(self) -> Path:
        """The one that is read."""
        found = self.json or self.text
        assert found is not None
        return found


class _Row(NamedTuple):
    training: bool
    epoch: int | None
    iteration: int | None  # in the epoch, or of the run
    step: int | None  # of the run, where the line says it
    values: dict[str, float | None]


def read(path: Path, name: str, parts: Sequence[Part]) -> Raw:
    """Read what the processes of a run left, in the order of their names."""
    raw = Raw(FORMAT, path, name, [], [], norm=NORM, timed=True)
    head = Head()
    planned: int | None = None
    for part in parts:
        text = read_head(part.text) if part.text is not None else Head()
        head = head.then(text)
        if part.config is not None:
            raw.settings = read_settings(part.config) or raw.settings
        raw.settings = raw.settings or dict(head.settings)
        if part.text is not None and planned is None:
            planned = next((row.planned for row in log_rows(part.text) if row.planned), None)
        segment = Segment(part.label)
        per_epoch = head.per_epoch or _length(part, raw)
        _fill(segment, _rows(part, raw), per_epoch)
        raw.files += [file for file in (part.json, part.text, part.config) if file is not None]
        raw.planned = planned_of(raw.settings, per_epoch) or planned
        if segment.values:
            raw.segments.append(segment)
    raw.created = head.created
    raw.environment = environment_of(head.environment) or raw.environment
    raw.smoothing = _window(raw)
    return raw


def _rows(part: Part, raw: Raw) -> Iterator[_Row]:
    return _json_rows(part.json, raw) if part.json is not None else _text_rows(part.file, raw)


def _json_rows(path: Path, raw: Raw) -> Iterator[_Row]:
    for row in objects(path, _KEYS):
        if row is None:
            raw.skipped += 1
        elif "mode" in row:
            values: dict[str, float | None] = {}
            for key, value in row.items():
                if isinstance(value, Mapping):  # of several optimisers: {"lr": {"backbone": ...}}
                    values |= {f"{key}_{part}": number(one) for part, one in value.items()}
                elif key not in _PLACES:
                    values[key] = number(value)
            yield _Row(row["mode"] == "train", whole(row.get("epoch")), whole(row.get("iter")), None, values)
        else:
            _head_line(row, raw)


def _head_line(row: Mapping[str, Any], raw: Raw) -> None:
    """The first line says what the run was begun with."""
    if isinstance(row.get("config"), str) and not raw.settings:
        raw.settings = settings_of(row["config"])
    if (seed := whole(row.get("seed"))) is not None:
        raw.settings = {**raw.settings, "seed": seed}
    if isinstance(row.get("env_info"), str):
        stated = dict(line.split(": ", 1) for line in row["env_info"].splitlines() if ": " in line)
        raw.environment = environment_of(stated)


def _text_rows(path: Path, raw: Raw) -> Iterator[_Row]:
    for row in log_rows(path):
        raw.skipped += row.broken > 0
        inner = row.inner if row.inner is not None else row.step
        if row.mode != "test" and row.values:
            yield _Row(row.mode == "train", row.epoch, inner, row.step, {**row.values})


def _length(part: Part, raw: Raw) -> int | None:
    """Iterations in an epoch, as far as rows tell; None where they are counted over the run."""
    falls, longest, before = False, 0, 0
    epochs: set[int] = set()
    for row in _rows(part, Raw(FORMAT, raw.path, raw.name, [], [])):
        if row.training and row.step is None and row.iteration is not None:
            falls |= row.iteration <= before
            longest, before = max(longest, row.iteration), row.iteration
            epochs.add(row.epoch or 0)
    if not falls:
        return None
    if len(epochs) > 1:
        raw.notes.append(GUESSED)
    return longest


def _fill(segment: Segment, rows: Iterator[_Row], per_epoch: int | None) -> None:
    last = 0
    for row in rows:
        if row.training:
            step = row.step
            if step is None and row.iteration is not None:
                by_epoch = per_epoch is not None and row.epoch is not None
                step = (row.epoch - 1) * per_epoch + row.iteration if by_epoch else row.iteration  # type: ignore[operator]
            if step is not None:
                last = step
                segment.add(step, row.values)
        else:
            at = row.epoch * per_epoch if row.epoch is not None and per_epoch is not None else last
            segment.add(max(at, last), {f"val/{key}": value for key, value in row.values.items()}, training=False)


def _window(raw: Raw) -> Smoothing:
    """The interval, as configured or as found between two rows."""
    stated = raw.settings.get("log_config")
    interval = stated.get("interval") if isinstance(stated, Mapping) else None
    if isinstance(interval, int) and interval > 0:
        return Smoothing(interval, "log_config of the configuration", only=MEANS)
    steps = [steps for segment in raw.segments for name, (steps, _) in segment.columns().items() if "val/" not in name]
    longest = max(steps, key=len, default=np.zeros(0, np.int64))
    if len(longest) < 2:
        return Smoothing(0, "unknown: fewer than two rows", only=MEANS)
    return Smoothing(
        int(np.median(np.diff(longest))), "MMCV's rule: the mean of all steps since the last row", only=MEANS
    )
