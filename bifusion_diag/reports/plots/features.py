"""Plots of the fusion's inside: CLIP ranges, projection counts, α over time. Each shows one run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from bifusion_diag.diagnosis.criteria import ALPHA_BAND
from bifusion_diag.diagnosis.names import CLIP_PLACES, loss_terms
from bifusion_diag.record.schema import Run, Series
from bifusion_diag.reports.language import listed, tr
from bifusion_diag.reports.numbers import text
from bifusion_diag.reports.palette import ACCENT, BASELINE, CATEGORY, NON_FINITE, RULE
from bifusion_diag.reports.plots.timeline import Trace
from bifusion_diag.reports.reduce import MAX_VERTICES, bins, smoothed, vertices
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
from bifusion_diag.reports.zoom import Zoom

PLACES = {"tokens": "CLIP tokens", "head": "after the projection head", "points": "sampled at the points"}
STACK = (  # from the bottom: series, label, colour
    ("visible", "visible", CATEGORY[1]),
    ("occluded", "occluded", CATEGORY[4]),
    ("outside", "outside the image", CATEGORY[3]),
    ("behind", "behind the camera", CATEGORY[7]),
    ("bad", "NaN or infinite", NON_FINITE),
)
BINS = 200


def draw_clip_ranges(trace: Trace, name: str) -> Plot | None:
    """Ranges of the 2D features over time and their norm against the 3D ones; None where nothing was recorded."""
    run = trace.run
    places = [place for place in CLIP_PLACES if run.series(f"clip/{place}/max") is not None]
    ratio = run.series("clip/ratio_2d_3d")
    rows = len(places) + (ratio is not None)
    if not places:
        return None
    zoom = Zoom()
    with drawing(1.25 * rows + 0.5) as figure:
        grid = figure.add_gridspec(
            rows, 1, left=LEFT, right=RIGHT, top=1 - 0.3 / (1.25 * rows + 0.5), bottom=0.1, hspace=0.5
        )
        panels = [zoom.panel(figure.add_subplot(grid[row])) for row in range(rows)]
        for axes, place in zip(panels, places, strict=False):
            _draw_ribbon(axes, run, place, zoom)
        if ratio is not None:
            zoom.curve(panels[-1], *vertices(ratio), color=ACCENT, linewidth=0.6, alpha=0.5)
            zoom.curve(panels[-1], ratio.steps, smoothed(ratio.value), color=ACCENT, linewidth=1.4)
            wide = 0 < (ratio.stats.min or 0) * 5 < (ratio.stats.max or 0)
            if wide:
                panels[-1].set_yscale("log")
                log_axis(panels[-1].yaxis)
            title(panels[-1], tr("2D : 3D norm ratio (log axis)" if wide else "2D : 3D norm ratio"))
        for axes in panels:
            time_limits(axes, int(run.steps[0]), int(run.steps[-1]))
            axes.grid(axis="y", color=RULE, linewidth=0.5)
            axes.tick_params(labelbottom=axes is panels[-1])
        panels[-1].set_xlabel(tr("step"))
        largest = {place: trace.measures.number(f"clip/{place}/absmax") for place in places}
        told = listed(
            (
                tr("largest |x| {value}, {place}", value=text(value), place=tr(PLACES[place]))
                for place, value in largest.items()
            ),
            "; ",
        )
        alt = tr("CLIP feature ranges of {name}: {told}.", name=trace.label, told=told)
        return Plot(
            name,
            tr("Range of the 2D features, {name}", name=trace.label),
            tr("Light: minimum to maximum of each step. Dark: ± the 99.9th percentile of |x|."),
            alt,
            render(figure, name, alt),
            time_axis(panels[-1]),
            zoom=zoom.data(),
        )


def _draw_ribbon(axes: Axes, run: Run, place: str, zoom: Zoom) -> None:
    low, high = run.all_series[f"clip/{place}/min"], run.all_series[f"clip/{place}/max"]
    _fill(axes, low, high, 0.25, zoom)
    middle = run.series(f"clip/{place}/p99.9")
    if middle is not None:
        _fill(axes, middle, middle, 0.5, zoom)
    axes.axhline(0, color=BASELINE, linewidth=0.6)
    words = tr(PLACES[place])
    title(axes, f"{words[:1].upper()}{words[1:]}")


def _fill(axes: Axes, low: Series, high: Series, opacity: float, zoom: Zoom) -> None:
    """A band; of one and the same series, symmetric about zero."""
    edges = bins(len(low.steps), MAX_VERTICES // 2)
    tops = np.fmax.reduceat(high.max, edges)
    bottoms = -tops if low is high else np.fmin.reduceat(low.min, edges)
    zoom.stretch(axes.fill_between(low.steps[edges], bottoms, tops, color=ACCENT, alpha=opacity, linewidth=0))


def draw_projection(trace: Trace, name: str) -> Plot | None:
    """What became of the projected points, stacked; None where nothing was recorded."""
    run = trace.run
    valid = run.series("projection/valid")
    if valid is None or not len(valid.steps):
        return None
    edges = bins(len(valid.steps), BINS)
    counts = {
        key: _binned(run, key, edges, len(valid.steps)) for key in ("occluded", "outside", "behind", "nan", "inf")
    }
    counts["bad"] = counts["nan"] + counts["inf"]
    unseen = counts["occluded"] + counts["outside"] + counts["behind"] + counts["bad"]
    pairs = _binned(run, "points", edges, len(valid.steps)) * views_of(run)
    counts["visible"] = np.maximum(pairs - unseen, 0)
    table = np.stack([counts[key] for key, _, _ in STACK])
    total = table.sum(axis=0)
    share = np.divide(table, total, out=np.zeros_like(table), where=total > 0)
    zoom = Zoom()
    with drawing(2.5) as figure:
        axes = zoom.panel(figure.add_axes((LEFT, 0.18, RIGHT - LEFT, 0.72)))
        colours = [colour for _, _, colour in STACK]
        left = np.append(valid.steps[edges], int(run.steps[-1]) + 1)
        bottom = np.zeros(len(edges))
        for row, colour in zip(share, colours, strict=True):
            zoom.stretch(
                axes.stairs(bottom + row, left, baseline=bottom, fill=True, color=colour, alpha=0.8, linewidth=0)
            )
            bottom = bottom + row
        time_limits(axes, int(run.steps[0]), int(run.steps[-1]) + 1)
        axes.set_ylim(0, 1)
        axes.set_ylabel(tr("share"))
        axes.set_xlabel(tr("step"))
        middles = np.cumsum(share[:, -1]) - share[:, -1] / 2
        shown = [place for place in range(len(STACK)) if table[place].sum() > 0]
        end_labels(axes, [(tr(STACK[place][1]), float(middles[place]), colours[place]) for place in shown])
        mean = trace.measures.number("projection/valid_share")
        bad = (trace.measures.number("projection/nan") or 0) + (trace.measures.number("projection/inf") or 0)
        alt = tr(
            "Projection of {name}: mean valid share {share}, {bad} non-finite values.",
            name=trace.label,
            share=text(mean),
            bad=text(bad, whole=True),
        )
        return Plot(
            name,
            tr("What became of the points in each view, {name}", name=trace.label),
            tr(
                "Mean over {bins} time bins at most. {bad} projections are NaN or infinite.",
                bins=BINS,
                bad=text(bad, whole=True),
            ),
            alt,
            render(figure, name, alt),
            time_axis(axes),
            zoom=zoom.data(),
        )


def views_of(run: Run) -> int:
    """Images a scene, from the settings; 1 where they don't tell."""
    data = run.settings.get("data")
    views = data.get("views") if isinstance(data, Mapping) else None
    return views if isinstance(views, int) else 1


def _binned(run: Run, key: str, edges: NDArray[np.int64], length: int) -> NDArray[np.float64]:
    """Mean of a count in every bin; zero where it was not recorded."""
    series = run.series(f"projection/{key}")
    if series is None or len(series.steps) != length:
        return np.zeros(len(edges))
    values = np.nan_to_num(series.value, nan=0.0, posinf=0.0, neginf=0.0)
    return np.add.reduceat(values, edges) / np.diff(np.append(edges, length))


def draw_alpha(trace: Trace, name: str) -> Plot | None:
    """The histogram of α over time, as ink; None where nothing was recorded."""
    histogram = trace.run.histogram("gate/alpha")
    if histogram is None or not len(histogram.steps):
        return None
    total = histogram.counts.sum(axis=1, keepdims=True)
    density = np.divide(histogram.counts, total, out=np.zeros_like(histogram.counts), where=total > 0)
    strength = (density / max(float(density.max()), 1e-12)) ** 0.7  # the power keeps thin tails visible
    picture = np.zeros((*density.T.shape, 4))
    picture[..., 3] = strength.T
    first, last = int(trace.run.steps[0]), int(trace.run.steps[-1])
    zoom = Zoom()
    with drawing(2.7) as figure:
        axes = zoom.panel(figure.add_axes((LEFT, 0.17, RIGHT - LEFT, 0.73)))
        extent = (first, last + 1, 0, 1)
        zoom.stretch(axes.imshow(picture, extent=extent, origin="lower", aspect="auto", interpolation="none"))
        axes.axhline(ALPHA_BAND[0], color=ACCENT, linewidth=1, linestyle=(0, (4, 3)))
        axes.axhline(ALPHA_BAND[1], color=ACCENT, linewidth=1, linestyle=(0, (4, 3)))
        labels = [(tr("band [{low}, {high}]", low=ALPHA_BAND[0], high=ALPHA_BAND[1]), ALPHA_BAND[1], ACCENT)]
        mean = trace.run.series("gate/mean")
        if mean is not None:
            x, y = vertices(mean)
            zoom.curve(axes, x, y, color=ACCENT, linewidth=1.5)
            finite = y[np.isfinite(y)]
            labels.append((tr("mean α"), float(finite[-1]) if finite.size else float("nan"), ACCENT))
        time_limits(axes, first, last + 1)
        axes.set_ylim(0, 1)
        axes.set_ylabel("α")
        axes.set_xlabel(tr("step"))
        end_labels(axes, labels)
        number = trace.measures.number("gate/mean")
        alt = tr("Histogram of α over time, {name}: mean {mean}.", name=trace.label, mean=text(number))
        return Plot(
            name,
            tr("α over time, {name}", name=trace.label),
            tr(
                "α is the weight of the 2D feature. Stronger ink: more points. Line: mean of each step. "
                "Dashed: the band of the documents for the mean."
            ),
            alt,
            render(figure, name, alt),
            time_axis(axes),
            ink=True,
            zoom=zoom.data(),
        )


def draw_terms(trace: Trace, name: str, *, colours: Mapping[str, str] | None = None) -> Plot | None:
    """Weighted loss terms over time; None where the losses were not recorded by term.

    Args:
        trace: the run.
        name: of the plot.
        colours: by term, where it is not the run's own order that gives them.
    """
    terms = loss_terms(trace.run, "weighted")
    if not terms:
        return None
    colours = colours or {term: CATEGORY[place % len(CATEGORY)] for place, term in enumerate(terms)}
    stats = {term: trace.run.all_series[key].stats for term, key in terms.items()}
    zero = [term for term, one in stats.items() if one.min == one.max == 0 and not one.nonfinite]
    drawn = [term for term in terms if term not in zero] or list(terms)
    zoom = Zoom()
    with drawing(2.9) as figure:
        axes = zoom.panel(figure.add_axes((LEFT, 0.16, RIGHT - LEFT, 0.75)))
        labels = []
        for term in drawn:
            series, colour = trace.run.all_series[terms[term]], colours[term]
            smooth = smoothed(series.value)
            zoom.curve(axes, *vertices(series), color=colour, linewidth=0.5, alpha=0.35)
            zoom.curve(axes, series.steps, smooth, color=colour, linewidth=1.4)
            finite = smooth[np.isfinite(smooth)]
            labels.append((term, float(finite[-1]) if finite.size else float("nan"), colour))
        if all((stats[term].min or 0) > 0 for term in drawn):
            axes.set_yscale("log")
            log_axis(axes.yaxis)
        time_limits(axes, int(trace.run.steps[0]), int(trace.run.steps[-1]))
        axes.grid(axis="y", color=RULE, linewidth=0.5)
        axes.set_xlabel(tr("step"))
        axes.set_ylabel(tr("weighted loss"))
        end_labels(axes, labels, gap=0.075)
        shares = {term: trace.measures.number(f"loss_share/{term}") for term in terms}
        told = ", ".join(f"{term} {text(share)}" for term, share in shares.items() if share is not None)
        caption = tr(
            "Weighted terms; bold: running median of 21 steps, where there are 42. Mean shares of the loss: {shares}.",
            shares=told,
        )
        if zero and zero != drawn:
            caption = listed((caption, tr("Not drawn, as zero at every step: {terms}.", terms=", ".join(zero))))
        alt = tr("Weighted loss terms of {name}; mean shares: {shares}.", name=trace.label, shares=told)
        return Plot(
            name,
            tr("Loss terms, {name}", name=trace.label),
            caption,
            alt,
            render(figure, name, alt),
            time_axis(axes),
            zoom=zoom.data(),
        )
