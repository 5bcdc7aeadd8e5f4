"""A quantity by module and step: one panel a run, one colour scale for all, four looks for what is not a number.

Every row is a picture of its own, so that the page can sort and search rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
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
from bifusion_diag.reports.language import listed, tr
from bifusion_diag.reports.numbers import text
from bifusion_diag.reports.palette import INK, NON_FINITE, PAPER, QUIET, RULE
from bifusion_diag.reports.plots.timeline import Trace, span
from bifusion_diag.reports.svg import RIGHT, Plot, drawing, log_axis, render, time_axis, time_limits, title
from bifusion_diag.reports.zoom import Zoom

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
        members: (R,) the modules of each row.
    """

    names: list[str]
    parts: list[str]
    norm: NDArray[np.float64]
    state: NDArray[np.int64]
    members: list[list[str]]


@dataclass(frozen=True)
class Quantity:
    """What a heat map shows.

    Attributes:
        name: of the plot.
        title: of the plot.
        key: beside the colour bar.
        caption: what a cell is.
        modules: the modules of a run that have it, in execution order.
        largest: of a run and a module the series of the largest value of each bucket, None where there is none.
        states: whether the states of gradients hold for it; else a cell is non-finite where `largest` says so.
    """

    name: str
    title: str
    key: str
    caption: str
    modules: Callable[[Run], list[str]]
    largest: Callable[[Run, str], Series | None]
    states: bool = False


def _with_series(pattern: str) -> Callable[[Run], list[str]]:
    """The modules that have a series, by execution order: ``"updates/{}/ratio"``."""
    before, after = pattern.split("{}")

    def modules(run: Run) -> list[str]:
        names = [name[len(before) : -len(after)] for name in run.names(before) if name.endswith(after)]
        order = {module.name: module.order for module in run.modules}
        return sorted(names, key=lambda name: order.get(name, len(order)))

    return modules


def _activation(run: Run, module: str) -> Series | None:
    """The largest magnitude of a module's output, of its two extremes the one that gets further."""
    ends = [series for key in ("min", "max") if (series := run.series(f"activations/{module}/{key}")) is not None]
    if len(ends) < 2 or len(ends[0].steps) != len(ends[1].steps):
        return None
    low, high = ends
    bad = run.series(f"activations/{module}/nonfinite")
    wrong = (
        high.nonfinite if bad is None or len(bad.steps) != len(high.steps) else (np.nan_to_num(bad.max) > 0).astype(int)
    )
    with np.errstate(invalid="ignore"):
        return replace(high, max=np.fmax(np.abs(low.min), np.abs(high.max)), nonfinite=wrong)


GRADIENTS = Quantity(
    "heatmap",
    "Gradient norm by module and step",
    "gradient norm",
    "Parameter-gradient norm of each module in execution order",
    gradient_modules,
    lambda run, module: run.series(f"grads/{module}/param_norm"),
    states=True,
)
UPDATES = Quantity(
    "heatmapupdates",
    "Update ratio by module and step",
    "‖Δw‖ ÷ ‖w‖",
    "How far the weights of each module move, ‖Δw‖ ÷ ‖w‖, in execution order",
    _with_series("updates/{}/ratio"),
    lambda run, module: run.series(f"updates/{module}/ratio"),
)
ACTIVATIONS = Quantity(
    "heatmapactivations",
    "Largest activation by module and step",
    "largest |x|",
    "Largest magnitude in the output of each module, in execution order",
    _with_series("activations/{}/max"),
    _activation,
)
QUANTITIES = (GRADIENTS, UPDATES, ACTIVATIONS)


def draw_heatmap(traces: Sequence[Trace], quantity: Quantity = GRADIENTS) -> Plot | None:
    """Draw the heat map of a quantity; None where no run has it."""
    first, last = span(traces)
    row_of = shared_rows([trace.run for trace in traces], quantity)
    grids = [(trace, make_grid(trace.run, first, last, row_of, quantity)) for trace in traces]
    grids = [(trace, grid) for trace, grid in grids if grid.names]
    if not grids:
        return None
    everything = np.concatenate([grid.norm[grid.norm > 0] for _, grid in grids])
    scale = _scale(everything)
    margin, between = 0.85, 0.5
    height = sum(len(grid.names) * ROW for _, grid in grids) + margin + between * len(grids)
    zoom = Zoom()
    with drawing(height) as figure:
        top = height - 0.62
        panels = []
        rows: list[dict[str, Any]] = []
        for place, (trace, grid) in enumerate(grids):
            tall = len(grid.names) * ROW
            left = 0.2
            axes = zoom.panel(figure.add_axes((left, (top - tall) / height, RIGHT + 0.07 - left, tall / height)))
            rows += _draw_panel(axes, grid, scale, (first, last), zoom, place)
            title(axes, f"{trace.label}")
            panels.append(axes)
            top -= tall + between
        panels[-1].set_xlabel(tr("step"))
        _draw_keys(figure, scale, height, quantity)
        alt = _alt(grids, quantity)
        return Plot(
            quantity.name,
            tr(quantity.title),
            _caption(traces, grids, quantity),
            alt,
            render(figure, quantity.name, alt),
            time_axis(panels[0]),
            zoom=zoom.data(),
            rows=rows,
        )


def make_grid(run: Run, first: int, last: int, row_of: Mapping[str, str], quantity: Quantity = GRADIENTS) -> Grid:
    """Bin a quantity by module of a run; `row_of` names every module's row."""
    modules = quantity.modules(run)
    rows = {module: row_of[module] for module in modules}
    names = list(dict.fromkeys(rows.values()))
    place = {name: index for index, name in enumerate(names)}
    parts = {module.name: module.part for module in run.modules}
    columns = min(COLUMNS, last - first + 1)
    squares = np.zeros((len(names), columns))
    seen = np.zeros((len(names), columns), dtype=bool)
    state = np.full((len(names), columns), -1)
    for module, name in rows.items():
        row = place[name]
        series = quantity.largest(run, module)
        if quantity.states:
            _add_states(state[row], run.all_series[f"grads/{module}/state"], first, last)
        elif series is not None:
            _add_finiteness(state[row], series, first, last)
        if series is not None:
            largest = _largest(series, first, last, columns)
            seen[row] |= np.isfinite(largest)
            if quantity.states:  # norms of a group: the root of the sum of squares
                squares[row] += np.nan_to_num(largest) ** 2
            else:
                squares[row] = np.fmax(squares[row], np.nan_to_num(largest) ** 2)
    norm_table = np.where(seen, np.sqrt(squares), np.nan)
    first_of = {name: module for module, name in reversed(rows.items())}
    members: dict[str, list[str]] = {name: [] for name in names}
    for module, name in rows.items():
        members[name].append(module)
    return Grid(
        names,
        [parts.get(first_of[name], name.split(".")[0]) for name in names],
        norm_table,
        state,
        [members[name] for name in names],
    )


def shared_rows(runs: Sequence[Run], quantity: Quantity = GRADIENTS) -> dict[str, str]:
    """The row of every module of all runs, so that their panels have the same ones."""
    modules: dict[str, None] = {}
    frozen: set[str] = set()
    for run in runs:
        names = quantity.modules(run)
        modules |= dict.fromkeys(names)
        if quantity.states:
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


def _add_finiteness(row: NDArray[np.int64], series: Series, first: int, last: int) -> None:
    """Where a value is recorded it is finite, zero, or not a number at all."""
    code = np.where(series.nonfinite > 0, NONFINITE, np.where(series.max == 0, ZERO, FINITE)).astype(float)
    code[(series.nonfinite == 0) & ~np.isfinite(series.max)] = np.nan
    table = _spread(series, code, first, last, row.size)
    np.maximum(row, np.where(np.isneginf(table), -1, table).astype(int), out=row)


def _scale(values: NDArray[np.float64]) -> LogNorm:
    if not values.size:
        return LogNorm(0.1, 10)
    low, high = np.percentile(values, [1, 100])
    return LogNorm(max(low, high * 1e-9), max(high, low * 1.01))


def _draw_panel(
    axes: Axes, grid: Grid, scale: LogNorm, limits: tuple[int, int], zoom: Zoom, panel: int
) -> list[dict[str, Any]]:
    """Draw the rows; returned is what sorts and searches them."""
    first, last = limits
    rows, columns = grid.norm.shape
    colours = colormaps["cividis"](scale(np.where(np.isfinite(grid.norm), grid.norm, 1.0)))
    shown = (grid.state == FINITE) & np.isfinite(grid.norm) & (grid.norm > 0)
    colours[..., 3] = shown
    width = (last + 1 - first) / columns
    looks = {NONFINITE: ("/////", NON_FINITE), NO_GRADIENT: ("....", QUIET), ZERO: ("xxxx", QUIET)}
    found = []
    for row in range(rows):
        drawn: list[Artist] = []
        if shown[row].any():
            extent = (first, last + 1, row + 1, row)
            drawn.append(
                axes.imshow(colours[row : row + 1], extent=extent, aspect="auto", interpolation="none", origin="upper")
            )
        for code, (hatch, colour) in looks.items():
            path = _cells((grid.state[row] == code)[None], first, width, row)
            if path is not None:
                if code == NONFINITE:  # a single column is too narrow for a hatch alone
                    patch = PathPatch(path, facecolor=colour, alpha=0.4, linewidth=0)
                    drawn.append(axes.add_patch(patch))
                drawn.append(
                    axes.add_patch(PathPatch(path, facecolor="none", edgecolor=colour, hatch=hatch, linewidth=0))
                )
        zoom.stretch(*drawn)
        label = axes.text(
            -0.006, row + 0.5, _short(grid.names[row]), fontsize=7.5, color=QUIET, ha="right", va="center",
            transform=axes.get_yaxis_transform(),
        )  # fmt: skip
        label.set_gid(f"name{panel}x{row}")
        found.append(
            {
                "panel": panel,
                "name": grid.names[row],
                "members": grid.members[row] if grid.members[row] != [grid.names[row]] else [],
                "norm": _number(_typical(grid.norm[row])),
                "growth": _number(_growth(grid.norm[row])),
                "bad": int((grid.state[row] == NONFINITE).sum()),
                "ids": [str(artist.get_gid()) for artist in (*drawn, label)],
            }
        )
    edges = [row for row in range(1, rows) if grid.parts[row] != grid.parts[row - 1]]
    lines = axes.hlines(edges, first, last + 1, color=PAPER, linewidth=1.6)
    lines.set_gid(f"parts{panel}")
    axes.set_yticks([])
    axes.set_ylim(rows, 0)
    time_limits(axes, first, last + 1)
    for spine in axes.spines.values():
        spine.set_visible(True)
    return found


def _typical(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else float("nan")


def _growth(values: NDArray[np.float64]) -> float:
    """Median of the last quarter ÷ of the first quarter of what there is."""
    finite = values[np.isfinite(values) & (values > 0)]
    quarter = finite.size // 4
    return float(np.median(finite[-quarter:]) / np.median(finite[:quarter])) if quarter else float("nan")


def _number(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _cells(mask: NDArray[np.bool_], first: int, width: float, top: int = 0) -> Path | None:
    """All marked cells (R, C) as one path, neighbours in a row merged; the first row is `top`."""
    vertices: list[tuple[float, float]] = []
    for row in range(mask.shape[0]):
        change = np.flatnonzero(np.diff(np.concatenate([[0], mask[row].astype(np.int8), [0]])))
        for start, stop in zip(change[::2], change[1::2], strict=True):
            left, right = first + start * width, first + stop * width
            high, low = top + row, top + row + 1
            vertices += [(left, high), (right, high), (right, low), (left, low), (left, high)]
    if not vertices:
        return None
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * (len(vertices) // 5)
    return Path(vertices, codes)


def _short(name: str) -> str:
    return name if len(name) <= 27 else "…" + name[-26:]


def _draw_keys(figure: Figure, scale: LogNorm, height: float, quantity: Quantity) -> None:
    bar = figure.add_axes((0.2, 1 - 0.2 / height, 0.24, 0.09 / height))
    figure.colorbar(ScalarMappable(scale, "cividis"), cax=bar, orientation="horizontal")
    log_axis(bar.xaxis)
    bar.minorticks_off()
    bar.tick_params(labelsize=7.5, length=2, pad=1.5)
    figure.text(0.193, 1 - 0.155 / height, tr(quantity.key), ha="right", va="center", color=QUIET, fontsize=8)
    marks = [
        Patch(facecolor="none", edgecolor=NON_FINITE, hatch="/////", linewidth=0, label=tr("non-finite")),
        Patch(facecolor="none", edgecolor=QUIET, hatch="xxxx", linewidth=0, label=tr("zero")),
    ]
    if quantity.states:
        marks += [
            Patch(facecolor="none", edgecolor=QUIET, hatch="....", linewidth=0, label=tr("no gradient")),
            Patch(facecolor="none", edgecolor=RULE, linewidth=0.8, label=tr("frozen (blank)")),
        ]
    else:
        marks.append(Patch(facecolor="none", edgecolor=RULE, linewidth=0.8, label=tr("not measured (blank)")))
    figure.legend(
        handles=marks, loc="upper right", bbox_to_anchor=(RIGHT + 0.07, 1 - 0.02 / height), ncols=4, frameon=False,
        fontsize=8, labelcolor=INK, handlelength=1.8, columnspacing=1.3, borderaxespad=0,
    )  # fmt: skip


def _caption(traces: Sequence[Trace], grids: Sequence[tuple[Trace, Grid]], quantity: Quantity) -> str:
    told = tr(
        "{what}; largest of each of at most {bins} time bins; one colour scale.",
        what=tr(quantity.caption),
        bins=COLUMNS,
    )
    count = max(len(quantity.modules(trace.run)) for trace in traces)
    shown = max(len(grid.names) for _, grid in grids)
    if count <= shown:
        return told
    grouped = tr(
        "{count} modules are grouped to {shown} rows by their names (root of the sum of squares)."
        if quantity.states
        else "{count} modules are grouped to {shown} rows by their names (the largest).",
        count=count,
        shown=shown,
    )
    return listed((told, grouped))


def _alt(grids: Sequence[tuple[Trace, Grid]], quantity: Quantity) -> str:
    parts = []
    for trace, grid in grids:
        bad = int((grid.state == NONFINITE).any(axis=1).sum())
        largest = float(np.nanmax(grid.norm)) if np.isfinite(grid.norm).any() else None
        parts.append(
            tr(
                "{name}: largest {largest}, non-finite in {bad} of {rows} rows",
                name=trace.label,
                largest=text(largest),
                bad=bad,
                rows=len(grid.names),
            )
        )
    return tr("{title}. {runs}.", title=tr(quantity.title), runs=listed(parts, "; "))
