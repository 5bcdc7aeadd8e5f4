"""Validation metrics over time: mIoU above, AP50 below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from bifusion_diag.diagnosis.names import AP50, MIOU
from bifusion_diag.diagnosis.validation import against, evaluated_at, same_validation
from bifusion_diag.reports.language import listed, tr
from bifusion_diag.reports.numbers import text
from bifusion_diag.reports.palette import RULE
from bifusion_diag.reports.plots.timeline import READOUT, Trace, span
from bifusion_diag.reports.reduce import min_max
from bifusion_diag.reports.svg import (
    LEFT,
    RIGHT,
    Plot,
    drawing,
    end_labels,
    render,
    time_axis,
    time_limits,
    title,
)
from bifusion_diag.reports.zoom import Zoom

METRICS = {MIOU: ("mIoU", "Validation mIoU"), AP50: ("AP50", "Validation AP50, class-agnostic")}
MARKED = 60  # evaluations up to which each has a dot


class _Curve(NamedTuple):
    """One metric of one run."""

    trace: Trace
    steps: NDArray[np.int64]
    values: NDArray[np.float64]


def draw_validation(traces: Sequence[Trace]) -> Plot | None:
    """Draw the metrics of one or more runs; None where none was evaluated."""
    metrics = {name: found for name in METRICS if (found := _curves(traces, name))}
    if not metrics:
        return None
    zoom = Zoom()
    height = 1.55 * len(metrics) + 0.45
    with drawing(height) as figure:
        grid = figure.add_gridspec(
            len(metrics), 1, left=LEFT, right=RIGHT, top=1 - 0.28 / height, bottom=0.45 / height, hspace=0.42
        )
        panels = [zoom.panel(figure.add_subplot(grid[row])) for row in range(len(metrics))]
        for axes, (name, curves) in zip(panels, metrics.items(), strict=True):
            time_limits(axes, *span(traces))
            _draw_curves(axes, curves, zoom)
            title(axes, tr(METRICS[name][1]))
            axes.tick_params(labelbottom=axes is panels[-1])
        panels[-1].set_xlabel(tr("step"))
        alt = _alt(metrics)
        return Plot(
            "validation",
            listed((tr("mIoU and AP50 on validation scenes"), *_labels(traces)), ", "),
            _note(metrics),
            alt,
            render(figure, "validation", alt),
            time_axis(panels[-1]),
            _readout(metrics),
            zoom=zoom.data(),
        )


def _labels(traces: Sequence[Trace]) -> list[str]:
    """What is measured against, where that is not the truth; with the names of the runs where it is not so of all."""
    traces = [trace for trace in traces if trace.run.names("eval/")]
    words = {trace.label: against(trace.run) for trace in traces}
    if len({*words.values()}) == 1:
        return [each for each in list(words.values())[:1] if each]
    return [f"{label} {tr(each)}" for label, each in words.items() if each]


def _note(metrics: Mapping[str, Sequence[_Curve]]) -> str:
    """Which weights a point is of, and whether the curves may be compared."""
    note = tr("At a step: the weights that it begins with; at the last step of all, those after it.")
    runs = [curve.trace.run for curves in metrics.values() for curve in curves]
    if all(same_validation(runs[0], run) for run in runs):
        return note
    return listed((note, tr("The runs were evaluated on different scenes: their curves cannot be compared.")))


def _curves(traces: Sequence[Trace], name: str) -> list[_Curve]:
    curves = [_Curve(trace, *evaluated_at(trace.run.series(name))) for trace in traces]
    return [curve for curve in curves if curve.steps.size]


def _draw_curves(axes: Axes, curves: Sequence[_Curve], zoom: Zoom) -> None:
    for curve in curves:
        dot = "o" if curve.steps.size <= MARKED else ""
        colour = curve.trace.colour
        style = {"color": colour, "linewidth": 1.4, "marker": dot, "markersize": 3, "clip_on": False}
        zoom.curve(axes, curve.steps, curve.values, **style)
    axes.set_ylim(bottom=0, top=None if any(curve.values.any() for curve in curves) else 0.1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(float(value))))
    axes.grid(axis="y", color=RULE, linewidth=0.5)
    axes.set_axisbelow(True)
    end_labels(axes, [(curve.trace.label, float(curve.values[-1]), curve.trace.colour) for curve in curves], gap=0.16)


def _alt(metrics: Mapping[str, Sequence[_Curve]]) -> str:
    last = [
        f"{curve.trace.label} {METRICS[name][0]} {text(float(curve.values[-1]))}"
        for name, curves in metrics.items()
        for curve in curves
    ]
    return tr("mIoU and AP50 on validation scenes over time. At the last evaluation: {told}.", told=listed(last, "; "))


def _readout(metrics: Mapping[str, Sequence[_Curve]]) -> dict[str, tuple[list[int], list[float | None]]]:
    values: dict[str, tuple[list[int], list[float | None]]] = {}
    for name, curves in metrics.items():
        for curve in curves:
            x, y = min_max(curve.steps, curve.values, READOUT)
            values[f"{curve.trace.label} {METRICS[name][0]}"] = (x.tolist(), [float(f"{value:.4g}") for value in y])
    return values
