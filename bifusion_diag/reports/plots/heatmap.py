"""Gradient norm by module and step: one panel a run, one colour scale for all, four looks for what is not a number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from numpy.typing import NDArray

from bifusion_diag.diagnosis.modules import STATES
from bifusion_diag.diagnosis.origins import gradient_modules
from bifusion_diag.record.schema import Run, Series
from bifusion_diag.reports.numbers import text
from bifusion_diag.reports.palette import INK, NON_FINITE, PAPER, QUIET, RULE
from bifusion_diag.reports.plots.timeline import Trace, span
from bifusion_diag.reports.svg import RIGHT, Plot, drawing, log_axis, render, time_axis, time_limits, title

COLUMNS = 240  # time bins: about 3 px each on a wide screen
MAX_ROWS = 44  # more modules than this are shown by their common parents
ROW = 0.155  # inches
FROZEN, NO_GRADIENT, ZERO, FINITE, NONFINITE = range(len(STATES))


@dataclass(frozen=True)
class Grid:
    """What one panel shows.

    Attributes:
        names: (R,) module or group of modules, in execution order.
        parts: (R,) part of the model.
        norm: (R, C) largest gradient norm in the time bin, NaN where there is none.
        state: (R, C) code of the worst state in the bin, −1 where there is no record.
    """

    names: list[str]
    parts: list[str]
    norm: NDArray[np.float64]
    state: NDArray[np.int64]


def draw_heatmap(traces: Sequence[Trace]) -> Plot | None:
    """Draw the heat map; None where no run has gradients by module."""
    first, last = span(traces)
    row_of = shared_rows([trace.run for trace in traces])
    grids = [(trace, make_grid(trace.run, first, last, row_of)) for trace in traces]
    grids = [(trace, grid) for trace, grid in grids if grid.names]
    if not grids:
        return None
    everything = np.concatenate([grid.norm[grid.norm > 0] for _, grid in grids])
    scale = _scale(everything)
    margin, between = 0.85, 0.5
    height = sum(len(grid.names) * ROW for _, grid in grids) + margin + between * len(grids)
    with drawing(height) as figure:
        top = height - 0.62
        panels = []
        for trace, grid in grids:
            tall = len(grid.names) * ROW
            left = 0.2
            axes = figure.add_axes((left, (top - tall) / height, RIGHT + 0.07 - left, tall / height))
            _draw_panel(axes, grid, scale, first, last)
            title(axes, f"{trace.label}")
            panels.append(axes)
            top -= tall + between
        panels[-1].set_xlabel("step")
        _draw_keys(figure, scale, height)
        alt = _alt(grids)
        return Plot(
            "heatmap",
            "Gradient norm by module and step",
            f"Parameter-gradient norm of each module in execution order; largest of each of at most {COLUMNS} time "
            "bins; one colour scale. " + (_grouped_note(traces, grids)),
            alt,
            render(figure, "heatmap", alt),
            time_axis(panels[0]),
        )


def make_grid(run: Run, first: int, last: int, row_of: Mapping[str, str]) -> Grid:
    """Bin the gradients by module of a run; `row_of` names every module's row."""
    modules = gradient_modules(run)
    rows = {module: row_of[module] for module in modules}
    names = list(dict.fromkeys(rows.values()))
    parts = {module.name: module.part for module in run.modules}
    columns = min(COLUMNS, last - first + 1)
    squares = np.zeros((len(names), columns))
    seen = np.zeros((len(names), columns), dtype=bool)
    state = np.full((len(names), columns), -1)
    for module, name in rows.items():
        row = names.index(name)
        _add_states(state[row], run.all_series[f"grads/{module}/state"], first, last)
        norm = run.series(f"grads/{module}/param_norm")
        if norm is not None:
            largest = _largest(norm, first, last, columns)
            seen[row] |= np.isfinite(largest)
            squares[row] += np.nan_to_num(largest) ** 2
    norm_table = np.where(seen, np.sqrt(squares), np.nan)
    first_of = {name: module for module, name in reversed(rows.items())}
    return Grid(names, [parts.get(first_of[name], name.split(".")[0]) for name in names], norm_table, state)


def shared_rows(runs: Sequence[Run]) -> dict[str, str]:
    """The row of every module of all runs, so that their panels have the same ones."""
    modules: dict[str, None] = {}
    frozen: set[str] = set()
    for run in runs:
        names = gradient_modules(run)
        modules |= dict.fromkeys(names)
        frozen |= {name for name in names if run.all_series[f"grads/{name}/state"].stats.max == FROZEN}
    return group_rows(list(modules), closed=frozen)


def group_rows(modules: Sequence[str], limit: int = MAX_ROWS, closed: Collection[str] = ()) -> dict[str, str]:
    """The row of every module: itself where all fit, else a parent that it shares with others.

    Starting from the outermost parents, rows are opened level by level, the one with the most modules first, while at
    most `limit` rows result. Modules in `closed` (frozen ones: they have nothing to show) open no row.
    """
    if len(modules) <= limit:
        return {module: module for module in modules}
    rows = {module: module.split(".")[0] for module in modules}
    stuck: set[str] = set()
    while True:
        sizes = Counter(row for module, row in rows.items() if row != module and module not in closed)
        waiting = [row for row, _ in sizes.most_common() if row not in stuck]
        if not waiting:
            return rows
        row = min(waiting, key=lambda name: name.count("."))
        depth = row.count(".") + 2
        opened = {module: ".".join(module.split(".")[:depth]) for module, at in rows.items() if at == row}
        if len(set((rows | opened).values())) <= limit:
            rows |= opened
        else:
            stuck.add(row)


def _bin(steps: NDArray[np.int64], first: int, last: int, columns: int) -> NDArray[np.int64]:
    return ((steps - first) * columns // (last - first + 1)).clip(0, columns - 1)


def _spread(series: Series, values: NDArray[np.float64], first: int, last: int, columns: int) -> NDArray[np.float64]:
    """The largest value of every time bin (C,); a bucket of a reduced series fills all bins that it covers."""
    table = np.full(columns, -np.inf)
    finite = np.isfinite(values)
    low = _bin(series.steps[finite], first, last, columns)
    high = _bin(series.last[finite], first, last, columns)
    np.maximum.at(table, low, values[finite])
    for start, stop, value in zip(low, high, values[finite], strict=True):
        if stop > start:
            table[start : stop + 1] = np.maximum(table[start : stop + 1], value)
    return table


def _largest(series: Series, first: int, last: int, columns: int) -> NDArray[np.float64]:
    table = _spread(series, series.max, first, last, columns)
    return np.where(np.isneginf(table), np.nan, table)


def _add_states(row: NDArray[np.int64], series: Series, first: int, last: int) -> None:
    table = _spread(series, series.max, first, last, row.size)
    np.maximum(row, np.where(np.isneginf(table), -1, table).astype(int), out=row)


def _scale(values: NDArray[np.float64]) -> LogNorm:
    if not values.size:
        return LogNorm(0.1, 10)
    low, high = np.percentile(values, [1, 100])
    return LogNorm(max(low, high * 1e-9), max(high, low * 1.01))


def _draw_panel(axes: Axes, grid: Grid, scale: LogNorm, first: int, last: int) -> None:
    rows, columns = grid.norm.shape
    colours = colormaps["cividis"](scale(np.where(np.isfinite(grid.norm), grid.norm, 1.0)))
    shown = (grid.state == FINITE) & np.isfinite(grid.norm) & (grid.norm > 0)
    colours[..., 3] = shown
    extent = (first, last + 1, rows, 0)
    cells = axes.imshow(colours, extent=extent, aspect="auto", interpolation="none", origin="upper")
    cells.set_gid(f"cells{len(axes.figure.axes)}")  # two runs with the same picture still have ids of their own
    width = (last + 1 - first) / columns
    looks = {NONFINITE: ("/////", NON_FINITE), NO_GRADIENT: ("....", QUIET), ZERO: ("xxxx", QUIET)}
    for code, (hatch, colour) in looks.items():
        path = _cells(grid.state == code, first, width)
        if path is not None:
            if code == NONFINITE:  # a single column is too narrow for a hatch alone
                axes.add_patch(PathPatch(path, facecolor=colour, alpha=0.4, linewidth=0))
            axes.add_patch(PathPatch(path, facecolor="none", edgecolor=colour, hatch=hatch, linewidth=0))
    edges = [row for row in range(1, rows) if grid.parts[row] != grid.parts[row - 1]]
    axes.hlines(edges, first, last + 1, color=PAPER, linewidth=1.6)
    axes.set_yticks(np.arange(rows) + 0.5, [_short(name) for name in grid.names], fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(rows, 0)
    time_limits(axes, first, last + 1)
    for spine in axes.spines.values():
        spine.set_visible(True)


def _cells(mask: NDArray[np.bool_], first: int, width: float) -> Path | None:
    """All marked cells (R, C) as one path, neighbours in a row merged."""
    vertices: list[tuple[float, float]] = []
    for row in range(mask.shape[0]):
        change = np.flatnonzero(np.diff(np.concatenate([[0], mask[row].astype(np.int8), [0]])))
        for start, stop in zip(change[::2], change[1::2], strict=True):
            left, right = first + start * width, first + stop * width
            vertices += [(left, row), (right, row), (right, row + 1), (left, row + 1), (left, row)]
    if not vertices:
        return None
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * (len(vertices) // 5)
    return Path(vertices, codes)


def _short(name: str) -> str:
    return name if len(name) <= 27 else "…" + name[-26:]


def _draw_keys(figure: Figure, scale: LogNorm, height: float) -> None:
    bar = figure.add_axes((0.2, 1 - 0.2 / height, 0.24, 0.09 / height))
    figure.colorbar(ScalarMappable(scale, "cividis"), cax=bar, orientation="horizontal")
    log_axis(bar.xaxis)
    bar.minorticks_off()
    bar.tick_params(labelsize=7.5, length=2, pad=1.5)
    figure.text(0.193, 1 - 0.155 / height, "gradient norm", ha="right", va="center", color=QUIET, fontsize=8)
    marks = [
        Patch(facecolor="none", edgecolor=NON_FINITE, hatch="/////", linewidth=0, label="non-finite"),
        Patch(facecolor="none", edgecolor=QUIET, hatch="xxxx", linewidth=0, label="zero"),
        Patch(facecolor="none", edgecolor=QUIET, hatch="....", linewidth=0, label="no gradient"),
        Patch(facecolor="none", edgecolor=RULE, linewidth=0.8, label="frozen (blank)"),
    ]
    figure.legend(
        handles=marks, loc="upper right", bbox_to_anchor=(RIGHT + 0.07, 1 - 0.02 / height), ncols=4, frameon=False,
        fontsize=8, labelcolor=INK, handlelength=1.8, columnspacing=1.3, borderaxespad=0,
    )  # fmt: skip


def _grouped_note(traces: Sequence[Trace], grids: Sequence[tuple[Trace, Grid]]) -> str:
    count = max(len(gradient_modules(trace.run)) for trace in traces)
    shown = max(len(grid.names) for _, grid in grids)
    return (
        f"{count} modules are grouped to {shown} rows by their names (root of the sum of squares)."
        if count > shown
        else ""
    )


def _alt(grids: Sequence[tuple[Trace, Grid]]) -> str:
    parts = []
    for trace, grid in grids:
        bad = int((grid.state == NONFINITE).any(axis=1).sum())
        largest = float(np.nanmax(grid.norm)) if np.isfinite(grid.norm).any() else None
        parts.append(
            f"{trace.label}: largest norm {text(largest)}, non-finite gradients in {bad} of {len(grid.names)} rows"
        )
    return "Gradient norm by module and step. " + "; ".join(parts) + "."
