"""A foreign log as a record: the columns that we know under our names, and what is said of them."""

from __future__ import annotations

import fnmatch
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.record.importers import names
from bifusion_diag.record.importers.bounds import LISTED, bounds
from bifusion_diag.record.importers.names import NORM, RATE, TOTAL, clean
from bifusion_diag.record.importers.source import Raw, Smoothing, join
from bifusion_diag.record.reader import RecordReader, State
from bifusion_diag.record.schema import Event, Floats, Ints, RecordError, RunHeader

KIND = "import"  # of the events that say how the numbers are to be read
UNITS = {"train/step_seconds": "s", "train/data_seconds": "s"}
NEVER = (
    "gradients, activations and weights by module: no such log has them",
    "gradients of the loss terms, CLIP features, projection and gate: no such log has them",
)
_LISTED = 300  # names of a kind that are listed
_MEANT = re.compile(r"loss/.*|train/(grad_norm|step_seconds|data_seconds).*")
_PERCENT = ("eval/miou", "eval/ap", "eval/ap50", "eval/ap25")
_ADDS_UP = 0.02  # by how much terms may miss the total, relative; text logs have four decimals
_AT_BOUND = 0.2  # share of norms that equal the largest one, from which on they were clipped

Columns = dict[str, tuple[Ints, Floats]]


class ImportedRecord(RecordReader):
    """Whole series of a foreign log, wherever those of a .record folder can be: they are reduced and measured alike.

    Attributes:
        state: header and status. The header's provenance["imported"] says where everything is from.
        steps: (R,) all steps of which there is a value, ascending.
        names: C names of series.
    """

    def __init__(self, state: State, columns: Columns, events: Sequence[Event]) -> None:
        # no folder is read: nothing of the reader's own __init__ holds here
        self.state = state
        self.histogram_names = []
        self.truncated = []
        self.names = list(columns)
        self.steps = np.unique(np.concatenate([steps for steps, _ in columns.values()]))
        self._columns = columns
        self._events = list(events)

    def events(self) -> list[Event]:
        """Where the run was resumed, and how its numbers are to be read."""
        return self._events

    def snapshots(self) -> tuple[Any, ...]:
        """There are none."""
        return ()

    def columns(self, names: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Whole series: values (R, C), NaN where missing, and missing (R, C), in order of :attr:`steps`."""
        values = np.full((len(self.steps), len(names)), np.nan, np.float32)
        missing = np.ones(values.shape, bool)
        for column, name in enumerate(names):
            steps, numbers = self._columns[name]
            place = np.searchsorted(self.steps, steps)
            with np.errstate(over="ignore"):
                values[place, column] = numbers.astype(np.float32)
            missing[place, column] = False
        return values, missing

    def histogram(self, name: str) -> tuple[Floats, Ints, NDArray[np.float32]]:
        """There is none."""
        raise KeyError(name)


def build(raw: Raw, given: Mapping[str, str], smoothing: int | None = None) -> ImportedRecord:
    """Give a log's columns our names, and say what is known of them.

    Args:
        raw: the log.
        given: our names → its names, as the user says.
        smoothing: how many steps a value is the mean of, as the user says.

    Raises:
        RecordError: nothing in it is known.
        UserError: `given` names what is not there.
    """
    found, events = join(raw.segments)
    if not found:
        raise RecordError(
            f"{raw.path}: read as {raw.format}, but no row of numbers is in it (looked in "
            f"{', '.join(file.name for file in raw.files[:5]) or 'nothing'}; {raw.skipped} lines could not be read)."
        )
    chosen, ignored, said = _choose(raw, found, given)
    if not chosen:
        raise RecordError(
            f"{raw.path}: read as {raw.format}, but no column is known as a loss, a gradient norm, a learning rate "
            f"or a metric. Its columns: {', '.join(map(clean, list(found)[:30]))}. Say which is which: "
            "bifusion-diag import … --columns loss=NAME,grad_norm=NAME,lr=NAME."
        )
    notes = list(raw.notes)
    columns: Columns = {series: found[theirs] for theirs, series in chosen.items()}
    means = [clean(theirs) for theirs, series in chosen.items() if theirs.endswith("_epoch") and "loss" in series]
    if means:
        notes.append(f"{', '.join(means)}: a mean over an epoch, as it is named.")
    notes += _shares(columns)
    notes += _weighted(columns)
    interval = _interval(columns)
    window = _window(raw.smoothing, smoothing, interval)
    windows = _windows(chosen, window)
    norm = _norm(columns, said or raw.norm)
    bad = _nonfinite(columns, windows, window)
    if window.window > 1:
        notes.insert(0, _means(windows, window, interval))
    if bad and window.window > 1:
        notes.insert(1, _hidden(bad))
    if raw.skipped:
        notes.append(f"{raw.skipped} lines, rows or values could not be read and were left out.")
    imported: dict[str, Any] = {
        "from": str(raw.path),
        "format": raw.format,
        "files": [str(file) for file in raw.files[:_LISTED]],
        "smoothing": max(window.window, 0),
        "smoothing_from": window.source,
        "interval": interval,
        "renamed": {clean(theirs): series for theirs, series in list(chosen.items())[:_LISTED]},
        "ignored": [clean(name) for name in ignored[:_LISTED]],
        "not_measured": _not_measured(columns),
        "skipped": raw.skipped,
        "notes": notes,
    }
    if NORM in columns:
        imported["grad_norm"] = norm
    if bad:
        imported["nonfinite"] = bad
    if raw.also:
        imported["also_there"] = raw.also
    others = {series: size for series, size in windows.items() if size != window.window and size > 1}
    if others:
        imported["smoothing_of"] = others
    header = RunHeader(
        clean(raw.name),
        run_id=uuid.uuid5(uuid.NAMESPACE_URL, str(raw.path.resolve())).hex,
        settings=raw.settings,
        environment=raw.environment,
        provenance={"imported": imported},
        units=UNITS,
        steps_planned=raw.planned,
    )
    header.created = raw.created or header.created
    events += [Event(None, KIND, note, {}) for note in notes]
    last = max(int(steps[-1]) for steps, _ in columns.values())
    ended = raw.planned is None or last + max(interval, 1) > raw.planned
    state = State(header, "completed" if ended else "running", None, {})
    return ImportedRecord(state, columns, events)


def _choose(raw: Raw, found: Columns, given: Mapping[str, str]) -> tuple[dict[str, str], list[str], str]:
    """Our series by column, the columns that are left out, and what a norm's name says of it."""
    places = {names.STEP, names.EPOCH, names.INNER}
    fixed = {theirs: series for ours, theirs in given.items() for series in _given(ours, theirs, found, places)}
    ours = names.is_ours(found)
    known = {
        name: names.recognise(name, timed=raw.timed, memory=raw.timed, ours=ours) for name in found if name not in fixed
    }
    if not any(one.series == RATE for one in known.values()):  # of several optimisers, or groups: the first
        groups = [name for name, one in known.items() if (one.series or "").startswith(f"{RATE}/")]
        known |= {name: names.Named(RATE) for name in groups[:1]}
    taken = dict(fixed)
    said = ""
    for name, one in sorted(known.items(), key=lambda item: (item[1].rank, list(found).index(item[0]))):
        if one.series is not None and one.series not in taken.values():
            taken[name] = one.series
            said = one.norm or said
    ignored = [name for name in found if name not in taken]
    return {name: taken[name] for name in found if name in taken}, ignored, said


def _given(ours: str, theirs: str, found: Columns, places: set[str]) -> list[str]:
    series = names.given_columns({ours: theirs}, [*found, *([theirs] if ours in places else [])])[theirs]
    return [] if series in places else [series]


def _shares(columns: Columns) -> list[str]:
    """Make shares of 1 of metrics in percent."""
    notes = []
    for series in _PERCENT:
        if series in columns:
            steps, values = columns[series]
            finite = values[np.isfinite(values)]
            if finite.size and 1.5 < finite.max() <= 100:
                columns[series] = steps, values / 100
                notes.append(f"{series} was in percent: it is divided by 100 here.")
    return notes


def _weighted(columns: Columns) -> list[str]:
    """Terms that add up to the total are the weighted ones: of those, shares can be told."""
    terms = {name: columns[name] for name in columns if fnmatch.fnmatchcase(name, "loss/*/raw")}
    weighted = {f"{name.removesuffix('/raw')}/weighted": column for name, column in terms.items()}
    if TOTAL not in columns or len(terms) < 2 or weighted.keys() & columns.keys():
        return []
    steps, total = columns[TOTAL]
    summed = np.zeros(len(steps))
    for at, values in terms.values():
        if not np.array_equal(at, steps):
            return []
        summed += values
    both = np.isfinite(total) & np.isfinite(summed)
    close = np.abs(summed[both] - total[both]) <= _ADDS_UP * np.abs(total[both]) + 1e-3
    if both.sum() < 3 or close.mean() < 0.95:
        return []
    columns.update(weighted)
    return ["The loss terms add up to the total loss: they are logged with their weights."]


def _interval(columns: Columns) -> int:
    """The usual distance of two rows of training, 0 where there is one row."""
    main = next((columns[name] for name in (TOTAL, NORM, RATE) if name in columns), None)
    steps = main[0] if main is not None else max((steps for steps, _ in columns.values()), key=len)
    if len(steps) < 2:
        return 0
    distances, counts = np.unique(np.diff(steps), return_counts=True)
    return int(distances[counts.argmax()])


def _window(stated: Smoothing, given: int | None, interval: int) -> Smoothing:
    if given is not None:
        return Smoothing(given, "as was said (--smoothing)")
    if stated.window < 0:
        return Smoothing(max(interval, 1), "the distance of rows, which are means of buckets")
    return stated


def _windows(chosen: Mapping[str, str], window: Smoothing) -> dict[str, int]:
    """Steps that a value of each series is the mean of; 0 where that is unknown."""
    found = {}
    for theirs, series in chosen.items():
        averaged = re.fullmatch(window.only, theirs, re.DOTALL) if window.only else _MEANT.fullmatch(series)
        found[series] = window.others.get(theirs, window.window if averaged else 1)
    return found


def _norm(columns: Columns, said: str) -> str:
    """Whether the gradient norm was taken before clipping, as far as its values tell."""
    if NORM not in columns or not said.startswith("unknown"):
        return said
    values = columns[NORM][1]
    finite = values[np.isfinite(values)]
    if finite.size < 10 or finite.max() <= 0:
        return said
    share = float((finite >= finite.max() * (1 - 1e-3)).mean())
    if share < _AT_BOUND or finite.min() >= finite.max() * (1 - 1e-3):
        return said
    return f"after clipping, it seems: {share:.0%} of its values equal the largest one, {finite.max():.4g}"


def _nonfinite(columns: Columns, windows: Mapping[str, int], window: Smoothing) -> dict[str, Any]:
    """How many logged losses and norms are not finite, and how many steps that says were not; empty for none."""
    logged: list[Ints] = []
    suspects: list[Ints] = []
    least = 0
    for name, (steps, values) in columns.items():
        if name in windows and (name.startswith("loss/") or name == NORM):
            found = bounds(steps, values, windows[name])
            logged.append(steps[~np.isfinite(values)])
            suspects.append(found.suspects)
            least = max(least, found.at_least)
    count = len(np.unique(np.concatenate(logged))) if logged else 0
    if not count:
        return {}
    if window.window < 1:
        return {"logged": count}
    steps = np.unique(np.concatenate(suspects))
    return {"logged": count, "at_least": least, "at_most": len(steps), "steps": steps[:LISTED].tolist()}


def _means(windows: Mapping[str, int], window: Smoothing, interval: int) -> str:
    kinds = {"Losses": r"loss/.*", "the gradient norm": NORM, "times": r"train/.*_seconds"}
    meant = [name for name, size in windows.items() if size > 1]
    which = [kind for kind, pattern in kinds.items() if any(re.fullmatch(pattern, name) for name in meant)]
    listed = ", ".join(which[:-1]) + " and " + which[-1] if len(which) > 1 else "".join(which) or "Values"
    text = (
        f"{listed[0].upper()}{listed[1:]} are means over {window.window} steps ({window.source}): one bad step shows "
        f"in every mean that it is part of, and a spike is up to {window.window} times lower than it was."
    )
    if interval > window.window:
        text += (
            f" They are logged every {interval} steps: what happened at the other {interval - window.window} is not "
            "in the log."
        )
    return text


def _hidden(bad: Mapping[str, Any]) -> str:
    """What means that are not finite say of steps."""
    least, most, steps = bad["at_least"], bad["at_most"], bad["steps"]
    if least == most:
        listed = ", ".join(map(str, steps)) + (", …" if most > len(steps) else "")
        what = f"{least} step{'s were' if least > 1 else ' was'} not finite ({listed})"
    else:
        what = f"at least {least} and at most {most} steps were not finite, from {steps[0]} on"
    return f"{bad['logged']} logged values are not finite. As means, they say that {what}."


def _not_measured(columns: Columns) -> list[str]:
    gaps = [
        (TOTAL in columns, f"{TOTAL}: no column is a total loss"),
        (any(name.endswith("/raw") for name in columns), "loss terms: no column is a part of the loss"),
        (NORM in columns, f"{NORM}: no column is a gradient norm"),
        (any(name.startswith(RATE) for name in columns), f"{RATE}: no column is a learning rate"),
        (any(name.startswith("eval/") for name in columns), "validation: no column is a metric"),
        ("train/clip_coefficient" in columns, "train/clip_coefficient: whether and how far gradients were clipped"),
    ]
    found = [gap for there, gap in gaps if not there]
    modules = any(name.startswith(("grads/", "activations/")) for name in columns)
    return found if modules else [*found, *NEVER]
