"""MMEngine: ``work_dir/<timestamp>/vis_data/scalars.json`` (also ``<timestamp>.json``), and ``<timestamp>.log``.

LoggerHook writes every `interval` iterations, counted from 1, the mean of the last `window_size` of them. A row of
validation has for its step the epoch, unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bifusion_diag.record.importers.config_text import read_settings
from bifusion_diag.record.importers.openmmlab import (
    Head,
    environment_of,
    log_rows,
    planned_of,
    read_head,
    seed_of,
    window_of,
)
from bifusion_diag.record.importers.source import Raw, Segment, number, objects, whole

FORMAT = "MMEngine"
NORM = "before clipping, as MMEngine's optimiser wrapper measures it"
PLACED = (
    "Validation is placed at the last logged step before it: the log does not say how many iterations an epoch has."
)
_KEYS = ("step", "iter")
_PLACES = ("step", "iter", "epoch")


class Part(NamedTuple):
    """What one process left, a folder with its time as a name."""

    label: str
    scalars: Path | None  # JSON lines
    text: Path | None
    config: Path | None

    @property
    def file(self) -> Path:
        """The one that is read."""
        found = self.scalars or self.text
        assert found is not None
        return found


class _Row(NamedTuple):
    training: bool
    epoch: int | None
    step: int | None  # of validation: of an epoch, or an iteration
    values: dict[str, float | None]


def read(path: Path, name: str, parts: Sequence[Part]) -> Raw:
    """Read what the processes of a run left, in the order of their names."""
    raw = Raw(FORMAT, path, name, [], [], norm=NORM, timed=True)
    head = Head()
    per_epoch: int | None = None
    planned: int | None = None
    for part in parts:
        text = read_head(part.text) if part.text is not None else Head()
        head = head.then(text)
        settings = read_settings(part.config) if part.config is not None else {}
        raw.settings = settings or dict(head.settings) or raw.settings
        per_epoch = head.per_epoch or per_epoch
        segment = Segment(part.label)
        if part.scalars is not None:
            rows: Iterator[_Row | None] = _json_rows(part.scalars)
        else:
            assert part.text is not None
            rows = _text_rows(part.text)
            planned = _planned_in(part.text) or planned
        per_epoch = _fill(segment, rows, per_epoch, raw)
        raw.files += [file for file in (part.scalars, part.text, part.config) if file is not None]
        if segment.values:
            raw.segments.append(segment)
    raw.created = head.created
    raw.environment = environment_of(head.environment)
    if (seed := seed_of(head.environment)) is not None:
        raw.settings = {**raw.settings, "seed": seed}
    raw.planned = planned_of(raw.settings, per_epoch) or planned
    last = max((segment.last or 0 for segment in raw.segments), default=0)
    raw.smoothing = window_of(raw.settings, per_epoch, last)
    return raw


def _json_rows(path: Path) -> Iterator[_Row | None]:
    for row in objects(path, _KEYS):
        if row is None:
            yield None
            continue
        training = "iter" in row
        step = whole(row.get("iter" if training else "step"))
        epoch = whole(row.get("epoch"))
        values = {key.removeprefix("train/"): number(value) for key, value in row.items() if key not in _PLACES}
        yield _Row(training, epoch, step, values)


def _text_rows(path: Path) -> Iterator[_Row | None]:
    for row in log_rows(path):
        if row.broken:
            yield None
        values: dict[str, float | None] = {**row.values}
        if row.mode == "train":
            yield _Row(True, row.epoch, row.step, values)
        elif row.mode == "val" and {*values} - {"time", "data_time", "memory"}:  # others say how far it is
            yield _Row(False, row.epoch, row.epoch, values)


def _planned_in(path: Path) -> int | None:
    return next((row.planned for row in log_rows(path) if row.planned), None)


def _fill(segment: Segment, rows: Iterator[_Row | None], per_epoch: int | None, raw: Raw) -> int | None:
    """Add rows to a segment; those of validation are placed by the rows of training before them.

    Returns:
        Iterations in an epoch: as given, or as the rows tell. The first row of every epoch is of the same iteration,
        but in the first epoch of a resumed run.
    """
    last_step, last_epoch = 0, None
    first: dict[int, int] = {}  # step by epoch
    validations: list[tuple[_Row, int, int | None]] = []
    for row in rows:
        if row is None or (row.training and row.step is None):
            raw.skipped += 1
        elif row.training:
            assert row.step is not None
            last_step, last_epoch = row.step, row.epoch
            if row.epoch is not None:
                first.setdefault(row.epoch, row.step)
            segment.add(row.step, row.values)
        else:
            validations.append((row, last_step, last_epoch))
    lengths = [step - first[epoch - 1] for epoch, step in first.items() if epoch - 1 in first]
    if per_epoch is None and lengths and lengths[-1] > 0:
        per_epoch = lengths[-1]
    for row, before, epoch in validations:
        step = _of_validation(row.step, before, epoch, per_epoch)
        if step is None and PLACED not in raw.notes:
            raw.notes.append(PLACED)
        values = {f"val/{key.removeprefix('val/')}": value for key, value in row.values.items()}
        segment.add(before if step is None else step, values, training=False)
    return per_epoch


def _of_validation(stated: int | None, step: int, epoch: int | None, per_epoch: int | None) -> int | None:
    """The iteration after which a validation was made; None where it is not known."""
    if stated is None:
        return None
    if stated >= step and (epoch is None or abs(stated - step) <= abs(stated - epoch)):
        return stated  # an iteration; the last row of training may be some before it
    if epoch is not None and per_epoch and stated * per_epoch >= step:
        return stated * per_epoch
    return None
