"""α painted on a scene: its images, the same images with the points coloured by α, and the points from above."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image

from bifusion_diag.diagnosis.criteria import ALPHA_BAND
from bifusion_diag.diagnosis.phrase import join, say
from bifusion_diag.record.scenes import SceneCapture, SceneView, Snapshot
from bifusion_diag.reports.language import tr
from bifusion_diag.reports.numbers import text
from bifusion_diag.reports.palette import CATEGORY, INK, NON_FINITE, QUIET, RULE
from bifusion_diag.reports.scene import ScenePanel, moment_text, number_text
from bifusion_diag.reports.svg import WIDTH, Plot, drawing, render, title

MAP = "cividis"
LEFT, GAP, TOP, BETWEEN, BOTTOM = 0.5, 0.3, 0.32, 0.42, 0.5  # inches
TALLEST = 2.7  # of a picture [inches]
DOTS = 170  # an inch of the points' pictures: about two for each CSS pixel
DIM = 0.45  # how much of the photograph is left beneath the points
UNSEEN = CATEGORY[2]  # a hue that the map has not, as its middle is grey
LEVELS = 200  # of colour
SIZE = 5.0  # of a point [square points]
STRETCHED = (0.002, 0.6)  # ranges of α that are drawn a second time in all colours: a record keeps α to 0.0005


Floats = NDArray[np.floating[Any]]
Range = tuple[float, float]  # of α: the first and the last colour


def draw_scene(panel: ScenePanel, name: str = "scene") -> Plot:
    """Draw it. Rows: an image each, then the points from above; columns: the image itself, then each snapshot.

    Points are pictures of pixels, as thousands of them would make a page heavy; all text is text.
    """
    scene = panel.drawn[-1].scene
    width = (WIDTH - LEFT - 2 * GAP) / 3
    tall = [min(TALLEST, width * view.size[1] / view.size[0]) for view in scene.views]
    places, above = _from_above(scene)
    limits = _limits(places, with_camera=above)
    spread = np.ptp(limits, axis=1)
    floor = float(np.clip(width * spread[1] / max(spread[0], 1e-6), 1.8, TALLEST))
    stretched = _own_range(panel.drawn[-1])
    again = 0.0 if stretched is None else 2 * BETWEEN + floor + BOTTOM
    height = TOP + sum(tall) + BETWEEN * len(tall) + floor + BOTTOM + again
    columns = [LEFT + place * (width + GAP) for place in range(3)]
    photographs: list[str] = []
    with drawing(height) as figure:
        figure.set_dpi(DOTS)
        top = height - TOP
        for number, (view, rows) in enumerate(zip(scene.views, tall, strict=True)):
            wide = rows * view.size[0] / view.size[1]
            for column, left in enumerate(columns[: 1 + len(panel.drawn)]):
                axes = figure.add_axes((left / WIDTH, (top - rows) / height, wide / WIDTH, rows / height))
                photographs.append(_photograph(name, number, (left, height - top, wide, rows), whole=column == 0))
                shown = panel.drawn[column - 1] if column else None
                _draw_view(axes, view, shown, number)
                if column == 0:
                    one = scene.of_views == 1
                    title(axes, tr("Image") if one else tr("Image {number}", number=number + 1))
                elif number == 0 and shown is not None:
                    title(axes, _heading(shown))
            top -= rows + BETWEEN
        for column, snapshot in enumerate(panel.drawn, start=1):
            box = (columns[column] / WIDTH, (top - floor) / height, width / WIDTH, floor / height)
            axes = figure.add_axes(box)
            _draw_above(axes, snapshot, places, above, limits, floor / width)
            if not tall:
                title(axes, _heading(snapshot))
            axes.set_xlabel(tr("right of the camera [m]") if above else "x [m]")
            axes.tick_params(labelleft=column == 1)
            if column == 1:
                axes.set_ylabel(tr("ahead of the camera [m]") if above else "y [m]")
        _draw_key(figure, panel, (columns[0], top - floor, width, floor), height)
        if stretched is not None:
            top -= floor + BOTTOM + 2 * BETWEEN
            _draw_bar(
                figure,
                (columns[0], top - floor, width, floor),
                height,
                stretched,
                tr("The same α, colours stretched to 1–99 %"),
            )
            axes = figure.add_axes((columns[1] / WIDTH, (top - floor) / height, width / WIDTH, floor / height))
            _draw_above(axes, panel.drawn[-1], places, above, limits, floor / width, stretched)
            title(axes, tr("{when}, stretched", when=_heading(panel.drawn[-1])))
            axes.set_xlabel(tr("right of the camera [m]") if above else "x [m]")
            axes.set_ylabel(tr("ahead of the camera [m]") if above else "y [m]")
            for view, rows in list(zip(scene.views, tall, strict=True))[:1]:
                rows = min(rows, floor)
                wide = rows * view.size[0] / view.size[1]
                axes = figure.add_axes((columns[2] / WIDTH, (top - rows) / height, wide / WIDTH, rows / height))
                photographs.append(_photograph(name, 0, (columns[2], height - top, wide, rows), whole=False))
                _draw_view(axes, view, panel.drawn[-1], 0, stretched)
        alt = _alt(panel)
        svg = render(figure, name, alt)
    svg = re.sub(r'(<image\b[^>]*?) id="[^"]*"', r"\1", svg)  # equal pictures would have equal ones
    svg = re.sub(r"data:image/png;base64,([^\"]+)", _lighter, svg)
    inside = svg.index(">") + 1
    definitions = "".join(_definition(name, number, view) for number, view in enumerate(scene.views))
    svg = f"{svg[:inside]}<defs>{definitions}</defs>{''.join(photographs)}{svg[inside:]}"
    return Plot(name, tr("α on a scene, {run}", run=panel.label), _caption(panel), alt, svg, numbers=panel.to_dict())


def _lighter(address: re.Match[str]) -> str:
    """A PNG of few colours with a palette of just these: the same picture in a third of the bytes."""
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(re.sub(r"\s", "", address[1])))).convert("RGBA"))
    picture = np.where(picture[..., 3:] == 0, 0, picture)  # what is transparent has no colour
    colours, places = np.unique(picture.reshape(-1, 4), axis=0, return_inverse=True)
    if len(colours) > 256:
        return address.group()
    small = Image.fromarray(places.reshape(picture.shape[:2]).astype(np.uint8), "P")
    small.putpalette(colours.tobytes(), "RGBA")
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _definition(name: str, number: int, view: SceneView) -> str:
    """The photograph, once in the page; one unit wide and high."""
    data = base64.b64encode(view.image).decode("ascii")
    return (
        f'<image id="{name}-photograph{number}" width="1" height="1" preserveAspectRatio="none" '
        f'href="data:{view.media_type};base64,{data}"/>'
    )


def _photograph(name: str, number: int, box: tuple[float, float, float, float], *, whole: bool) -> str:
    """It at a place of the figure: left, top, width, height in inches."""
    left, top, wide, tall = (round(72 * value, 2) for value in box)
    opacity = "" if whole else f' opacity="{DIM}"'
    return f'<use href="#{name}-photograph{number}" transform="translate({left} {top}) scale({wide} {tall})"{opacity}/>'


def _own_range(snapshot: Snapshot) -> Range | None:
    """From which to which α most seen points are, 1–99 %; None where that is too little or so much that the picture
    in the colours of 0 to 1 shows it all.
    """
    seen = snapshot.alpha[snapshot.scene.valid & np.isfinite(snapshot.alpha)]
    if not seen.size:
        return None
    low, high = (float(value) for value in np.percentile(np.clip(seen, 0, 1), [1, 99]))
    return (low, high) if STRETCHED[0] <= high - low <= STRETCHED[1] else None


def _draw_view(
    axes: Axes, view: SceneView, snapshot: Snapshot | None, number: int, colours: Range = (0.0, 1.0)
) -> None:
    """The frame of an image, and the points that are shown in it."""
    width, height = view.size
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)
    if snapshot is not None:
        here = snapshot.scene.view == number
        _draw_points(axes, snapshot.scene.uv[here], snapshot.alpha[here], snapshot.scene.valid[here], colours)


def _draw_points(axes: Axes, places: Floats, alpha: Floats, valid: NDArray[np.bool_], scale: Range) -> None:
    """In the order given: the points without a 2D feature beneath, those with a non-finite α on top."""
    finite = np.isfinite(alpha)
    unseen, seen, bad = finite & ~valid, finite & valid, ~finite
    x, y = places[:, 0], places[:, 1]
    low, high = scale
    colours = colormaps[MAP].resampled(LEVELS)(np.clip((alpha[seen] - low) / (high - low), 0, 1))
    plain: Any = {"rasterized": True, "antialiased": False}  # few colours: see _lighter
    axes.scatter(x[unseen], y[unseen], marker="x", s=1.6 * SIZE, color=UNSEEN, linewidths=0.8, **plain)
    axes.scatter(x[seen], y[seen], s=SIZE, c=colours, linewidths=0, **plain)
    axes.scatter(x[bad], y[bad], s=2 * SIZE, color=NON_FINITE, linewidths=0, **plain)


def _draw_above(
    axes: Axes,
    snapshot: Snapshot,
    places: Floats,
    camera: bool,
    limits: Floats,
    aspect: float,
    colours: Range = (0.0, 1.0),
) -> None:
    """The points from above."""
    order = np.argsort(places[:, 2], kind="stable")  # high ones hide low ones
    _draw_points(axes, places[order, :2], snapshot.alpha[order], snapshot.scene.valid[order], colours)
    if camera:
        axes.plot(0, 0, marker="^", color=INK, markersize=6)
    (left, right), (low, high) = limits
    wanted = max((high - low) / aspect, right - left)  # one metre is as long on both axes
    middle, centre = (left + right) / 2, (low + high) / 2
    axes.set_xlim(middle - wanted / 2, middle + wanted / 2)
    axes.set_ylim(centre - wanted * aspect / 2, centre + wanted * aspect / 2)
    axes.grid(color=RULE, linewidth=0.4)
    axes.set_axisbelow(True)


def _from_above(scene: SceneCapture) -> tuple[Floats, bool]:
    """Of every point where it is seen from above, and its height (K, 3) [m]; and whether that is the camera's above.

    With a pose, left and right are those of the first image, which holds for any world frame; else x, y and z.
    """
    pose = next((view.pose for view in scene.views if view.pose is not None and np.isfinite(view.pose).all()), None)
    if pose is None:
        return scene.xyz, False
    right, down, ahead = ((scene.xyz - pose[:3, 3]) @ pose[:3, :3]).T
    return np.stack([right, ahead, -down], axis=1), True


def _limits(places: Floats, *, with_camera: bool) -> Floats:
    """Where most of the points are: (2, 2) lowest and highest of both axes; a few far ones must not shrink the rest.
    The camera is among them, unless it is so far that it would."""
    finite = places[np.isfinite(places).all(axis=1)][:, :2]
    if not len(finite):
        return np.array([[-1.0, 1.0], [-1.0, 1.0]])
    low, high = np.percentile(finite, [1, 99], axis=0)
    if with_camera and np.all(np.maximum(high, 0) - np.minimum(low, 0) < 2 * (high - low)):
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    margin = 0.06 * np.maximum(high - low, 0.1)
    return np.stack([low - margin, high + margin], axis=1)


def _draw_key(figure: Figure, panel: ScenePanel, box: tuple[float, float, float, float], height: float) -> None:
    """Colour bar and marks, in the corner beneath the images."""
    left, bottom, _, tall = box
    _draw_bar(figure, box, height, (0.0, 1.0), tr("α: 0 = only 3D, 1 = only 2D"))
    marks = [
        Line2D([], [], linestyle="none", marker="o", markersize=4, color=colormaps[MAP](0.5), label=tr("α of a point")),
    ]
    if _some_unseen(panel):
        marks.append(
            Line2D([], [], linestyle="none", marker="x", markersize=4, color=UNSEEN, label=tr("no view sees the point"))
        )
    if any(row.nonfinite for row in panel.rows):
        marks.append(
            Line2D([], [], linestyle="none", marker="o", markersize=5, color=NON_FINITE, label=tr("α is not finite"))
        )
    if _from_above(panel.drawn[-1].scene)[1]:
        marks.append(Line2D([], [], linestyle="none", marker="^", markersize=6, color=INK, label=tr("camera")))
    figure.legend(
        handles=marks, loc="upper left", bbox_to_anchor=((left - 0.1) / WIDTH, (bottom + tall - 0.72) / height),
        frameon=False, fontsize=8.5, labelcolor=QUIET, borderaxespad=0, handletextpad=0.4,
    )  # fmt: skip


def _draw_bar(figure: Figure, box: tuple[float, float, float, float], height: float, scale: Range, what: str) -> None:
    """A colour bar from the least α to the greatest."""
    left, bottom, wide, tall = box
    bar = figure.add_axes((left / WIDTH, (bottom + tall - 0.42) / height, 0.8 * wide / WIDTH, 0.11 / height))
    figure.colorbar(ScalarMappable(Normalize(*scale), MAP), cax=bar, orientation="horizontal")
    whole = scale == (0.0, 1.0)
    bar.set_xticks([0, ALPHA_BAND[0], 0.5, ALPHA_BAND[1], 1] if whole else np.linspace(*scale, 3))
    if not whole:
        bar.xaxis.set_major_formatter(lambda value, _: f"{value:.4f}")
    bar.tick_params(length=2, pad=2)
    title(bar, what)


def _heading(snapshot: Snapshot) -> str:
    return tr("α {when}", when=moment_text(snapshot))


def _caption(panel: ScenePanel) -> str:
    scene = panel.drawn[-1].scene
    kept, points = len(scene.offsets), scene.of_points
    return tr(
        join(
            [
                say(
                    "{share} % of {points} points have a 2D feature.",
                    share=text(None if panel.valid_share is None else 100 * panel.valid_share),
                    points=text(points, whole=True),
                ),
                *(number_text(row) for row in panel.rows),
                "The α of a point that no view sees is set, not learned." if _some_unseen(panel) else "",
                say("{kept} points are drawn, chosen at random; the numbers are of all.", kept=text(kept, whole=True))
                if kept < points
                else "",
                say("{count} of {total} images are shown.", count=len(scene.views), total=scene.of_views)
                if len(scene.views) < scene.of_views
                else "",
                "Below: the points from above, left and right as in the first image."
                if _from_above(scene)[1]
                else "Below: the points along the z axis.",
                "The last row is the last moment again with the colours stretched to the range of its points, so that "
                "its structure is seen; a small difference looks large there."
                if _own_range(panel.drawn[-1]) is not None
                else "",
                panel.provenance,
            ]
        )
    )


def _some_unseen(panel: ScenePanel) -> bool:
    return any(row.mean_invalid is not None for row in panel.rows)


def _alt(panel: ScenePanel) -> str:
    last = panel.rows[-1]
    return tr(
        "α of {points} points of the scene {name}, {run}: mean {mean} where a view sees the point, {moment}; before: "
        "{before}.",
        points=text(panel.points, whole=True),
        name=panel.drawn[-1].scene.name,
        run=panel.label,
        mean=text(last.mean_valid),
        moment=moment_text(last),
        before=text(panel.rows[0].mean_valid) if len(panel.rows) > 1 else tr("not measured"),
    )
