"""A run that is going on, in the terminal: one screen of lines, at any width.

One colour means trouble: a value that is not finite, an incident, a run that failed or fell silent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from bifusion_diag.diagnosis.findings import Finding
from bifusion_diag.diagnosis.names import AP50, MIOU, NORM, TOTAL
from bifusion_diag.diagnosis.origins import NON_FINITE
from bifusion_diag.diagnosis.rules.incidents import PREFIX
from bifusion_diag.diagnosis.spikes import FACTOR, MIN_PREVIOUS, WINDOW
from bifusion_diag.record.follow import RecordFollower
from bifusion_diag.record.schema import Event, Ints
from bifusion_diag.reports.numbers import text as number

TROUBLE = "bold red"
QUIET = "dim"
GAP = "  "
NOTES = ("stage", "resume", "signal", "note")  # kinds of events that are no incidents
BARS = "▁▂▃▄▅▆▇"  # no full block: lines below each other would grow together
BAD = "×"  # stands in a sparkline for a value that is not finite
WIDEST_SPARK = 60
NARROWEST = 8  # bars in which a course is seen
SILENCE = 60.0  # seconds without a block that are never remarkable
STEP_SECONDS = "train/step_seconds"
EVAL_SECONDS = "eval/seconds"
STATE = "state"  # key of a code, not of a magnitude
SWELLS = ("norm", "absmax")  # ends of the keys of series that grow where a module is in trouble


class ModuleSeries(NamedTuple):
    """A series of a module, ``<probe>/<module>/<key>``, where it was measured."""

    module: str
    key: str  # with the probe's name, unless that is "grads"
    steps: Ints  # (K,) K ≥ 1
    values: NDArray[np.float32]  # (K,)
    growth: (
        float | None
    )  # the last value ÷ the median of those before; None where there are too few, or not of a magnitude

    @property
    def now(self) -> float:
        """The last value."""
        return float(self.values[-1])


class _Row(NamedTuple):
    """A line of a list of modules."""

    label: str  # the end of it is the key
    key: str
    one: ModuleSeries


def live_lines(
    run: RecordFollower,
    modules: Sequence[ModuleSeries],
    *,
    now: float,
    width: int,
    height: int | None = None,
    top: int = 5,
    findings: Sequence[Finding] = (),
) -> list[Text]:
    """What there is to see of a run, as lines of at most `width` characters.

    Args:
        run: the run, as read just before.
        modules: what :func:`module_series` makes of it.
        now: seconds since the epoch.
        width: characters a line.
        height: lines there is room for; lists are shortened to fit. None: as many as it takes.
        top: entries of a list.
        findings: of its rows, worst first.
    """
    for entries in range(top, 0, -1):
        sections = [
            _head(run, now, width),
            _curves(run, width),
            _incidents(run, width, entries),
            _findings(run, findings, entries),
            _modules(run, modules, width, entries),
        ]
        lines = [line for section in sections if section for line in [Text(), *section]][1:]
        if height is None or len(lines) <= height:
            break
    lines = lines[:height]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines


def status_line(run: RecordFollower, *, now: float, findings: Sequence[Finding] = ()) -> str:
    """The same as one line of plain text, for a log. Of the findings the worst."""
    parts = [f"{run.header.name}: {run.status}", _progress(run, plain=True)]
    pace = step_seconds(run)
    if pace is not None:
        parts.append(f"{number(pace)} s/step")
    silent = silence(run, now)
    if not silent and (left := _left(run)) is not None:
        parts.append(f"{duration(left)} left")
    for name in (TOTAL, NORM):
        values = run.column(name)[1]
        if len(values):
            parts.append(f"{name} {number(float(values[-1]))}")
    parts.append(_counts(run) or "no incidents")
    if worst := _not_incidents(findings)[:1]:
        parts.append(f"{worst[0].severity}: {worst[0].title} ({worst[0].rule})")
    parts.append(silent or _age(run, now))
    return ", ".join(part for part in parts if part)


def silence(run: RecordFollower, now: float) -> str:
    """Words for a run that should have written a block since long; "" where there is nothing to say."""
    if run.status != "running":
        return ""
    evaluation = run.column(EVAL_SECONDS)[1]
    usual = max((step_seconds(run) or 0.0) * run.block_rows, float(evaluation[-1]) if len(evaluation) else 0.0)
    quiet = now - (run.written or run.begun)
    if quiet <= max(SILENCE, 5 * usual):
        return ""
    return f"no new block for {duration(quiet)}: stalled or killed?"


def step_seconds(run: RecordFollower) -> float | None:
    """Seconds a step by the clock; before that is known, as the run itself has measured it of late."""
    if run.pace is not None:
        return run.pace
    seconds = run.column(STEP_SECONDS)[1][-WINDOW:]
    seconds = seconds[np.isfinite(seconds)]
    return float(seconds.mean()) if len(seconds) and seconds.mean() > 0 else None


def module_series(run: RecordFollower) -> list[ModuleSeries]:
    """Series of modules, of every probe, in the order in which they were recorded. A state code that stands for
    non-finite gradients reads NaN."""
    modules = {module.name for module in run.header.modules}
    found: list[ModuleSeries] = []
    for column, name in enumerate(run.names):
        probe, _, rest = name.partition("/")
        module, _, key = rest.rpartition("/")
        if not module or probe in ("loss", "train", "eval") or (modules and module not in modules):
            continue
        here = ~run.missing[:, column]
        if here.any():
            values = run.values[here, column]
            if key == STATE:
                values = np.where(values == NON_FINITE, np.float32("nan"), values)
            name = key if probe == "grads" else f"{probe}/{key}"
            growth = _growth(values) if key.endswith(SWELLS) else None
            found.append(ModuleSeries(module, name, run.steps[here], values, growth))
    return found


def _growth(values: NDArray[np.float32]) -> float | None:
    """The last value ÷ the median of those before, with the windows that a spike of the gradient norm is judged by."""
    previous = values[-WINDOW - 1 : -1]
    previous = previous[np.isfinite(previous) & (previous > 0)]
    if len(previous) < MIN_PREVIOUS or not np.isfinite(values[-1]):
        return None
    return float(values[-1]) / float(np.median(previous))


def sparkline(values: NDArray[np.float32], width: int, *, norm: bool = False) -> Text:
    """At most `width` bars: means of consecutive values. Of a norm, the largest ones on a log axis, so that a spike of
    one step is seen. A bar with a value that is not finite is a mark of trouble."""
    line = Text()
    if not len(values) or width < 1:
        return line
    buckets = np.array_split(values.astype(np.float64), min(width, len(values)))
    finite = [bucket[np.isfinite(bucket)] for bucket in buckets]
    height = np.array([math.nan if not len(b) else b.max() if norm else b.mean() for b in finite])
    known = height[np.isfinite(height)]
    if norm and len(known) and (known > 0).all():
        height, known = np.log(height), np.log(known)
    low, high = (known.min(), known.max()) if len(known) else (0.0, 0.0)
    for value, bucket in zip(height, buckets, strict=True):
        if not np.isfinite(bucket).all():
            line.append(BAD, TROUBLE)
        else:
            line.append(BARS[round((value - low) / (high - low) * (len(BARS) - 1)) if high > low else 0], QUIET)
    return line


def duration(seconds: float) -> str:
    """A time in the two largest units that it needs."""
    whole = round(max(seconds, 0.0))
    for size, unit, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {small}"
    return f"{whole // 60} min" if whole >= 120 else f"{whole} s"


def _head(run: RecordFollower, now: float, width: int) -> list[Text]:
    title = Text.assemble((run.header.name, "bold"))
    title.append(GAP)
    title.append(run.status, TROUBLE if run.status == "failed" else "")
    if run.header.preset:
        title.append(f"{GAP}{run.header.preset}", QUIET)
    lines = [title]
    if run.error:
        lines.append(Text(run.error.splitlines()[0], TROUBLE))
    progress = _progress(run)
    line = Text(progress)
    share = _share(run)
    if share is not None:
        percent = f"{math.floor(100 * share)} %"
        room = min(width - len(progress) - len(percent) - 2 * len(GAP), WIDEST_SPARK)
        if room >= NARROWEST:
            done = round(room * share)
            line.append(GAP)
            line.append("━" * done)
            line.append("─" * (room - done), QUIET)
        line.append(GAP + percent)
    lines.append(line)
    facts: list[str] = []
    pace = step_seconds(run)
    if pace is not None:
        facts += [f"{number(pace)} s/step", f"{number(1 / pace)} steps/s"]
    silent = silence(run, now)
    if not silent:
        left, age = _left(run), _age(run, now)
        facts += [] if left is None else [f"{duration(left)} left"]
        facts += [age] if age else []
    lines += [Text(line) for line in _wrap(facts, width)]
    if silent:
        lines.append(Text(silent, TROUBLE))
    return lines


def _done(run: RecordFollower) -> int:
    return int(run.steps[-1]) + 1 if len(run.steps) else 0


def _progress(run: RecordFollower, plain: bool = False) -> str:
    planned = run.header.steps_planned
    shown = [str(n) if plain else number(n, whole=True) for n in (_done(run), planned) if n is not None]
    return f"step {'/'.join(shown)}" if plain else f"step {' of '.join(shown)}"


def _share(run: RecordFollower) -> float | None:
    planned = run.header.steps_planned
    return min(_done(run) / planned, 1.0) if planned else None


def _left(run: RecordFollower) -> float | None:
    """Seconds to the last step."""
    pace, planned = step_seconds(run), run.header.steps_planned
    return max(planned - _done(run), 0) * pace if run.status == "running" and pace and planned else None


def _age(run: RecordFollower, now: float) -> str:
    if run.status != "running":
        return ""
    if run.written is None:
        return f"no block yet, begun {duration(now - run.begun)} ago"
    return f"last block {duration(now - run.written)} ago"


def _wrap(parts: Sequence[str], width: int) -> list[str]:
    """Facts in as few lines as they fit into."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 3 + len(part) <= width:
            lines[-1] += f" · {part}"
        else:
            lines.append(part)
    return lines


def _curve_names(run: RecordFollower) -> Iterator[tuple[str, str]]:
    """Series of the loop and a short label for each."""
    yield TOTAL, TOTAL
    terms: set[str] = set()
    for name in run.names:
        term = name.split("/")[1]
        if name.startswith("loss/") and name != TOTAL and term not in terms and not name.endswith("/weighted"):
            terms.add(term)
            yield name, GAP + term
    yield NORM, NORM
    yield from ((name, name) for name in run.names if name.startswith("train/lr"))
    yield from ((name, name) for name in (STEP_SECONDS, MIOU, AP50))


def _curves(run: RecordFollower, width: int) -> list[Text]:
    """Last, smallest and largest value of every series of the loop over the window, and its course."""
    rows: list[tuple[str, list[str], NDArray[np.float32], bool]] = []
    for name, label in _curve_names(run):
        values = run.column(name)[1]
        if len(values):
            finite = values[np.isfinite(values)]
            ends = [float(values[-1]), *([float(finite.min()), float(finite.max())] if len(finite) else [math.nan] * 2)]
            rows.append((label, [number(x) for x in ends], values, name.endswith("norm")))
    if not rows:
        return []
    span = f"last {number(len(run.steps), whole=True)} steps"
    titles = ["last", "min", "max"]
    label_width = min(max(len(span), *(len(row[0]) for row in rows)), max(width // 3, 12))
    columns = [max(len(titles[i]), *(len(row[1][i]) for row in rows)) for i in range(3)]
    while (room := width - label_width - sum(columns) - (len(columns) + 1) * len(GAP)) < NARROWEST and len(columns) > 1:
        columns.pop()  # the course tells more than the extremes
    room = min(room, WIDEST_SPARK)
    header = Text.assemble((_start(span, label_width).ljust(label_width), QUIET))
    for title, size in zip(titles, columns, strict=False):
        header.append(GAP + title.rjust(size), QUIET)
    lines = [header]
    for label, numbers, values, norm in rows:
        line = Text(_start(label, label_width).ljust(label_width))
        for i, (shown, size) in enumerate(zip(numbers, columns, strict=False)):
            bad = i == 0 and not math.isfinite(values[-1])
            line.append(GAP)
            line.append(shown.rjust(size), TROUBLE if bad else QUIET if i else "")
        line.append(GAP)
        line.append_text(sparkline(values, room, norm=norm))
        lines.append(line)
    return lines


def _counts(run: RecordFollower) -> str:
    return ", ".join(f"{number(run.count(kind), whole=True)} {kind}" for kind in run.kinds if kind not in NOTES)


def _incidents(run: RecordFollower, width: int, top: int) -> list[Text]:
    newest = [event for event in reversed(run.events) if event.kind not in NOTES][:top]
    lines = [_title("incidents", _counts(run) or "none so far")]
    steps = ["" if event.step is None else number(event.step, whole=True) for event in newest]
    indent = max(map(len, steps), default=0)
    for event, step in zip(newest, steps, strict=True):
        scenes = _scenes(event)
        line = Text.assemble((step.rjust(indent), TROUBLE))
        line.append(GAP)
        line.append(event.message if event.message.startswith(event.kind) else f"{event.kind}: {event.message}")
        if scenes and line.cell_len + len(GAP) + len(scenes) > width:
            lines += [line, Text(" " * indent + GAP + scenes, QUIET)]
        else:
            line.append(GAP + scenes, QUIET)
            lines.append(line)
    return lines


def _findings(run: RecordFollower, findings: Sequence[Finding], top: int) -> list[Text]:
    """What rules say of the window, but for the incidents, which have a list of their own."""
    shown = _not_incidents(findings)
    if not shown:
        return []
    count = number(len(run.steps), whole=True)
    lines = [_title("findings", f"in these {count} steps: {len(shown)}; a rule's page: bifusion-diag rules ID")]
    size = max(len(finding.severity) for finding in shown[:top])
    for finding in shown[:top]:
        line = Text.assemble((finding.severity.ljust(size), TROUBLE if finding.severity == "error" else ""))
        line.append(GAP + finding.title)
        where = finding.module or finding.term
        facts = [where] if where and where not in finding.title else []
        if finding.steps is not None:
            first, last = (number(step, whole=True) for step in finding.steps)
            facts.append(f"step {first}" if first == last else f"steps {first}–{last}")
        line.append(GAP + ", ".join([*facts, finding.rule]), QUIET)
        lines.append(line)
    return lines


def _not_incidents(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if not finding.rule.startswith(PREFIX)]


def _scenes(event: Event) -> str:
    scenes = event.data.get("scenes")
    return ", ".join(map(str, scenes)) if isinstance(scenes, list) else ""


def _modules(run: RecordFollower, series: Sequence[ModuleSeries], width: int, top: int) -> list[Text]:
    """Modules that are not finite, those that grow, those with the largest gradients."""
    if not series:
        return []
    lines = list(_nonfinite(run, series, width, top))
    swelling = [one for one in series if one.key.endswith(SWELLS)]
    fastest: dict[str, ModuleSeries] = {}  # of every module that grows, the series that grows fastest
    for one in sorted(swelling, key=lambda one: one.growth or 0.0):
        if (one.growth or 0.0) > 1:
            fastest.pop(one.module, None)
            fastest[one.module] = one
    growing = [_Row(f"{one.module} {one.key}", one.key, one) for one in list(fastest.values())[: -top - 1 : -1]]
    kinds = [[one for one in swelling if one.key == key] for key in ("param_norm", "output_norm")]
    gradients = next((kind for kind in kinds if kind), [])
    finite = sorted((one for one in gradients if math.isfinite(one.now)), key=lambda one: -one.now)[:top]
    largest = [_Row(one.module, "", one) for one in finite]
    tables = [
        ("growing fastest", f"now, and ÷ the median of the {WINDOW} before", growing),
        ("largest gradients", f"{gradients[0].key} now" if gradients else "", largest),
    ]
    blocks: list[list[Text]] = []
    wide = width >= 120 and bool(growing) and bool(largest)
    for name, note, rows in tables:
        if rows:
            blocks.append([_title(name, note), *_module_rows(rows, (width - 4) // 2 if wide else width)])
    if lines:
        lines.append(Text())
    if not wide:
        for block in blocks:
            lines += [*block, Text()]
        return lines[:-1]
    left, right = blocks
    half = (width - 4) // 2
    for i in range(max(len(left), len(right))):
        line = left[i].copy() if i < len(left) else Text()
        line.truncate(half, overflow="ellipsis", pad=True)
        line.append("    ")
        line.append_text(right[i] if i < len(right) else Text())
        lines.append(line)
    return lines


def _nonfinite(run: RecordFollower, series: Sequence[ModuleSeries], width: int, top: int) -> Iterator[Text]:
    """Modules that had a non-finite value in the window: the one that had it first comes first."""
    bad: dict[str, tuple[set[int], list[str]]] = {}
    for one in series:
        steps = one.steps[~np.isfinite(one.values)]
        if len(steps):
            when, keys = bad.setdefault(one.module, (set(), []))
            when.update(steps.tolist())
            if one.key != STATE:
                keys.append(one.key)
    if not bad:
        return
    order = {module.name: module.order for module in run.header.modules}
    ranked = sorted(bad, key=lambda module: (min(bad[module][0]), order.get(module, 0)))
    note = f"modules in these steps: {len(bad)}; since when, how often"
    yield Text.assemble(("not finite", TROUBLE), (GAP + note, QUIET))
    began = [number(min(bad[module][0]), whole=True) for module in ranked[:top]]
    often = [f"{number(len(bad[module][0]), whole=True)} ×" for module in ranked[:top]]
    began_width, often_width = max(map(len, began)), max(map(len, often))
    for module, first, times in zip(ranked, began, often, strict=False):
        line = Text.assemble((first.rjust(began_width), TROUBLE))
        line.append(GAP + times.rjust(often_width) + GAP)
        line.append(_end(module, width - line.cell_len))
        line.append(GAP + ", ".join(bad[module][1]), QUIET)
        yield line


def _module_rows(rows: Sequence[_Row], width: int) -> Iterator[Text]:
    now = [number(row.one.now) for row in rows]
    growth = ["" if row.one.growth is None else f"{number(row.one.growth)} ×" for row in rows]
    now_width, growth_width = max(map(len, now)), max(map(len, growth))
    room = width - now_width - growth_width - 2 * len(GAP)
    longest = max(len(row.label) for row in rows)
    name_width = min(longest, room if room < 40 else max(room - len(GAP) - 12, 40))
    spark = min(room - name_width - len(GAP), WIDEST_SPARK // 2)
    for row, value, times in zip(rows, now, growth, strict=True):
        label = _end(row.label, name_width)
        line = Text(label.ljust(name_width))
        line.stylize(QUIET, len(label) - len(row.key), len(label))
        line.append(GAP)
        line.append(value.rjust(now_width), "" if math.isfinite(row.one.now) else TROUBLE)
        line.append(GAP)
        line.append(times.rjust(growth_width), TROUBLE if (row.one.growth or 0.0) > FACTOR else QUIET)
        if spark >= NARROWEST:
            line.append(GAP)
            line.append_text(sparkline(row.one.values, spark, norm=True))
        yield line


def _title(name: str, note: str) -> Text:
    return Text.assemble((name, "bold"), (GAP + note, QUIET))


def _start(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"


def _end(name: str, width: int) -> str:
    """A name cut at its beginning: the end of a module's name tells most."""
    return name if len(name) <= width else "…" + name[len(name) - width + 1 :]
