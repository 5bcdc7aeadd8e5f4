"""What the page needs to redraw a plot over a part of its time: its panels, and its lines with more vertices than it
draws at first.

Matplotlib's artists are found in the SVG by their ids. A *curve* is drawn anew from its own vertices, so that detail
appears; whatever else lies in data coordinates (*stretched*) is scaled along the time axis; a text *at* a step moves
with it. Heights do not change: what was compared before is compared still.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from bifusion_diag.reports.reduce import MAX_VERTICES, min_max
from bifusion_diag.reports.svg import WIDTH

DETAIL = (
    8000  # vertices of a curve that zooming may show; a record keeps 2,000 buckets of a long run, two vertices each
)
_DIGITS = 4  # significant ones of a value: a hundredth of a pixel on any axis


@dataclass
class Zoom:
    """Collects what of a figure zooms.

    Attributes:
        detail: vertices that a curve keeps.
        drawn: vertices that are drawn at first.
    """

    detail: int = DETAIL
    drawn: int = MAX_VERTICES
    _panels: list[Axes] = field(default_factory=list)
    _curves: dict[str, tuple[int, NDArray[np.int64], NDArray[np.float64]]] = field(default_factory=dict)
    _texts: dict[str, tuple[int, int]] = field(default_factory=dict)
    _count: int = 0

    def panel(self, axes: Axes) -> Axes:
        """Axes with a time axis."""
        axes.xaxis.set_gid(f"timeaxis{len(self._panels)}")
        self._panels.append(axes)
        return axes

    def curve(
        self, axes: Axes, x: NDArray[np.int64], y: NDArray[np.float64], **style: Any
    ) -> Line2D:  # the style is matplotlib's
        """Draw a line, reduced, and keep more of it."""
        (line,) = axes.plot(*min_max(x, y, self.drawn), **style)
        if x.size > self.drawn:
            line.set_gid(self._name("curve"))
            self._curves[str(line.get_gid())] = (self._panels.index(axes), *min_max(x, y, max(self.detail, self.drawn)))
        else:  # all of it is drawn already
            self.stretch(line)
        return line

    def stretch(self, *artists: Artist) -> None:
        """These scale along the time axis."""
        for artist in artists:
            artist.set_gid(self._name("stretch"))

    def text(self, artist: Artist, step: int, until: int | None = None) -> None:
        """This text moves with a step; where it names what lasts until another, it stays in sight until then."""
        artist.set_gid(self._name("text"))
        self._texts[str(artist.get_gid())] = (step, step if until is None else until)

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{kind}{self._count}"

    def data(self) -> dict[str, Any]:
        """Everything for the page's program; call it when limits are final."""
        return {
            "panels": [_panel(axes) for axes in self._panels],
            "curves": {
                name: {"panel": panel, "x": _deltas(x), "y": [_short(value) for value in y.tolist()]}
                for name, (panel, x, y) in self._curves.items()
            },
            "texts": self._texts,
        }


def _panel(axes: Axes) -> dict[str, Any]:
    """Where a panel lies in the SVG, and its limits: logarithms on a log axis."""
    figure = axes.figure
    height = figure.get_figheight() * 72  # type: ignore[union-attr]
    box = axes.get_position()
    low, high = axes.get_ylim()
    logarithmic = axes.get_yscale() == "log"
    if logarithmic:
        low, high = float(np.log10(low)), float(np.log10(high))
    return {
        "left": round(box.x0 * WIDTH * 72, 2),
        "right": round(box.x1 * WIDTH * 72, 2),
        "top": round((1 - box.y1) * height, 2),
        "bottom": round((1 - box.y0) * height, 2),
        "low": float(low),
        "high": float(high),
        "log": logarithmic,
        "labels": bool(axes.xaxis.get_tick_params().get("labelbottom", True)),
    }


def _deltas(x: NDArray[np.int64]) -> list[int]:
    """The first step, then the distances: small numbers."""
    return np.diff(x, prepend=0).tolist()


def _short(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None
