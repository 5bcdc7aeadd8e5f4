"""Plots of what updates, terms and time do: update ratios, shares of the gradient, phases of a step. One run each."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from bifusion_diag.diagnosis.instruments import GRADIENT_COSINE, GRADIENT_SHARE, UPDATE_RATIO, matching
from bifusion_diag.record.schema import Series
from bifusion_diag.reports.numbers import text
from bifusion_diag.reports.palette import ACCENT, BASELINE, CATEGORY, QUIET, RULE
from bifusion_diag.reports.plots.timeline import Trace
from bifusion_diag.reports.reduce import WINDOW, bins, min_max, smoothed
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
    with drawing(2.7) as figure:
        axes = figure.add_axes((LEFT, 0.17, RIGHT - LEFT, 0.73))
        axes.fill_between(x, bottom, top, color=ACCENT, alpha=0.2, linewidth=0)
        low, middle, high = (_over(np.fmax, row[None], edges) for row in quarters)
        axes.fill_between(x, low, high, color=ACCENT, alpha=0.4, linewidth=0)
        axes.plot(x, middle, color=ACCENT, linewidth=1.5)
        axes.set_yscale("log")
        log_axis(axes.yaxis)
        time_limits(axes, int(run.steps[0]), int(run.steps[-1]))
        axes.grid(axis="y", color=RULE, linewidth=0.5)
        axes.set_xlabel("step")
        labels = [("largest", _last(top), QUIET), ("median", _last(middle), ACCENT), ("smallest", _last(bottom), QUIET)]
        end_labels(axes, labels)
        alt = (
            f"Update ratio of {len(ratios)} modules of {trace.label}: median "
            f"{text(trace.measures.number('update_ratio/p50'))}, largest {text(number)} in {largest}."
        )
        return Plot(
            name,
            f"How far weights move in a step, ‖Δw‖ ÷ ‖w‖, {trace.label}",
            f"Of {len(ratios)} modules: line the median, dark the middle half, light all (log axis). Largest: "
            f"{text(number)} in {largest}.",
            alt,
            render(figure, name, alt),
            time_axis(axes),
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
    with drawing(4.4 if worst else 2.7) as figure:
        grid = figure.add_gridspec(
            1 + bool(worst), 1, left=LEFT, right=RIGHT, top=0.94, bottom=0.11 if worst else 0.17, hspace=0.3
        )
        panels = [figure.add_subplot(grid[row]) for row in range(1 + bool(worst))]
        for axes, limits in zip(panels, ((0, 1), (-1.05, 1.05)), strict=False):
            time_limits(axes, int(run.steps[0]), int(run.steps[-1]))
            axes.set_ylim(*limits)
            axes.grid(axis="y", color=RULE, linewidth=0.5)
            axes.tick_params(labelbottom=axes is panels[-1])
        _draw_curves(panels[0], {term: (series, colours[term]) for term, series in drawn.items()})
        title(panels[0], "Share of the gradient")
        if worst:
            pairs = {"\n/ ".join(pair.split("/")): cosines[pair] for pair in worst}
            places = {pair: CATEGORY[(place + 4) % len(CATEGORY)] for place, pair in enumerate(pairs)}
            panels[1].axhline(0, color=BASELINE, linewidth=0.8)
            _draw_curves(panels[1], {pair: (series, places[pair]) for pair, series in pairs.items()}, gap=0.22)
            title(panels[1], "Cosine between terms" + (f", the {PAIRS} smallest" if len(cosines) > PAIRS else ""))
        panels[-1].set_xlabel("step")
        told = ", ".join(f"{term} {text(series.stats.p50)}" for term, series in shares.items())
        against = [pair for pair in cosines if (cosines[pair].stats.p50 or 0.0) < 0]
        fight = ""
        if against:
            smallest = f"{' and '.join(worst[0].split('/'))} ({text(cosines[worst[0]].stats.p50)})"
            fight = (
                f" The median cosine is below 0 for {len(against)} of {len(cosines)} pairs of terms, smallest for "
                f"{smallest}: they pull in opposite directions."
            )
        alt = f"Share of each loss term in the gradient of {trace.label}, medians: {told}.{fight}"
        return Plot(
            name,
            f"Which term moves the shared weights, {trace.label}",
            f"Norm of the weighted term's gradient on shared modules ÷ the sum of all. Medians: {told}.{fight}",
            alt,
            render(figure, name, alt),
            time_axis(panels[-1]),
        )


def _draw_curves(axes: Axes, curves: Mapping[str, tuple[Series, str]], gap: float = 0.12) -> None:
    """Thin each measured step, bold the running median of many; steps that were not measured leave no gap."""
    labels = []
    for words, (series, colour) in curves.items():
        known = np.isfinite(series.value)
        x, y = series.steps[known], series.value[known]
        if not series.exact:  # ends with its last bucket
            x, y = np.append(x, series.last[known][-1:]), np.append(y, y[-1:])
        smooth = smoothed(y)
        axes.plot(*min_max(x, y), color=colour, linewidth=0.5, alpha=0.4)
        few = x.size < 2 * WINDOW  # marks that may be all there is, whole also at the axis
        axes.plot(*min_max(x, smooth), color=colour, linewidth=1.5, marker="." if few else None, clip_on=not few)
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
    with drawing(2.6) as figure:
        axes = figure.add_axes((LEFT, 0.18, RIGHT - LEFT, 0.72))
        left = np.append(step.steps[edges], int(run.steps[-1]) + 1)
        bottom = np.zeros(len(edges))
        labels = []
        for phase, words, colour in PHASES:
            axes.stairs(bottom + rows[phase], left, baseline=bottom, fill=True, color=colour, alpha=0.8, linewidth=0)
            if rows[phase].any():
                labels.append((words, float(bottom[-1] + rows[phase][-1] / 2), colour))
            bottom = bottom + rows[phase]
        time_limits(axes, int(run.steps[0]), int(run.steps[-1]) + 1)
        # One slow step, such as one before which the model was evaluated, must not flatten all others.
        axes.set_ylim(0, min(float(bottom.max()), 3 * float(np.median(bottom))) * 1.05 or 1.0)
        axes.set_ylabel("s")
        axes.set_xlabel("step")
        end_labels(axes, labels)
        medians = {words: trace.measures.number(f"throughput/{phase}_seconds") for phase, words, _ in PHASES}
        told = ", ".join(f"{words} {text(value)} s" for words, value in medians.items() if value is not None)
        memory = trace.measures.number("throughput/device_peak_mib")
        kind = "CUDA memory" if memory is not None else "memory of the process"
        memory = trace.measures.number("throughput/peak_resident_mib") if memory is None else memory
        took = f" Peak {kind}: {text(memory, whole=True)} MiB." if memory is not None else ""
        alt = f"Seconds of a step by phase, {trace.label}; medians: {told}.{took}"
        return Plot(
            name,
            f"Where the time goes, {trace.label}",
            f"Seconds, mean over {BINS} time bins at most. Medians: {told}.{took}",
            alt,
            render(figure, name, alt),
            time_axis(axes),
        )


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
