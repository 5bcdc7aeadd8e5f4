"""The timeline: bad steps as ticks above losses, pre-clip gradient norm and learning rate, on one time axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from bifusion_diag.diagnosis.measures import Measures
from bifusion_diag.diagnosis.names import NORM, TOTAL
from bifusion_diag.record.schema import Run, Series
from bifusion_diag.reports.language import listed, tr
from bifusion_diag.reports.numbers import text
from bifusion_diag.reports.palette import BAND, INK, NON_FINITE, QUIET, RULE, SPIKE
from bifusion_diag.reports.reduce import MAX_VERTICES, min_max, smoothed, vertices
from bifusion_diag.reports.svg import (
    LEFT,
    RIGHT,
    Plot,
    drawing,
    end_labels,
    log_axis,
    render,
    tick,
    time_axis,
    time_limits,
    title,
)
from bifusion_diag.reports.zoom import DETAIL, Zoom

READOUT = 1000  # values a line, for the cursor
RATE = "train/lr"
TOGETHER = 64_000  # vertices of a quantity, of all runs; drawn at first is a quarter
GRID = 1000  # places at which runs of one side are set against each other
STAGE_ROOM = 0.012  # of the axis' width a letter of a stage's name takes


@dataclass(frozen=True)
class Trace:
    """One run as it is drawn: the baseline in quiet grey, the candidate in the accent colour.

    Runs with the same label are one side of a comparison and are drawn as one: a median line within a band.
    """

    run: Run
    measures: Measures
    label: str
    colour: str
    incidents: Mapping[int, str] | None = None  # step -> anchor in the page


def span(traces: Sequence[Trace]) -> tuple[int, int]:
    """First and last step of all runs."""
    return min(int(t.run.steps[0]) for t in traces), max(int(t.run.steps[-1]) for t in traces)


def sides(traces: Sequence[Trace]) -> list[list[Trace]]:
    """The traces by label, in order."""
    found: dict[str, list[Trace]] = {}
    for trace in traces:
        found.setdefault(trace.label, []).append(trace)
    return list(found.values())


def draw_timeline(traces: Sequence[Trace], *, detail: int = DETAIL) -> Plot:
    """Draw the timeline of one or more runs; the last one is on top and gives the stages.

    Args:
        traces: the runs, the baseline first.
        detail: vertices a line that zooming may show.
    """
    first, last = span(traces)
    rates = any(trace.run.names(RATE) for trace in traces)
    rug_height = 0.17 * len(traces)
    heights = [rug_height, 2.1, 2.5, *([0.85] if rates else [])]
    whole = sum(heights) + 0.55 + 0.3 * len(heights)
    zoom = Zoom(min(detail, TOGETHER // len(traces)), min(MAX_VERTICES, TOGETHER // (4 * len(traces))))
    with drawing(whole) as figure:
        grid = figure.add_gridspec(
            len(heights), 1, height_ratios=heights, left=LEFT, right=RIGHT, top=1 - 0.1 / whole, bottom=0.48 / whole,
            hspace=0.3 * len(heights) / sum(heights),
        )  # fmt: skip
        rug, *panels = (zoom.panel(figure.add_subplot(grid[row])) for row in range(len(heights)))
        for axes in (rug, *panels):
            time_limits(axes, first, last)
        _draw_rug(rug, traces, zoom)
        for axes, name in zip(panels, (TOTAL, NORM, RATE), strict=False):
            _draw_lines(axes, traces, name, zoom)
            axes.tick_params(labelbottom=axes is panels[-1])
        title(panels[0], tr("Total loss"))
        logarithmic = panels[1].get_yscale() == "log"
        title(panels[1], tr("Pre-clip gradient norm (log axis)" if logarithmic else "Pre-clip gradient norm"))
        if rates:
            title(panels[2], tr("Learning rate"))
        _draw_stages(panels, traces[-1].run, (first, last), zoom)
        panels[-1].set_xlabel(tr("step"))
        for axes, name in zip(panels, (TOTAL, NORM, RATE), strict=False):
            end_labels(axes, [(side[0].label, _last(side, name), side[0].colour) for side in sides(traces)],
                       gap=0.1 if name != RATE else 0.22)  # fmt: skip
        alt = _alt(traces)
        return Plot(
            "timeline",
            tr("Loss, pre-clip gradient norm and learning rate") if rates else tr("Losses and pre-clip gradient norm"),
            _caption(traces),
            alt,
            render(figure, "timeline", alt),
            time_axis(panels[-1]),
            _readout(traces),
            zoom=zoom.data(),
        )


def _caption(traces: Sequence[Trace]) -> str:
    several = any(len(side) > 1 for side in sides(traces))
    lines = (
        tr("Of several runs: the band holds every value of every run, the line is the median of their running medians.")
        if several
        else tr("Thin: each step. Bold: running median of 21 steps, of a run of 42 at least.")
    )
    marks = tr("Ticks on top: bad steps, red non-finite, orange spike.")
    links = tr("A diamond leads to the incident.") if any(trace.incidents for trace in traces) else ""
    return listed((lines, marks, links))


def _draw_rug(axes: Axes, traces: Sequence[Trace], zoom: Zoom) -> None:
    for row, trace in enumerate(traces):
        for steps, colour, width in ((trace.measures.spikes, SPIKE, 1.4), (trace.measures.nonfinite, NON_FINITE, 1.6)):
            if len(steps):
                zoom.stretch(axes.vlines(steps, row + 0.12, row + 0.88, color=colour, linewidth=width))
        for step, anchor in (trace.incidents or {}).items():
            (mark,) = axes.plot([step], [row + 0.5], marker="D", markersize=3.4, color=INK, clip_on=False, linestyle="")
            mark.set_url(anchor)
            zoom.text(mark, step)
    row = 0
    for side in sides(traces):
        axes.text(
            1.014, row + len(side) / 2, _bad_steps(side), color=side[0].colour, va="center",
            transform=axes.get_yaxis_transform(),
        )  # fmt: skip
        row += len(side)
    axes.hlines(range(1, len(traces)), 0, 1, color=RULE, linewidth=0.5, transform=axes.get_yaxis_transform())
    axes.set_ylim(len(traces), 0)
    axes.set_yticks([])
    axes.tick_params(bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)


def _bad_steps(side: Sequence[Trace]) -> str:
    """How many steps are bad, in words; the lists of steps end where the count does not."""
    counts = [trace.measures.number("bad_steps") for trace in side]
    known = [count for count in counts if count is not None]
    if not known:
        listed = sum(len(trace.measures.bad) for trace in side)
        return tr("at least {n} bad", n=listed) if listed else tr("bad steps: not measured")
    total = sum(known)
    if not total:
        return tr("no bad steps")
    return tr("{n} bad step" if total == 1 else "{n} bad steps", n=text(total, whole=True))


def _draw_lines(axes: Axes, traces: Sequence[Trace], name: str, zoom: Zoom) -> None:
    found = [trace.run.all_series[one] for trace in traces for one in _names(trace.run, name)]
    for side in sides(traces):
        if len(side) > 1:
            _draw_side(axes, side, name, zoom)
            continue
        for one in _names(side[0].run, name):
            series, colour = side[0].run.all_series[one], side[0].colour
            if name == RATE:
                zoom.curve(axes, *vertices(series), color=colour, linewidth=1.3)
                continue
            zoom.curve(axes, *vertices(series), color=colour, linewidth=0.6, alpha=0.5)
            zoom.curve(axes, series.steps, smoothed(series.value), color=colour, linewidth=1.5)
    if name == NORM and found and all((series.stats.min or 0) > 0 for series in found):
        axes.set_yscale("log")
        log_axis(axes.yaxis)
    elif name == RATE:
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="plain")
        axes.yaxis.set_major_formatter(lambda value, _: tick(value) if value else "0")
        axes.locator_params(axis="y", nbins=3)
    axes.grid(axis="y", color=RULE, linewidth=0.5)
    axes.set_axisbelow(True)
    if not found:
        axes.text(
            0.5, 0.5, tr("{name} was not recorded", name=name), transform=axes.transAxes, ha="center", color=QUIET
        )


def _names(run: Run, name: str) -> list[str]:
    """The series of that name; of the learning rate those of all groups of parameters."""
    if name == RATE:
        return run.names(RATE)
    return [name] if run.series(name) is not None else []


def _draw_side(axes: Axes, side: Sequence[Trace], name: str, zoom: Zoom) -> None:
    """Several runs as one colour: the median of their running medians, and a band that holds every value of all."""
    found = [trace.run.all_series[one] for trace in side for one in _names(trace.run, name)]
    if not found:
        return
    first, last = span(side)
    edges = np.unique(np.linspace(first, last + 1, GRID + 1).astype(np.int64))
    low, high = np.full(edges.size - 1, np.inf), np.full(edges.size - 1, -np.inf)
    middles = []
    for series in found:
        place = (np.searchsorted(edges, series.steps, side="right") - 1).clip(0, low.size - 1)
        np.fmin.at(low, place, np.where(np.isfinite(series.min), series.min, np.inf))
        np.fmax.at(high, place, np.where(np.isfinite(series.max), series.max, -np.inf))
        smooth = smoothed(series.value)
        known = np.isfinite(smooth)
        middles.append(np.interp(edges[:-1], series.steps[known], smooth[known], left=np.nan, right=np.nan)
                       if known.any() else np.full(low.size, np.nan))  # fmt: skip
    seen = np.isfinite(low) & np.isfinite(high)
    colour = side[0].colour
    zoom.stretch(axes.fill_between(edges[:-1][seen], low[seen], high[seen], color=colour, alpha=0.25, linewidth=0))
    table = np.stack(middles)
    some = np.isfinite(table).any(axis=0)
    line = np.full(low.size, np.nan)
    line[some] = np.nanmedian(table[:, some], axis=0)
    zoom.curve(axes, edges[:-1], line, color=colour, linewidth=1.5)


def stages(run: Run, last: int) -> Iterator[tuple[int, int, str]]:
    """The stages and schedule changes of a run: first step, step at which the next begins, name."""
    events = [event for event in run.events if event.kind in ("stage", "schedule") and event.step is not None]
    ends = [event.step or 0 for event in events[1:]] + [last]
    for event, stop in zip(events, ends, strict=False):  # without events there is no end either
        yield event.step or 0, stop, str(event.data.get("name") or event.message)


def _draw_stages(panels: Sequence[Axes], run: Run, limits: tuple[int, int], zoom: Zoom) -> None:
    """Stages as alternating bands, named at the top of the first panel where there is room."""
    first, last = limits
    found = list(stages(run, last))
    for index, (start, stop, _) in enumerate(found):
        for axes in panels:
            if index % 2:
                zoom.stretch(axes.axvspan(start, stop, color=BAND, zorder=0, linewidth=0))
    free = -np.inf
    for start, stop, name in found:
        share = (start - first) / max(last - first, 1)
        if share < free:
            continue
        name = name[:24]
        free = share + STAGE_ROOM * len(name)
        label = panels[0].annotate(
            name, (start, 1), xycoords=("data", "axes fraction"), xytext=(3, -3), textcoords="offset points",
            va="top", color=QUIET, fontsize=8,
        )  # fmt: skip
        zoom.text(label, start, stop)


def _last(side: Sequence[Trace], name: str) -> float:
    ends = []
    for trace in side:
        for one in _names(trace.run, name)[:1]:
            smooth = smoothed(trace.run.all_series[one].value)
            finite = smooth[np.isfinite(smooth)]
            ends += [float(finite[-1])] if finite.size else []
    return float(np.median(ends)) if ends else float("nan")


def _alt(traces: Sequence[Trace]) -> str:
    parts = []
    for side in sides(traces):
        largest = [norm for trace in side if (norm := trace.measures.number("grad_norm/max")) is not None]
        parts.append(
            tr(
                "{name}: {bad}, largest gradient norm {norm}",
                name=side[0].label,
                bad=_bad_steps(side),
                norm=text(max(largest, default=None)),
            )
        )
    return tr("Losses and pre-clip gradient norm over time. {runs}.", runs=listed(parts, "; "))


def _readout(traces: Sequence[Trace]) -> dict[str, tuple[list[int], list[float | None]]]:
    values: dict[str, tuple[list[int], list[float | None]]] = {}
    for name, words in ((TOTAL, tr("loss")), (NORM, tr("grad norm")), (RATE, tr("learning rate"))):
        for side in sides(traces):
            for place, trace in enumerate(side):
                for one in _names(trace.run, name)[:1]:
                    label = trace.label if len(side) == 1 else f"{trace.label} {place + 1}"
                    most = min(READOUT, 10 * READOUT // len(traces))
                    values[f"{label} {words}"] = readout_of(trace.run.all_series[one], most)
    return values


def readout_of(series: Series, most: int = READOUT) -> tuple[list[int], list[float | None]]:
    """Steps and values of a series for the cursor, None where a value is not finite.

    Of a reduced series the highest of a bucket: what a reader looks for is never lower than what is shown.
    """
    x, y = min_max(series.steps, series.value if series.exact else _highest(series), most)
    return x.tolist(), [float(f"{value:.4g}") if np.isfinite(value) else None for value in y]


def _highest(series: Series) -> NDArray[np.float64]:
    return np.where(series.nonfinite > 0, np.nan, series.max)


__all__ = ["GRID", "READOUT", "Trace", "draw_timeline", "readout_of", "sides", "span", "stages"]
