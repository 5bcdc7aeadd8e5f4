"""The timeline: losses above, pre-clip gradient norm below, bad steps as ticks above both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from bifusion_diag.diagnosis.measures import Measures
from bifusion_diag.diagnosis.names import NORM, TOTAL
from bifusion_diag.record.schema import Run
from bifusion_diag.reports.numbers import text
from bifusion_diag.reports.palette import BAND, NON_FINITE, QUIET, RULE, SPIKE
from bifusion_diag.reports.reduce import line, min_max, smoothed
from bifusion_diag.reports.svg import (
    LEFT,
    RIGHT,
    Plot,
    drawing,
    end_labels,
    log_axis,
    render,
    time_axis,
    time_limits,
    title,
)

READOUT = 1000  # values a line, for the cursor


@dataclass(frozen=True)
class Trace:
    """One run as it is drawn: the baseline in quiet grey, the candidate in the accent colour."""

    run: Run
    measures: Measures
    label: str
    colour: str


def span(traces: Sequence[Trace]) -> tuple[int, int]:
    """First and last step of all runs."""
    return min(int(t.run.steps[0]) for t in traces), max(int(t.run.steps[-1]) for t in traces)


def draw_timeline(traces: Sequence[Trace]) -> Plot:
    """Draw the timeline of one or two runs; the last one is on top and gives the stages."""
    first, last = span(traces)
    rug_height = 0.17 * len(traces)
    with drawing(5.3 + rug_height) as figure:
        grid = figure.add_gridspec(
            3, 1, height_ratios=[rug_height, 2.1, 2.5], left=LEFT, right=RIGHT, top=0.955, bottom=0.085, hspace=0.22
        )
        rug, losses, norms = (figure.add_subplot(grid[row]) for row in range(3))
        _draw_rug(rug, traces)
        _draw_lines(losses, traces, TOTAL)
        _draw_lines(norms, traces, NORM)
        title(losses, "Total loss")
        title(norms, "Pre-clip gradient norm (log axis)")
        for axes in (rug, losses, norms):
            time_limits(axes, first, last)
        _draw_stages((losses, norms), traces[-1].run, last)
        losses.tick_params(labelbottom=False)
        norms.set_xlabel("step")
        for axes, name in ((losses, TOTAL), (norms, NORM)):
            end_labels(axes, [(trace.label, _last(trace.run, name), trace.colour) for trace in traces])
        alt = _alt(traces)
        return Plot(
            "timeline",
            "Losses and pre-clip gradient norm",
            "Thin: each step. Bold: running median of 21 steps, of a run of 42 at least. Ticks on top: bad steps, red "
            "non-finite, orange spike.",
            alt,
            render(figure, "timeline", alt),
            time_axis(norms),
            _readout(traces),
        )


def _draw_rug(axes: Axes, traces: Sequence[Trace]) -> None:
    for row, trace in enumerate(traces):
        for steps, colour, width in ((trace.measures.spikes, SPIKE, 1.4), (trace.measures.nonfinite, NON_FINITE, 1.6)):
            axes.vlines(steps, row + 0.12, row + 0.88, color=colour, linewidth=width)
        axes.text(
            1.008, row + 0.5, _bad_steps(trace), color=trace.colour, va="center",
            transform=axes.get_yaxis_transform(),
        )  # fmt: skip
    axes.hlines(range(1, len(traces)), 0, 1, color=RULE, linewidth=0.5, transform=axes.get_yaxis_transform())
    axes.set_ylim(0, len(traces))
    axes.set_yticks([])
    axes.tick_params(bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)


def _bad_steps(trace: Trace) -> str:
    """How many steps are bad, in words; the lists of steps end where the count does not."""
    count = trace.measures.number("bad_steps")
    if count is None:
        listed = len(trace.measures.bad)
        return f"at least {listed} bad" if listed else "bad steps: not measured"
    return f"{text(count, whole=True) if count else 'no'} bad step{'' if count == 1 else 's'}"


def _draw_lines(axes: Axes, traces: Sequence[Trace], name: str) -> None:
    for trace in traces:
        series = trace.run.series(name)
        if series is None:
            continue
        x, y = line(series)
        axes.plot(x, y, color=trace.colour, linewidth=0.6, alpha=0.5)
        smooth = min_max(series.steps, smoothed(series.value))
        axes.plot(*smooth, color=trace.colour, linewidth=1.5)
    positive = all((series := trace.run.series(name)) is None or (series.stats.min or 0) > 0 for trace in traces)
    if name == NORM and positive:
        axes.set_yscale("log")
        log_axis(axes.yaxis)
    axes.grid(axis="y", color=RULE, linewidth=0.5)
    axes.set_axisbelow(True)
    if not axes.lines:
        axes.text(0.5, 0.5, f"{name} was not recorded", transform=axes.transAxes, ha="center", color=QUIET)


def _draw_stages(panels: Sequence[Axes], run: Run, last: int) -> None:
    """Stages as alternating bands, named at the top of the first panel."""
    events = [event for event in run.events if event.kind in ("stage", "schedule") and event.step is not None]
    for index, event in enumerate(events):
        assert event.step is not None
        later = [other.step for other in events[index + 1 :] if other.step is not None]
        stop = later[0] if later else last
        for axes in panels:
            if index % 2:
                axes.axvspan(event.step, stop, color=BAND, zorder=0, linewidth=0)
        name = str(event.data.get("name") or event.message)
        panels[0].annotate(
            name[:24], (event.step, 1), xycoords=("data", "axes fraction"), xytext=(3, -3), textcoords="offset points",
            va="top", color=QUIET, fontsize=8,
        )  # fmt: skip


def _last(run: Run, name: str) -> float:
    series = run.series(name)
    smooth = np.zeros(0) if series is None else smoothed(series.value)
    finite = smooth[np.isfinite(smooth)]
    return float(finite[-1]) if finite.size else float("nan")


def _alt(traces: Sequence[Trace]) -> str:
    parts = [
        f"{trace.label}: {_bad_steps(trace)}, largest gradient norm {text(trace.measures.number('grad_norm/max'))}"
        for trace in traces
    ]
    return "Losses and pre-clip gradient norm over time. " + "; ".join(parts) + "."


def _readout(traces: Sequence[Trace]) -> dict[str, tuple[list[int], list[float | None]]]:
    values: dict[str, tuple[list[int], list[float | None]]] = {}
    for name, words in ((TOTAL, "loss"), (NORM, "grad norm")):
        for trace in traces:
            series = trace.run.series(name)
            if series is not None:
                x, y = min_max(series.steps, series.value, READOUT)
                values[f"{trace.label} {words}"] = (
                    x.tolist(),
                    [float(f"{value:.4g}") if np.isfinite(value) else None for value in y],
                )
    return values
