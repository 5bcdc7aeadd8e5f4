"""A matplotlib figure as an SVG in the page: with its own ids, the page's colours and fonts, and a text alternative."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from bifusion_diag.reports import numbers
from bifusion_diag.reports.palette import BAND, INK, QUIET, RULE, VARIABLES

WIDTH = 10.4  # inches; 72 units of the SVG's viewBox an inch
LEFT, RIGHT = 0.075, 0.855  # of every plot over time, so that they line up; labels stand right of the lines

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bifusion-diag",
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": QUIET,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "figure.facecolor": "none",
    "hatch.linewidth": 0.9,
    "lines.solid_joinstyle": "round",
    "path.simplify": False,
    "text.parse_math": False,  # names are the user's: a "$" in them is a dollar
}


@dataclass(frozen=True)
class TimeAxis:
    """Where a plot's time axis lies in its SVG, for the shared cursor."""

    left: float  # units of the viewBox
    right: float
    first: float  # steps
    last: float


@dataclass(frozen=True)
class Plot:
    """One drawn plot.

    Attributes:
        name: unique in the page.
        title: what it shows.
        caption: how to read it; may be "".
        alt: text alternative with the main number.
        svg: the element.
        time: its time axis, None where it has none.
        values: lines for the cursor's readout: label → (steps, values).
        ink: the picture in it is black ink on nothing, inverted by the dark theme.
        zoom: what redraws it over a part of its time, see :mod:`bifusion_diag.reports.zoom`; None: it stays as it is.
        rows: what sorts and searches the rows of a heat map; None where it has none.
        numbers: what it draws, for the JSON beside the page alone.
        folded: it is closed at first: it repeats a plot of another run or quantity.
    """

    name: str
    title: str
    caption: str
    alt: str
    svg: str
    time: TimeAxis | None = None
    values: dict[str, tuple[list[int], list[float | None]]] = field(default_factory=dict)
    ink: bool = False
    zoom: dict[str, Any] | None = None
    rows: list[dict[str, Any]] | None = None
    numbers: dict[str, Any] = field(default_factory=dict)
    folded: bool = False


@contextmanager
def drawing(height: float) -> Iterator[Figure]:
    """A figure of the report's width and style, to be drawn on and rendered within the context.

    Args:
        height: in inches.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasSVG(figure)
        yield figure


def render(figure: Figure, name: str, alt: str) -> str:
    """The figure as an SVG element whose ids begin with `name`."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings():  # texts stay text: the browser has the glyphs that matplotlib's font lacks
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r'href="(incident-[^"]+)"', r'href="#\1" tabindex="-1"', svg)
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda match: _themed(match.group()), svg)
    svg = re.sub(r"font: ([^;\"]*?)([\d.]+)px [^;\"]*", r"font-size: \2px", svg)  # the page's font
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r'\b(?:d|x|y|transform)="[^"]*"', _shorten, svg)
    head = f'<svg role="img" aria-label="{escape(alt)}"'
    box = re.search(r'viewBox="[^"]+"', svg)
    assert box is not None
    return f'{head} {box.group()} xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">' + (
        svg[svg.index(">") + 1 :].strip()
    )


def _shorten(attribute: re.Match[str]) -> str:
    """A hundredth of a unit is finer than a pixel."""
    return re.sub(r"(\.\d{2})\d+", r"\1", attribute.group())


def _themed(colour: str) -> str:
    return f"var(--{VARIABLES[colour]})" if colour in VARIABLES else colour


def time_axis(axes: Axes) -> TimeAxis:
    """The place of the axes' time axis in the SVG."""
    width = WIDTH * 72
    box = axes.get_position()
    first, last = axes.get_xlim()
    return TimeAxis(round(box.x0 * width, 2), round(box.x1 * width, 2), float(first), float(last))


def time_limits(axes: Axes, first: int, last: int) -> None:
    """The same x axis on every plot over time."""
    axes.set_xlim(first, max(last, first + 1))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))


def log_axis(axis: Axis) -> None:
    """Plain numbers at a logarithmic axis with final limits; also at 2 and 5 where it spans less than 1.5 decades, and
    between where less than 0.6."""
    low, high = axis.get_view_interval()
    if high < low * 10**1.5:
        narrow = high < low * 10**0.6
        axis.set_major_locator(
            LogLocator(subs=(1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0) if narrow else (1.0, 2.0, 5.0))
        )
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axis.set_minor_formatter(NullFormatter())


def tick(value: float) -> str:
    """1 and 0.005 as they are, 10⁻⁵ and 2·10⁻⁵ as tables have them."""
    return f"{value:g}" if 1e-4 <= value < 1e5 else numbers.text(value).replace(".00·", "·").removeprefix("1·")


def end_labels(axes: Axes, labels: Sequence[tuple[str, float, str]], gap: float = 0.1) -> None:
    """Label lines at their right end.

    Args:
        axes: with final limits.
        labels: text, the line's last value (data units) and colour of each; a value that is not finite has no label.
        gap: least distance of two labels, in shares of the axes' height.
    """
    to_share = axes.transData + axes.transAxes.inverted()
    right = axes.get_xlim()[1]
    wanted = [
        (float(np.clip(to_share.transform((right, value))[1], 0, 1)), text, colour)
        for text, value, colour in labels
        if np.isfinite(value)
    ]
    wanted.sort()
    places = [place for place, _, _ in wanted]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + gap)
    pushed = float(np.mean(places) - np.mean([place for place, _, _ in wanted])) if places else 0.0
    down = max(min(pushed, places[0]), places[-1] - 1) if places else 0.0  # centred on the lines, within the axes
    for place, (_, text, colour) in zip(places, wanted, strict=True):
        axes.text(1.008, place - down, text, color=colour, va="center", ha="left", transform=axes.transAxes)


def title(axes: Axes, text: str) -> None:
    """A panel's title, above its left end."""
    axes.set_title(text, fontweight="bold", color=INK, pad=5)


def shade(axes: Axes, low: float, high: float) -> None:
    """A horizontal band."""
    axes.axhspan(low, high, color=BAND, zorder=0, linewidth=0)
