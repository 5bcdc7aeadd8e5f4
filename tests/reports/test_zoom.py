"""What zooming shows: more than is drawn at first, and never less than the record has."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bifusion_diag.diagnosis import measure
from bifusion_diag.record.schema import Run
from bifusion_diag.reports.palette import ACCENT, BASELINE
from bifusion_diag.reports.plots import Trace, draw_timeline
from bifusion_diag.reports.reduce import MAX_VERTICES, vertices
from bifusion_diag.reports.svg import drawing, time_limits
from bifusion_diag.reports.zoom import Zoom


def test_a_long_line_keeps_more_than_it_draws() -> None:
    x = np.arange(20_000)
    y = np.sin(x / 7.0)
    y[12_345], y[15_000] = 50.0, np.nan
    zoom = Zoom(detail=8000)
    with drawing(2) as figure:
        axes = zoom.panel(figure.add_subplot())
        line = zoom.curve(axes, x, y, color=ACCENT)
        time_limits(axes, 0, 19_999)
        data = zoom.data()
    assert len(line.get_xdata()) <= MAX_VERTICES
    (curve,) = data["curves"].values()
    steps = np.cumsum(curve["x"])
    assert MAX_VERTICES < len(steps) <= 8000
    assert curve["y"][int(np.flatnonzero(steps == 12_345)[0])] == 50.0
    for start in range(0, 20_000, 500):  # the extremes of every stretch are there
        inside = (steps >= start) & (steps < start + 500)
        values = [value for value, keep in zip(curve["y"], inside, strict=True) if keep and value is not None]
        part = y[start : start + 500]
        np.testing.assert_allclose([min(values), max(values)], [np.nanmin(part), np.nanmax(part)], rtol=1e-3)


def test_a_short_line_is_there_already() -> None:
    zoom = Zoom()
    with drawing(2) as figure:
        axes = zoom.panel(figure.add_subplot())
        zoom.curve(axes, np.arange(100), np.arange(100.0), color=ACCENT)
        assert zoom.data()["curves"] == {}


def test_the_panels_of_the_timeline_lie_where_they_are_drawn(baseline: Run, candidate: Run) -> None:
    traces = [
        Trace(baseline, measure(baseline), "baseline", BASELINE),
        Trace(candidate, measure(candidate), "candidate", ACCENT),
    ]
    plot = draw_timeline(traces)
    assert plot.zoom is not None
    assert plot.time is not None
    panels = plot.zoom["panels"]
    assert len(panels) == 4  # bad steps, loss, norm, learning rate
    assert [panel["log"] for panel in panels] == [False, False, True, False]
    assert all(panel["left"] == plot.time.left and panel["right"] == plot.time.right for panel in panels)
    assert all(one["bottom"] < other["top"] for one, other in itertools.pairwise(panels))
    assert [panel["labels"] for panel in panels] == [False, False, False, True]


def test_several_seeds_are_one_band_that_holds_every_value(writer: Callable[..., Run], tmp_path: Path) -> None:
    runs = [
        writer(tmp_path / f"{seed}.json", name=f"r{seed}", preset="bifusion"[: 5 + seed], spikes={200 + seed: 60.0})
        for seed in range(3)
    ]
    one = draw_timeline([Trace(run, measure(run), "side", ACCENT) for run in runs])
    assert one.svg.count(">side<") == 3  # once a panel, not once a run
    highest = max(float(np.nanmax(vertices(run.all_series["train/grad_norm"])[1])) for run in runs)
    assert one.zoom is not None
    assert 10 ** one.zoom["panels"][2]["high"] >= highest
    assert "the band holds every value of every run" in one.caption
