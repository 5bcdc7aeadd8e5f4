"""Plots as SVG: what they hold, by parsing them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from bifusion_diag.diagnosis import compare_runs, measure
from bifusion_diag.record.schema import Run, Series
from bifusion_diag.reports.html import render_comparison
from bifusion_diag.reports.palette import ACCENT, BASELINE, VARIABLES
from bifusion_diag.reports.plots import (
    Trace,
    draw_alpha,
    draw_clip_ranges,
    draw_gradients,
    draw_heatmap,
    draw_projection,
    draw_terms,
    draw_throughput,
    draw_timeline,
    draw_updates,
    draw_validation,
)
from bifusion_diag.reports.plots.heatmap import (
    FINITE,
    FROZEN,
    NO_GRADIENT,
    NONFINITE,
    ZERO,
    group_rows,
    make_grid,
    shared_rows,
)
from bifusion_diag.reports.svg import Plot, drawing, log_axis


@pytest.fixture(scope="module")
def traces(baseline: Run, candidate: Run) -> list[Trace]:
    return [
        Trace(baseline, measure(baseline), "baseline", BASELINE),
        Trace(candidate, measure(candidate), "candidate", ACCENT),
    ]


@pytest.fixture(scope="module")
def plots(traces: list[Trace]) -> list[Plot]:
    drawn = [
        draw_timeline(traces),
        draw_heatmap(traces),
        draw_clip_ranges(traces[1], "clip1"),
        draw_projection(traces[1], "projection1"),
        draw_alpha(traces[1], "alpha1"),
        draw_terms(traces[1], "terms1"),
        draw_gradients(traces[1], "gradients1"),
        draw_updates(traces[1], "updates1"),
        draw_throughput(traces[1], "throughput1"),
    ]
    return [plot for plot in drawn if plot is not None]


def test_every_plot_is_drawn_and_well_formed(plots: list[Plot]) -> None:
    assert len(plots) == 9
    for plot in plots:
        root = ElementTree.fromstring(plot.svg)
        assert root.get("aria-label") == plot.alt
        assert any(element.tag.endswith("text") for element in root.iter()), f"{plot.name}: text is not text"


def test_ids_are_unique_in_the_page(plots: list[Plot]) -> None:
    ids = [identity for plot in plots for identity in re.findall(r'\bid="([^"]+)"', plot.svg)]
    assert len(ids) == len(set(ids))
    for plot in plots:
        for reference in re.findall(r"(?:url\(#|href=\"#)([^\")]+)", plot.svg):
            assert reference in ids


def test_every_theme_colour_is_a_variable(plots: list[Plot]) -> None:
    for plot in plots:
        colours = set(re.findall(r"#[0-9a-f]{6}\b", plot.svg))
        assert not colours & set(VARIABLES)
        assert not colours, f"{plot.name}: {colours} are the same in the dark theme"


def test_no_line_has_more_than_2000_vertices(writer: Callable[..., Run], tmp_path: Path) -> None:
    run = writer(tmp_path / "long.json", name="long", preset="long", steps=6000, fused=False)
    plot = draw_timeline([Trace(run, measure(run), "long", ACCENT)])
    longest = max(path.count("L") for path in re.findall(r' d="([^"]*)"', plot.svg))
    assert 1000 < longest <= 2000


def test_the_same_run_gives_the_same_svg(traces: list[Trace]) -> None:
    assert draw_timeline(traces).svg == draw_timeline(traces).svg


def test_a_dollar_in_a_name_is_a_dollar(traces: list[Trace]) -> None:
    named = [Trace(traces[0].run, traces[0].measures, r"$\frac{a}$ & <b>", BASELINE)]
    assert r"$\frac{a}$ &amp; &lt;b&gt;" in draw_timeline(named).svg


def test_the_four_looks_come_from_the_states(candidate: Run) -> None:
    grid = make_grid(candidate, 0, 599, shared_rows([candidate]))
    row = {name: grid.state[place] for place, name in enumerate(grid.names)}
    assert set(row["encoder.clip"]) == {FROZEN}
    assert set(row["encoder.global_head"]) == {NO_GRADIENT}
    assert row["encoder.gate"][0] == ZERO
    assert row["encoder.gate"][-1] == FINITE
    column = 141 * grid.state.shape[1] // 600
    assert row["pool"][column] == NONFINITE
    assert row["decoder.out_mask"][column] == FINITE
    assert np.isnan(grid.norm[grid.names.index("encoder.clip")]).all()


def test_the_cells_hold_the_largest_norm_of_their_steps(candidate: Run) -> None:
    grid = make_grid(candidate, 0, 599, shared_rows([candidate]))
    norm = candidate.all_series["grads/pool/param_norm"]
    column = 360 * grid.norm.shape[1] // 600
    inside = norm.steps * grid.norm.shape[1] // 600 == column
    assert grid.norm[grid.names.index("pool"), column] == norm.value[inside].max()


def test_many_modules_are_grouped_by_their_names() -> None:
    modules = [f"encoder.block{block}.{layer}" for block in range(30) for layer in range(5)]
    rows = set(group_rows(modules).values())
    assert {".".join(row.split(".")[:2]) for row in rows} == {f"encoder.block{block}" for block in range(30)}
    assert 30 < len(rows) <= 44  # some of the blocks are opened
    clip = [f"clip.block{block}.{layer}" for block in range(12) for layer in range(5)]
    assert {row for row in group_rows([*modules, *clip], closed=clip).values() if row.startswith("clip")} == {"clip"}
    assert group_rows(modules[:44]) == {module: module for module in modules[:44]}


def test_what_was_not_recorded_is_not_drawn(traces: list[Trace]) -> None:
    assert draw_alpha(traces[0], "a") is None
    assert draw_projection(traces[0], "p") is None
    assert draw_clip_ranges(traces[0], "c") is None
    assert draw_gradients(traces[0], "g") is None
    assert draw_updates(traces[0], "u") is None
    assert draw_throughput(traces[0], "t") is None


def test_the_largest_update_is_named(plots: list[Plot], candidate: Run) -> None:
    plot = next(plot for plot in plots if plot.name == "updates1")
    assert "Largest: 0.500 in pool." in plot.caption
    ratios = [candidate.all_series[name] for name in candidate.names("updates/")]
    assert f"Of {len(ratios)} modules" in plot.caption
    middle = np.median([np.median(series.value) for series in ratios])
    assert f"median {middle:.5f}" in plot.alt


def test_terms_that_fight_are_named(plots: list[Plot]) -> None:
    plot = next(plot for plot in plots if plot.name == "gradients1")
    assert "below 0 for 1 of 3 pairs of terms, smallest for semantic and clip_align (−0.3" in plot.caption
    texts = ["".join(item.itertext()) for item in ElementTree.fromstring(plot.svg).iter() if item.tag.endswith("text")]
    assert {"semantic", "instance", "clip_align", "/ clip_align"} <= set(texts)


def test_a_step_after_an_evaluation_does_not_flatten_the_others(plots: list[Plot]) -> None:
    plot = next(plot for plot in plots if plot.name == "throughput1")
    texts = ["".join(item.itertext()) for item in ElementTree.fromstring(plot.svg).iter() if item.tag.endswith("text")]
    seconds = [float(each) for each in texts if re.fullmatch(r"\d\.\d", each)]
    assert 1.0 <= max(seconds) <= 3.5  # of 61 s
    assert "Peak memory of the process: 2\u202f048 MiB." in plot.caption


def test_the_same_plots_of_a_reduced_record(writer: Callable[..., Run], tmp_path: Path) -> None:
    run = writer(tmp_path / "r.json", name="r", preset="bifusion", steps=12_000)
    assert not run.all_series["updates/pool/ratio"].exact
    trace = Trace(run, measure(run), "r", ACCENT)
    drawn = [draw_gradients(trace, "g"), draw_updates(trace, "u"), draw_throughput(trace, "t")]
    assert all(drawn)
    assert "Largest: 0.500 in pool." in drawn[1].caption  # type: ignore[union-attr]


def evaluated(run: Run, scale: float, labels: str = "ground truth (synthetic)") -> Run:
    """The run with both metrics every 100 of its 600 steps and at its last."""
    steps = np.array([*range(0, 600, 100), 599])
    gone = ~np.isin(run.steps, steps)
    columns = {name: np.where(gone, np.nan, scale * run.steps / 599) for name in ("eval/miou", "eval/ap50")}
    series = {name: Series.from_values(name, run.steps, values, gone) for name, values in columns.items()}
    header = replace(run.header, provenance={**run.provenance, "validation": {"kind": "test", "labels": labels}})
    return replace(run, header=header, all_series={**run.all_series, **series}, measures={})


def test_validation_curves_have_a_point_an_evaluation(baseline: Run, candidate: Run) -> None:
    runs = [evaluated(baseline, 0.25), evaluated(candidate, 0.5)]
    lines = [
        Trace(run, measure(run), name, colour)
        for run, name, colour in zip(runs, ("baseline", "candidate"), (BASELINE, ACCENT), strict=True)
    ]
    plot = draw_validation(lines)
    assert plot is not None
    steps = [0, 100, 200, 300, 400, 500, 599]
    assert plot.values["candidate mIoU"] == (steps, [float(f"{0.5 * step / 599:.4g}") for step in steps])
    assert set(plot.values) == {f"{name} {metric}" for name in ("baseline", "candidate") for metric in ("mIoU", "AP50")}
    assert "baseline mIoU 0.250; candidate mIoU 0.500; baseline AP50 0.250; candidate AP50 0.500" in plot.alt
    assert plot.title == "mIoU and AP50 on validation scenes"
    ElementTree.fromstring(plot.svg)
    pseudo = evaluated(candidate, 0.5, "geometric pseudo-labels (no ground truth)")
    named = draw_validation([Trace(pseudo, measure(pseudo), "candidate", ACCENT)])
    assert named is not None
    assert named.title.endswith("scenes, against geometric pseudo-labels (no ground truth)")
    assert "different scenes" not in plot.caption + named.caption
    mixed = draw_validation([lines[0], Trace(pseudo, measure(pseudo), "candidate", ACCENT)])
    assert mixed is not None
    assert mixed.title.endswith("scenes, candidate against geometric pseudo-labels (no ground truth)")
    assert "evaluated on different scenes" in mixed.caption


def test_small_validation_metrics_are_written_out(candidate: Run) -> None:
    run = evaluated(candidate, 8e-5)
    plot = draw_validation([Trace(run, measure(run), "candidate", ACCENT)])
    assert plot is not None
    texts = ["".join(item.itertext()) for item in ElementTree.fromstring(plot.svg).iter() if item.tag.endswith("text")]
    assert [each for each in texts if each.startswith("1e")] == []  # no power of ten above the axis, in the title's way
    assert any(each.endswith("·10⁻⁵") for each in texts)


def test_runs_without_evaluation_have_no_validation_plot(traces: list[Trace]) -> None:
    assert draw_validation(traces) is None


def test_the_page_shows_validation_where_there_is_some_and_says_where_there_is_none(
    baseline: Run, candidate: Run
) -> None:
    one, two = evaluated(baseline, 0.25), evaluated(candidate, 0.5)
    weights = {"text_features": "random", "initial_weights": {"file": "esam.pth", "kind": "ESAM", "parameters": 5}}
    two = replace(two, header=replace(two.header, provenance={**two.provenance, **weights}))
    page = render_comparison([compare_runs(one, two)], one, [two])
    assert "mIoU and AP50 on validation scenes" in page
    assert '<th scope="row">best AP50</th>' in page
    assert "baseline 0.25, both at step 599" in page
    assert "<span>validation</span> test, ground truth (synthetic)" in page
    assert "<span>text features</span> random" in page
    assert "<span>initial weights, bifusion-fragile</span> ESAM, esam.pth" in page  # the baseline began with its own
    assert "mIoU and AP on validation scenes (train with --evaluate-every)" not in page
    without = render_comparison([compare_runs(baseline, candidate)], baseline, [candidate])
    assert "mIoU and AP50 on validation scenes" not in without
    assert "Not measured: mIoU and AP on validation scenes (train with --evaluate-every)." in without


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.7, 1.8, ["0.8", "1", "1.2", "1.5"]), (3e-6, 2e-5, ["5·10⁻⁶", "10⁻⁵", "2·10⁻⁵"]), (0.5, 2e5, ["1", "10⁵"])],
)
def test_a_logarithmic_axis_has_readable_numbers(low: float, high: float, words: list[str]) -> None:
    with drawing(2) as figure:
        axes = figure.add_subplot()
        axes.plot([0, 1], [low, high])
        axes.set_ylim(low, high)
        axes.set_yscale("log")
        log_axis(axes.yaxis)
        figure.canvas.draw()
        inside = [
            label.get_text()
            for label, place in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)
            if low <= place <= high * 1.001
        ]
    assert inside == words if len(words) > 2 else set(words) <= set(inside)


def test_a_term_that_has_no_gradient_takes_no_place(candidate: Run) -> None:
    name = next(name for name in candidate.names("loss_gradients/") if name.endswith("/share"))
    term = name.split("/")[1]
    zero = Series.from_values(name, candidate.steps, np.zeros(len(candidate.steps)))
    without = replace(candidate, all_series={**candidate.all_series, name: zero})
    labels = []
    for run in (candidate, without):
        plot = draw_gradients(Trace(run, measure(run), "r", ACCENT), "g")
        assert plot is not None
        texts = [item for item in ElementTree.fromstring(plot.svg).iter() if item.tag.endswith("text")]
        labels.append(["".join(item.itertext()) for item in texts].count(term))  # pairs of terms name it too
    assert labels[1] == labels[0] - 1
    assert f"{term} 0" in plot.caption
