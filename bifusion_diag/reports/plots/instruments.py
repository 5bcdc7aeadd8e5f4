"""Plots of what updates, terms and time do: update ratios, shares of the gradient, phases of a step. One run each."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from bifusion_diag.diagnosis.instruments import GRADIENT_COSINE, GRADIENT_SHARE, UPDATE_RATIO, matching
from bifusion_diag.record.schema import Series
from bifusion_diag.reports.language import listed, tr
from bifusion_diag.reports.numbers import text
from bifusion_diag.reports.palette import ACCENT, BASELINE, CATEGORY, QUIET, RULE
from bifusion_diag.reports.plots.timeline import Trace
from bifusion_diag.reports.reduce import WINDOW, bins, smoothed
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

BINS = 200
PAIRS = 4  # of terms that are drawn; the measures have them all
PHASES = (  # from the bottom: series, label, colour
    ("data", "between steps", CATEGORY[3]),
    ("forward", "forward", CATEGORY[4]),
    ("backward", "backward", CATEGORY[1]),
    ("update", "update", CATEGORY[2]),
    ("rest", "rest of the step", CATEGORY[7]),
)


def draw_updates(trace: Trace, name: str) -> Plot | None:
    """How far the weights of all modules move, ‖Δw‖ ÷ ‖w‖; None where nothing was recorded."""
    run = trace.run
    ratios = {module: series for module, series in matching(run, UPDATE_RATIO) if series.stats.p50 is not None}
    if not ratios:
        return None
    longest = max((series for series in ratios.values()), key=lambda series: len(series.steps))
    alike = [series for series in ratios.values() if np.array_equal(series.steps, longest.steps)]
    edges = bins(len(longest.steps), BINS)
    x = np.append(longest.steps[edges], longest.last[-1])
    table = np.stack([_positive(series.value) for series in alike])
    top = _over(np.fmax, np.stack([_positive(series.max) for series in alike]), edges)
    bottom = _over(np.fmin, np.stack([_positive(series.min) for series in alike]), edges)
    known = np.isfinite(table).any(axis=0)
    quarters = np.full((3, table.shape[1]), np.nan)
    quarters[:, known] = np.nanpercentile(table[:, known], [25, 50, 75], axis=0)
    largest = max(ratios, key=lambda module: ratios[module].stats.max or 0.0)
    number = ratios[largest].stats.max
    zoom = Zoom()
    with drawing(2.7) as figure:
        axes = zoom.panel(figure.add_axes((LEFT, 0.17, RIGHT - LEFT, 0.73)))
        zoom.stretch(axes.fill_between(x, bottom, top, color=ACCENT, alpha=0.2, linewidth=0))
        low, middle, high = (_over(np.fmax, row[None], edges) for row in quarters)
        zoom.stretch(axes.fill_between(x, low, high, color=ACCENT, alpha=0.4, linewidth=0))
        zoom.curve(axes, x, middle, color=ACCENT, linewidth=1.5)
        axes.set_yscale("log")
        log_axis(axes.yaxis)
        time_limits(axes, int(run.steps[0]), int(run.steps[-1]))
        axes.grid(axis="y", color=RULE, linewidth=0.5)
        axes.set_xlabel(tr("step"))
        labels = [
            (tr("largest"), _last(top), QUIET),
            (tr("median"), _last(middle), ACCENT),
            (tr("smallest"), _last(bottom), QUIET),
        ]
        end_labels(axes, labels)
        alt = tr(
            "Update ratio of {count} modules of {name}: median {median}, largest {largest} in {module}.",
            count=len(ratios),
            name=trace.label,
            median=text(trace.measures.number("update_ratio/p50")),
            largest=text(number),
            module=largest,
        )
        return Plot(
            name,
            tr("How far weights move in a step, ‖Δw‖ ÷ ‖w‖, {name}", name=trace.label),
            tr(
                "Of {count} modules: line the median, dark the middle half, light all (log axis). "
                "Largest: {largest} in {module}.",
                count=len(ratios),
                largest=text(number),
                module=largest,
            ),
            alt,
            render(figure, name, alt),
            time_axis(axes),
            zoom=zoom.data(),
        )


def draw_gradients(trace: Trace, name: str, *, colours: Mapping[str, str] | None = None) -> Plot | None:
    """Each term's share of the gradient and the cosines between terms; None where nothing was recorded.

    Args:
        trace: the run.
        name: of the plot.
        colours: by term, as in the plot of the losses.
    """
    run = trace.run
    shares = {term: series for term, series in matching(run, GRADIENT_SHARE) if series.stats.p50 is not None}
    cosines = {pair: series for pair, series in matching(run, GRADIENT_COSINE) if series.stats.p50 is not None}
    if not shares:
        return None
    colours = {term: CATEGORY[place % len(CATEGORY)] for place, term in enumerate(shares)} | dict(colours or {})
    drawn = {term: series for term, series in shares.items() if series.stats.max}  # not what is zero at every step
    worst = sorted(cosines, key=lambda pair: cosines[pair].stats.p50 or 0.0)[:PAIRS]
    zoom = Zoom()
    with drawing(4.4 if worst else 2.7) as figure:
        grid = figure.add_gridspec(
            1 + bool(worst), 1, left=LEFT, right=RIGHT, top=0.94, bottom=0.11 if worst else 0.17, hspace=0.3
        )
        panels = [zoom.panel(figure.add_subplot(grid[row])) for row in range(1 + bool(worst))]
        for axes, limits in zip(panels, ((0, 1), (-1.05, 1.05)), strict=False):
            time_limits(axes, int(run.steps[0]), int(run.steps[-1]))
            axes.set_ylim(*limits)
            axes.grid(axis="y", color=RULE, linewidth=0.5)
            axes.tick_params(labelbottom=axes is panels[-1])
        _draw_curves(zoom, panels[0], {term: (series, colours[term]) for term, series in drawn.items()})
        title(panels[0], tr("Share of the gradient"))
        if worst:
            pairs = {"\n/ ".join(pair.split("/")): cosines[pair] for pair in worst}
            places = {pair: CATEGORY[(place + 4) % len(CATEGORY)] for place, pair in enumerate(pairs)}
            panels[1].axhline(0, color=BASELINE, linewidth=0.8)
            _draw_curves(zoom, panels[1], {pair: (series, places[pair]) for pair, series in pairs.items()}, gap=0.22)
            some = len(cosines) > PAIRS
            title(
                panels[1],
                tr("Cosine between terms, the {count} smallest" if some else "Cosine between terms", count=PAIRS),
            )
        panels[-1].set_xlabel(tr("step"))
        told = ", ".join(f"{term} {text(series.stats.p50)}" for term, series in shares.items())
        against = [pair for pair in cosines if (cosines[pair].stats.p50 or 0.0) < 0]
        fight = ""
        if against:
            one, _, other = worst[0].partition("/")
            fight = tr(
                "The median cosine is below 0 for {n} of {pairs} pairs of terms, smallest for {one} and {other} "
                "({cosine}): they pull in opposite directions.",
                n=len(against),
                pairs=len(cosines),
                one=one,
                other=other,
                cosine=text(cosines[worst[0]].stats.p50),
            )
        alt = tr("Share of each loss term in the gradient of {name}, medians: {told}.", name=trace.label, told=told)
        alt = listed((alt, fight))
        caption = tr(
            "Norm of the weighted term's gradient on shared modules ÷ the sum of all. Medians: {told}.", told=told
        )
        return Plot(
            name,
            tr("Which term moves the shared weights, {name}", name=trace.label),
            listed((caption, fight)),
            alt,
            render(figure, name, alt),
            time_axis(panels[-1]),
            zoom=zoom.data(),
        )


def _draw_curves(zoom: Zoom, axes: Axes, curves: Mapping[str, tuple[Series, str]], gap: float = 0.12) -> None:
    """Thin each measured step, bold the running median of many; steps that were not measured leave no gap."""
    labels = []
    for words, (series, colour) in curves.items():
        known = np.isfinite(series.value)
        x, y = series.steps[known], series.value[known]
        if not series.exact:  # ends with its last bucket
            x, y = np.append(x, series.last[known][-1:]), np.append(y, y[-1:])
        smooth = smoothed(y)
        zoom.curve(axes, x, y, color=colour, linewidth=0.5, alpha=0.4)
        few = x.size < 2 * WINDOW
        if few:  # marks may be all there is
            zoom.curve(axes, x, smooth, color=colour, linewidth=1.5, marker=".", clip_on=False)
        else:
            zoom.curve(axes, x, smooth, color=colour, linewidth=1.5)
        labels.append((words, _last(smooth), colour))
    end_labels(axes, labels, gap=gap)


def draw_throughput(trace: Trace, name: str) -> Plot | None:
    """Where the time of a step goes, stacked; None where nothing was recorded."""
    run = trace.run
    step = run.series("throughput/step_seconds")
    if step is None or step.stats.p50 is None:
        return None
    edges = bins(len(step.steps), BINS)
    rows = {"step": _mean_over(step.value, edges)}
    for phase, _, _ in PHASES[:-1]:
        series = run.series(f"throughput/{phase}_seconds")
        alike = series is not None and np.array_equal(series.steps, step.steps)
        rows[phase] = _mean_over(series.value, edges) if series is not None and alike else np.zeros(len(edges))
    rows["rest"] = np.maximum(rows["step"] - rows["forward"] - rows["backward"] - rows["update"], 0)
    zoom = Zoom()
    with drawing(2.6) as figure:
        axes = zoom.panel(figure.add_axes((LEFT, 0.18, RIGHT - LEFT, 0.72)))
        left = np.append(step.steps[edges], int(run.steps[-1]) + 1)
        bottom = np.zeros(len(edges))
        labels = []
        for phase, words, colour in PHASES:
            top = bottom + rows[phase]
            zoom.stretch(axes.stairs(top, left, baseline=bottom, fill=True, color=colour, alpha=0.8, linewidth=0))
            if rows[phase].any():
                labels.append((tr(words), float(bottom[-1] + rows[phase][-1] / 2), colour))
            bottom = bottom + rows[phase]
        time_limits(axes, int(run.steps[0]), int(run.steps[-1]) + 1)
        # One slow step, such as one before which the model was evaluated, must not flatten all others.
        axes.set_ylim(0, min(float(bottom.max()), 3 * float(np.median(bottom))) * 1.05 or 1.0)
        axes.set_ylabel("s")  # a unit
        axes.set_xlabel(tr("step"))
        end_labels(axes, labels)
        medians = {tr(words): trace.measures.number(f"throughput/{phase}_seconds") for phase, words, _ in PHASES}
        told = listed((f"{words} {text(value)} s" for words, value in medians.items() if value is not None), ", ")
        took = _memory(trace)
        alt = tr("Seconds of a step by phase, {name}; medians: {told}.", name=trace.label, told=told)
        alt = listed((alt, took))
        caption = tr("Seconds, mean over {bins} time bins at most. Medians: {told}.", bins=BINS, told=told)
        return Plot(
            name,
            tr("Where the time goes, {name}", name=trace.label),
            listed((caption, took)),
            alt,
            render(figure, name, alt),
            time_axis(axes),
            zoom=zoom.data(),
        )


def _memory(trace: Trace) -> str:
    """The peak of the device's memory, or of the process's, as a sentence; "" where neither was measured."""
    device = trace.measures.number("throughput/device_peak_mib")
    if device is not None:
        return tr("Peak CUDA memory: {mib} MiB.", mib=text(device, whole=True))
    resident = trace.measures.number("throughput/peak_resident_mib")
    return "" if resident is None else tr("Peak memory of the process: {mib} MiB.", mib=text(resident, whole=True))


def _positive(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a log axis can show; NaN elsewhere."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _over(rule: np.ufunc, table: NDArray[np.float64], edges: NDArray[np.int64]) -> NDArray[np.float64]:
    """Over all rows, and over the columns of every bin; the last one twice, as it has an end of its own."""
    found = rule.reduceat(rule.reduce(table, axis=0), edges)
    return np.append(found, found[-1:])


def _mean_over(values: NDArray[np.float64], edges: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean of the finite values in every bin, 0 where there is none."""
    finite = np.isfinite(values)
    count = np.add.reduceat(finite.astype(float), edges)
    return np.add.reduceat(np.where(finite, values, 0.0), edges) / np.maximum(count, 1)


def _last(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if finite.size else float("nan")
