"""α on a scene: what the picture shows, checked in its pixels, and what is said of it."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from bifusion_diag.diagnosis.quantity import NotMeasured
from bifusion_diag.record import Run, RunHeader, RunWriter, Snapshot, alpha_numbers, capture, load_run
from bifusion_diag.record.scenes import half
from bifusion_diag.reports.language import speaking
from bifusion_diag.reports.plots.scene import draw_scene
from bifusion_diag.reports.scene import ScenePanel, scene_panel
from bifusion_diag.reports.svg import WIDTH

SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"
ALPHAS = (0.05, 0.5, 0.95)
PLACES = np.array([[40.0, 60.0], [160.0, 120.0], [280.0, 200.0], [100.0, 200.0], [250.0, 50.0]])  # px
Make = Callable[..., Run]


def snapshot(
    alpha: NDArray[np.float64], done: int, moment: str, *, name: str = "a room", posed: bool = True
) -> Snapshot:
    """Three seen points, one that no view sees, one whose α is NaN; an image of one colour, 320 × 240."""
    valid = np.array([True, True, True, False, True])
    image = np.full((1, 3, 240, 320), 90, np.uint8)
    matrix = np.array([[[200.0, 0, 160], [0, 200, 120], [0, 0, 1]]])
    rays = np.concatenate([PLACES, np.ones((5, 1))], axis=1) @ np.linalg.inv(matrix[0]).T
    scene, rows = capture(
        name,
        rays * 2.0,
        image,
        PLACES[:, None],
        valid,
        inside=np.ones((5, 1), bool),
        intrinsics=matrix,
        pose=np.eye(4)[None] if posed else None,
        provenance={"split": "validation", "kind": "synthetic rooms", "flaws": ""},
    )
    return Snapshot(done, moment, scene, half(alpha[rows]), alpha_numbers(alpha, valid))


@pytest.fixture
def recorded(tmp_path: Path) -> Make:
    """A run with these snapshots, written and read back."""

    def make(*snapshots: Snapshot, **header: object) -> Run:
        with RunWriter(tmp_path / "run.json", RunHeader("run", **header)) as writer:  # type: ignore[arg-type]
            writer.append([0], {"loss/total": [1.0]})
            for one in snapshots:
                writer.snapshot(one)
        return load_run(tmp_path / "run.json")

    return make


BEFORE = np.array([0.5, 0.5, 0.5, 0.1, 0.5])
AFTER = np.array([*ALPHAS, 0.1, np.nan])


def panel_of(run: Run) -> ScenePanel:
    panel = scene_panel(run)
    assert isinstance(panel, ScenePanel)
    return panel


def pictures(svg: str) -> list[tuple[NDArray[np.uint8], tuple[float, float, float, float]]]:
    """The pictures of points in the order of drawing: RGBA, and where they are in the figure [units of the viewBox]."""
    found = []
    root = ElementTree.fromstring(svg)
    defined = set(next(root.iter(f"{SVG}defs")).iter(f"{SVG}image"))
    for image in root.iter(f"{SVG}image"):
        if image not in defined:
            data = re.sub(r"\s", "", image.attrib[LINK].removeprefix("data:image/png;base64,"))
            picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))
            x, y, width, height = (float(image.attrib[key]) for key in ("x", "y", "width", "height"))
            # matplotlib stores it upside down, and turns it about its own height
            assert image.attrib["transform"] == f"scale(1 -1) translate(0 -{image.attrib['height']})"
            found.append((picture[::-1], (x, -y, width, height)))
    return found


def test_a_point_has_the_colour_of_its_alpha_where_it_is_in_the_photograph(recorded: Make) -> None:
    run = recorded(snapshot(BEFORE, 0, "before training"), snapshot(AFTER, 9, "at the end"))
    plot = draw_scene(panel_of(run))
    root = ElementTree.fromstring(plot.svg)
    photographs = [use for use in root.iter(f"{SVG}use") if "photograph" in use.attrib.get("href", "")]
    assert len(photographs) == 3  # the image, and beneath the points of either snapshot
    shown = [picture for picture in pictures(plot.svg) if picture[0].shape[0] > 30]
    for use, alphas, (picture, (left, top, wide, tall)) in zip(
        photographs[1:], ([0.5, 0.5, 0.5], ALPHAS), shown, strict=False
    ):
        numbers = [float(number) for number in re.findall(r"[-\d.]+", use.attrib["transform"])]
        x, y, width, height = numbers
        for place, alpha in zip(PLACES[:3], alphas, strict=True):
            at = x + (place[0] + 0.5) / 320 * width, y + (place[1] + 0.5) / 240 * height
            column = int((at[0] - left) / wide * picture.shape[1])
            row = int((at[1] - top) / tall * picture.shape[0])
            expected = np.array(colormaps["cividis"](alpha)[:3]) * 255
            assert picture[row, column, 3] == 255
            np.testing.assert_allclose(picture[row, column, :3], expected, atol=4)  # 200 levels


def test_it_is_one_small_well_formed_svg_whose_texts_are_text(recorded: Make) -> None:
    run = recorded(
        snapshot(BEFORE, 0, "before training"), snapshot(AFTER, 9, "at the end"), provenance={"clip_weights": "random"}
    )
    plot = draw_scene(panel_of(run))
    root = ElementTree.fromstring(plot.svg)
    assert len(plot.svg) < 400_000
    ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    texts = " ".join("".join(element.itertext()) for element in root.iter(f"{SVG}text"))
    for words in (
        "α before training (0 steps done)",
        "α at the end (9 steps done)",
        "right of the camera [m]",
        "camera",
    ):
        assert words in texts
    assert "no view sees the point" in texts
    assert "α is not finite" in texts
    assert "mean 0.500" in plot.alt
    assert "80.0 % of 5 points" in plot.caption
    assert "1 are NaN or infinite" in plot.caption
    assert "a validation scene, not trained on; synthetic rooms" in plot.caption
    assert "CLIP weights: random" in plot.caption
    assert f'viewBox="0 0 {WIDTH * 72:g}' in plot.svg


def test_names_that_look_like_a_page_stay_names(recorded: Make) -> None:
    name = "<script>alert(1)</script>"
    shot = snapshot(BEFORE, 0, f'"><b>{name}', name=name)
    plot = draw_scene(panel_of(recorded(shot)))
    assert ElementTree.fromstring(plot.svg).find(f".//{SVG}script") is None
    assert "<script" not in plot.svg
    assert "<b>" not in plot.svg


def test_one_snapshot_without_a_pose_and_no_image_is_drawn_too(recorded: Make) -> None:
    shot = snapshot(BEFORE, 0, "", posed=False)
    plot = draw_scene(panel_of(recorded(shot)))
    assert "x [m]" in plot.svg
    bare = dataclasses.replace(shot, scene=dataclasses.replace(shot.scene, views=(), view=np.full(5, 255, np.uint8)))
    assert "α after 0 steps" in draw_scene(panel_of(recorded(bare))).svg


def test_numbers_of_all_moments_are_there_and_only_the_same_scene_is_compared(recorded: Make) -> None:
    other = snapshot(BEFORE, 2, "", name="another room")
    panel = panel_of(recorded(snapshot(BEFORE, 0, "before training"), other, snapshot(AFTER, 9, "at the end")))
    assert [row.done for row in panel.rows] == [0, 9]
    assert [one.done for one in panel.drawn] == [0, 9]
    stored = panel.to_dict()
    assert stored["valid_share"] == 0.8
    assert stored["moments"][1]["mean_valid"] == pytest.approx(np.mean(ALPHAS))
    assert stored["moments"][1]["nonfinite"] == 1


def test_a_run_without_says_why(recorded: Make) -> None:
    def reason(run: Run) -> str:
        panel = scene_panel(run)
        assert isinstance(panel, NotMeasured)
        return panel.reason

    lite = {"model": {"fusion": "lite"}}
    assert "Monitor.snapshot" in reason(recorded())
    assert "the probe 'gate' was not on" in reason(recorded(settings=lite, probes=["losses"]))
    assert "before version 2.1" in reason(recorded(settings=lite, probes=["losses", "all"]))


def test_it_speaks_chinese(recorded: Make) -> None:
    run = recorded(snapshot(BEFORE, 0, "before training"), snapshot(AFTER, 9, "at the end"))
    with speaking("zh"):
        plot = draw_scene(panel_of(run))
    assert ElementTree.fromstring(plot.svg) is not None
    assert "α" in plot.title


def test_a_narrow_range_of_alpha_is_drawn_again_in_all_colours(recorded: Make) -> None:
    run = recorded(snapshot(BEFORE, 0, "before training"), snapshot(np.array([0.48, 0.49, 0.5, 0.1, 0.9]), 9, "end"))
    plot = draw_scene(panel_of(run))
    texts = " ".join("".join(one.itertext()) for one in ElementTree.fromstring(plot.svg).iter(f"{SVG}text"))
    assert "The same α, colours stretched to 1–99 %" in texts
    assert "colours stretched to the range of its points" in plot.caption
    colours = {tuple(colour) for picture, _ in pictures(plot.svg)[-2:] for colour in picture[picture[..., 3] == 255]}
    ends = np.array([colormaps["cividis"](0.0), colormaps["cividis"](1.0)])[:, :3] * 255
    for end in ends:
        assert min(np.abs(np.array(colour[:3]) - end).max() for colour in colours) <= 4
    wide = recorded(snapshot(AFTER, 9, "at the end"))
    assert "stretched" not in draw_scene(panel_of(wide)).svg
    flat = recorded(snapshot(BEFORE, 0, "before training"))
    assert "stretched" not in draw_scene(panel_of(flat)).svg
