"""The plots of the page by section, and what no run has recorded for one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite
from typing import Any

from bifusion_diag.diagnosis.names import loss_terms
from bifusion_diag.diagnosis.quantity import NotMeasured
from bifusion_diag.reports.budget import Budget
from bifusion_diag.reports.language import tr
from bifusion_diag.reports.palette import BASELINE, CATEGORY
from bifusion_diag.reports.plots import (
    QUANTITIES,
    Trace,
    draw_alpha,
    draw_clip_ranges,
    draw_gradients,
    draw_heatmap,
    draw_projection,
    draw_terms,
    draw_throughput,
    draw_updates,
)
from bifusion_diag.reports.plots.scene import draw_scene
from bifusion_diag.reports.reduce import min_max, vertices
from bifusion_diag.reports.scene import scene_panel
from bifusion_diag.reports.svg import Plot

#: What a kind of plot draws; of updates the table of modules has the numbers.
RECORDED = {
    "terms": "loss/",
    "gradients": "loss_gradients/",
    "clip": "clip/",
    "projection": "projection/",
    "alpha": "gate/",
    "throughput": "throughput/",
}
RECORDED_VALUES = 400  # of a series in the JSON; the record has more

Drawn = tuple[list[Plot], list[str]]  # plots, and a sentence for what no run has


def why(traces: Sequence[Trace], budget: Budget) -> Drawn:
    """The plots of losses, features, projection and gate of every run that has them, and what no run has."""
    colours = _term_colours(traces)
    some = traces[-budget.runs :]  # the last ones are judged
    plots, gaps = _drawn(
        some,
        (
            "terms",
            partial(draw_terms, colours=colours),
            "Not measured: no run recorded the losses by term (probe losses).",
        ),
        (
            "gradients",
            partial(draw_gradients, colours=colours),
            "Not measured: no run recorded each term's share of the gradient in shared modules, and conflicts between "
            "terms (probe loss_gradients).",
        ),
        (
            "updates",
            draw_updates,
            "Not measured: no run recorded how far weights move, ‖Δw‖ ÷ ‖w‖ (probe updates).",
        ),
        ("clip", draw_clip_ranges, "Not measured: no run recorded the CLIP features (probe clip)."),
        ("projection", draw_projection, "Not measured: no run recorded the projection (probe projection)."),
        ("alpha", draw_alpha, "Not measured: no run recorded the gate (probe gate)."),
    )
    scenes, lacking = _scenes(some)
    plots += scenes
    gaps += lacking
    if not any(trace.run.names("eval/") for trace in traces):
        gaps.append(tr("Not measured: mIoU and AP on validation scenes (train with --evaluate-every)."))
    return plots, [*gaps, *_not_drawn(traces, some)]


def cost(traces: Sequence[Trace], budget: Budget) -> Drawn:
    """Where the time goes."""
    gap = "Not measured: no run recorded where the time of a step goes (probe throughput)."
    return _drawn(traces[-budget.runs :], ("throughput", draw_throughput, gap))


def heatmaps(traces: Sequence[Trace], budget: Budget) -> list[Plot]:
    """Gradient norms by module, and what else was recorded by module."""
    some = [trace for place, trace in enumerate(traces) if place == 0 or place > len(traces) - budget.runs]
    drawn = [draw_heatmap(some, quantity) for quantity in QUANTITIES[: budget.heatmaps]]
    return _first_open([plot for plot in drawn if plot is not None])


def _scenes(traces: Sequence[Trace]) -> Drawn:
    """α painted on a scene, beside the gate's histogram; and why not, where no run has it."""
    panels = [scene_panel(trace.run, trace.label) for trace in traces]
    drawn = [
        None if isinstance(panel, NotMeasured) else draw_scene(panel, f"scene{index}")
        for index, panel in enumerate(panels)
    ]
    plots = [plot for plot in drawn if plot is not None]
    reasons = [panel.reason for panel in panels if isinstance(panel, NotMeasured)]
    if not plots and reasons:  # of the last run, which is judged; a baseline has no gate
        return [], [tr("Not measured: α on a scene: {why}.", why=reasons[-1])]
    return _first_open(plots, _judged(traces, drawn)), []


def _not_drawn(traces: Sequence[Trace], some: Sequence[Trace]) -> list[str]:
    left_out = [trace.label for trace in traces if trace not in some]
    return [tr("Not drawn, for this page's size: {names}.", names=", ".join(left_out))] if left_out else []


def _drawn(traces: Sequence[Trace], *kinds: tuple[str, Callable[[Trace, str], Plot | None], str]) -> Drawn:
    """Plots of every run, and a sentence for every kind that no run has."""
    plots: list[Plot] = []
    gaps: list[str] = []
    for kind, draw, gap in kinds:
        drawn = [
            None if plot is None else replace(plot, numbers=_recorded(trace, RECORDED.get(kind)))
            for index, trace in enumerate(traces)
            for plot in [draw(trace, f"{kind}{index}")]
        ]
        plots += _first_open([plot for plot in drawn if plot is not None], _judged(traces, drawn))
        if not any(drawn):
            gaps.append(tr(gap))
    return plots, gaps


def _recorded(trace: Trace, prefix: str | None) -> dict[str, Any]:
    """The series of a plot with their extremes, at most so many values each; null: not finite."""
    found = {}
    for name in trace.run.names(prefix) if prefix else []:
        x, y = min_max(*vertices(trace.run.all_series[name]), RECORDED_VALUES)
        found[name] = {"steps": x.tolist(), "values": [value if isfinite(value) else None for value in y.tolist()]}
    return found


def _judged(traces: Sequence[Trace], drawn: Sequence[Plot | None]) -> Plot | None:
    """The plot of the first run that is no baseline."""
    pairs = zip(traces, drawn, strict=True)
    return next((plot for trace, plot in pairs if plot is not None and trace.colour != BASELINE), None)


def _first_open(plots: Sequence[Plot], shown: Plot | None = None) -> list[Plot]:
    """The one that is shown, else the first, then all others of the kind, folded: a reader is not to scroll past ten
    pictures of one kind.
    """
    shown = shown or next(iter(plots), None)
    ordered = sorted(plots, key=lambda plot: plot is not shown)
    return [plot if plot is shown else replace(plot, folded=True) for plot in ordered]


def _term_colours(traces: Sequence[Trace]) -> dict[str, str]:
    """One colour a loss term, the same in every run."""
    terms = dict.fromkeys(term for trace in traces for term in loss_terms(trace.run, "weighted"))
    return {term: CATEGORY[place % len(CATEGORY)] for place, term in enumerate(terms)}
