"""The page: what it says, what it escapes, how it is written."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bifusion_diag.diagnosis import assess_run, compare_runs
from bifusion_diag.errors import UserError
from bifusion_diag.record.schema import Event, Run
from bifusion_diag.reports import render_comparison, render_run, write_comparison, write_run
from bifusion_diag.reports.page import comparison_page
from bifusion_diag.reports.palette import ACCENT
from bifusion_diag.reports.plots import Trace, draw_timeline

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


@pytest.fixture
def page(comparison_html: str) -> str:
    return comparison_html


def hostile(run: Run) -> Run:
    """The run with markup wherever a user's text goes."""
    modules = [dataclasses.replace(module, name=module.name) for module in run.modules]
    header = dataclasses.replace(
        run.header,
        name=HOSTILE,
        preset=HOSTILE,
        command=HOSTILE,
        settings={**run.settings, HOSTILE: HOSTILE},
        provenance={**run.provenance, "data": HOSTILE, "labels": HOSTILE, "clip_weights": HOSTILE},
        environment={HOSTILE: HOSTILE},
        modules=modules,
    )
    series = dict(run.all_series)
    term = HOSTILE.replace("/", "")
    for kind in ("raw", "weighted"):
        name = f"loss/{term}/{kind}"
        series[name] = dataclasses.replace(series[f"loss/instance/{kind}"], name=name)
    for kind in ("state", "param_norm"):
        name = f"grads/{term}/{kind}"
        series[name] = dataclasses.replace(series[f"grads/pool/{kind}"], name=name)
    events = [*run.events, Event(50, "stage", HOSTILE, {"name": HOSTILE}), Event(141, "x", "", {"scenes": [HOSTILE]})]
    return dataclasses.replace(
        run, header=header, all_series=series, events=events, measures={}, status="failed", error=HOSTILE
    )


def test_the_first_screen_answers(page: str) -> None:
    screen = page[: page.index("<h2>Timeline</h2>")]
    assert (
        "bifusion-fragile is less stable than baseline-5cm: 10 bad steps in 600 (baseline 0), first at step 141."
        in screen
    )
    assert "--set model.projection.sanitize=strict" in screen
    assert "<span>CLIP weights</span> random" in screen
    assert "<span>labels</span> ground truth (synthetic)" in screen


def test_sections_come_in_the_reader_s_order(page: str) -> None:
    titles = ("Timeline", "Findings", "Where: ", "Why: ", "Criteria", "Cost: ", "What differed", "To reproduce")
    places = [page.index(f"<h2>{title}") for title in titles]
    assert places == sorted(places)


def test_it_is_self_contained_and_small(page: str) -> None:
    assert len(page.encode()) < 3_000_000
    assert "default-src 'none'" in page
    without_namespaces = page.replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org/1999/xlink", "")
    assert "http://" not in without_namespaces
    assert "https://" not in without_namespaces


def test_hostile_text_stays_text(baseline: Run, candidate: Run) -> None:
    bad = hostile(candidate)
    for html in (
        render_comparison([compare_runs(baseline, bad)], baseline, [bad]),
        render_comparison([compare_runs(bad, baseline)], bad, [baseline]),
        render_run(assess_run(bad), bad),
    ):
        assert "<script>alert" not in html
        assert "<img" not in html
        assert "&lt;script&gt;alert(1)" in html
        assert html.count("<script") == 2  # the values and the program


def test_what_the_probes_measure_is_shown_and_what_no_run_has_is_said(page: str, baseline: Run) -> None:
    for words in ("Which term moves the shared weights, bifusion-fragile", "How far weights move in a step, ‖Δw‖ ÷ ‖w‖",
                  "Where the time goes, bifusion-fragile", "cosine of gradients, semantic/clip_align",
                  '<th scope="col" class="n">update ratio</th>'):  # fmt: skip
        assert words in page
    assert "Not measured: no run recorded" not in page[page.index("Why: ") : page.index("Criteria of")]
    alone = render_run(assess_run(baseline), baseline)
    for probe in ("loss_gradients", "updates", "throughput"):
        assert f"(probe {probe})" in alone


def test_not_measured_is_never_a_pass(baseline: Run) -> None:
    html = render_run(assess_run(baseline), baseline)
    assert "no gate was recorded" in html
    assert '<span class="not-measured">not measured</span>' in html


def test_a_run_without_probes_has_a_page(writer: Callable[..., Run], baseline: Run) -> None:
    bare = dataclasses.replace(
        baseline,
        header=dataclasses.replace(baseline.header, modules=[], settings={}, provenance={}, environment={}),
        all_series={"loss/total": baseline.all_series["loss/total"]},
    )
    html = render_run(assess_run(bare), bare)
    assert "train/grad_norm was not recorded" in html
    assert "no run was probed with <code>grads</code>" in html


def test_many_series_render_in_time(writer: Callable[..., Run], tmp_path: Path, baseline: Run) -> None:
    run = writer(tmp_path / "big.json", name="big", preset="big", extra_modules=320)
    assert len(run.all_series) > 1000
    html = render_comparison([compare_runs(baseline, run)], baseline, [run])
    assert len(html.encode()) < 3_000_000


def test_several_candidates_share_a_page(baseline: Run, candidate: Run) -> None:
    comparisons = [compare_runs(baseline, baseline), compare_runs(baseline, candidate)]
    html = render_comparison(comparisons, baseline, [baseline, candidate])
    assert html.count("<h1>") == 2
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert "ratio, bifusion-fragile" in html


def test_page_and_data_lie_side_by_side(tmp_path: Path, baseline: Run, candidate: Run) -> None:
    comparison = compare_runs(baseline, candidate)
    written = write_comparison([comparison], baseline, [candidate], html=tmp_path / "new" / "a.html")
    assert written == [tmp_path / "new" / "a.html", tmp_path / "new" / "a.html.json"]
    assert comparison.verdict.sentence in written[0].read_text(encoding="utf-8")
    stored = json.loads(written[1].read_text(encoding="utf-8"))
    assert stored["kind"] == "bifusion-diag comparison"
    assert stored["comparisons"][0]["verdict"]["sentence"] == comparison.verdict.sentence
    assert sorted((tmp_path / "new").iterdir()) == written


def test_only_what_was_asked_for_is_written(tmp_path: Path, baseline: Run) -> None:
    assessment = assess_run(baseline)
    assert write_run(assessment, baseline) == []
    assert write_run(assessment, baseline, json=tmp_path / "a.json") == [tmp_path / "a.json"]
    stored = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert stored["verdict"]["state"] == "stable"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_an_unwritable_place_is_the_user_s_error(tmp_path: Path, baseline: Run) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "folder.html").mkdir()
    assessment = assess_run(baseline)
    with pytest.raises(UserError, match=r"cannot be written"):
        write_run(assessment, baseline, html=tmp_path / "file" / "report.html")
    with pytest.raises(UserError, match="it is a folder"):
        write_run(assessment, baseline, html=tmp_path / "folder.html")
    with pytest.raises(UserError, match="two different files"):
        write_run(assessment, baseline, html=tmp_path / "a", json=tmp_path / "a")


def test_definitions_units_and_term_colours(baseline: Run, candidate: Run) -> None:
    page = comparison_page([compare_runs(baseline, candidate)], baseline, [candidate])
    for group in page.measures:
        said = [row.definition for row in group.rows]
        assert said[0]
        assert not any(mine and mine == before for before, mine in pairwise(said))
    html = render_comparison([compare_runs(baseline, candidate)], baseline, [candidate])
    assert re.search(r">fail</span>: 3 steps", html)
    colours = {plot.name: plot.svg for plot in page.why if plot.name.startswith("terms")}
    assert set(colours) == {"terms0", "terms1"}
    for term in ("semantic", "instance"):
        found = {re.search(rf'fill: ([^;"]+)[^>]*>{term}<', svg).group(1) for svg in colours.values()}  # type: ignore[union-attr]
        assert len(found) == 1


def test_the_rug_counts_all_bad_steps(writer: Callable[..., Run], tmp_path: Path) -> None:
    run = writer(tmp_path / "r.json", name="r", preset="bifusion", steps=1600, nan_steps=tuple(range(100, 1500)))
    assessment = assess_run(run)
    plot = draw_timeline([Trace(run, assessment.measures, "r", ACCENT)])
    assert "1\u202f400 bad steps" in plot.svg
    assert "1\u202f400 bad steps" in plot.alt


def test_findings_of_the_baseline_are_told_too(baseline: Run, candidate: Run) -> None:
    html = render_comparison([compare_runs(candidate, baseline)], candidate, [baseline])
    told = html[html.index("In the baseline bifusion-fragile") : html.index("Where: gradients by module")]
    assert "error: Loss term instance is non-finite, first at step 233." in told
    assert "In the baseline" not in render_run(assess_run(baseline), baseline)


def test_the_judged_run_is_shown_and_its_repeats_are_folded(page: str, baseline: Run, candidate: Run) -> None:
    shown = comparison_page([compare_runs(baseline, candidate)], baseline, [candidate])
    for kind in ("terms", "throughput"):
        plots = [plot for plot in shown.plots if plot.name.startswith(kind)]
        assert [plot.folded for plot in plots] == [False] + [True] * (len(plots) - 1)
        assert candidate.header.name in plots[0].title
    assert [plot.folded for plot in shown.heatmaps] == [False] + [True] * (len(shown.heatmaps) - 1)
    assert len(shown.heatmaps) > 1
    assert page.count('<details class="folded">') == sum(plot.folded for plot in shown.plots)


def test_why_a_scene_is_missing_is_told_of_the_judged_run(baseline: Run, candidate: Run) -> None:
    plain = dataclasses.replace(baseline.header, settings={**baseline.settings, "model": {"fusion": "none"}})
    without = dataclasses.replace(baseline, header=plain)
    shown = comparison_page([compare_runs(without, candidate)], without, [candidate])
    assert [gap for gap in shown.why_gaps if "fusion 'none'" in gap] == []
    assert [gap for gap in shown.why_gaps if "α on a scene" in gap] != []


def test_text_that_reorders_or_never_ends_does_neither(baseline: Run, candidate: Run) -> None:
    text = "begin \u202eevil\u2066\x1b[31m\x00 end" + "x" * 10_000
    incident = {
        "kind": "nonfinite-loss", "mechanism": text, "title": text, "explanation": text, "terms": [text],
        "samples": [{"name": text, "why": text}], "cause": {"module": text, "direction": "loss"},
    }  # fmt: skip
    events = [*candidate.events, Event(141, "non-finite", text, {"scenes": [text], "incident": incident})]
    bad = dataclasses.replace(candidate, events=events)
    html = render_comparison([compare_runs(baseline, bad)], baseline, [bad])
    assert re.findall("[\x00-\x08\x0e-\x1f\u202a-\u202e\u2066-\u2069]", html) == []
    for tag in ("h1", "h3", "summary", "a", "code", "figcaption"):
        for title in re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, flags=re.DOTALL):
            assert len(title) < 3000


def test_the_data_hold_what_the_plots_draw(tmp_path: Path, baseline: Run, candidate: Run) -> None:
    comparison = compare_runs(baseline, candidate)
    _, beside = write_comparison([comparison], baseline, [candidate], html=tmp_path / "page.html")
    plots = {plot["name"]: plot for plot in json.loads(beside.read_text("utf-8"))["shown"]["plots"]}
    drawn = plots["projection1"]["numbers"]["projection/valid_share"]
    assert len(drawn["steps"]) <= 400
    truth = candidate.all_series["projection/valid_share"]
    assert min(drawn["values"]) == truth.value.min()
    assert drawn["steps"][drawn["values"].index(min(drawn["values"]))] == truth.steps[truth.value.argmin()]
    losses = plots["terms1"]["numbers"]["loss/instance/raw"]
    assert max(value for value in losses["values"] if value is not None) == pytest.approx(
        float(np.nanmax(candidate.all_series["loss/instance/raw"].value))
    )


def test_the_incident_of_the_verdict_s_remedy_is_open(baseline: Run, candidate: Run) -> None:
    shown = comparison_page([compare_runs(baseline, candidate)], baseline, [candidate])
    (run,) = shown.judged
    other, one = (dataclasses.replace(run.findings[0], incident=name) for name in ("incident-1-2", "incident-1-31"))
    one = dataclasses.replace(one, finding=dataclasses.replace(one.finding, remedy={"a.key": "x"}))
    verdict = dataclasses.replace(run.verdict, remedy={"a.key": "x"})
    run = dataclasses.replace(run, findings=[other, one], verdict=verdict)
    assert dataclasses.replace(shown, judged=[run]).opened == "incident-1-31"
