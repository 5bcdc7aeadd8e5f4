"""The HTML report: one self-contained page that asks the network for nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from bifusion_diag.diagnosis.compare import RunAssessment, RunComparison
from bifusion_diag.record.schema import Run
from bifusion_diag.reports.incidents import assignment
from bifusion_diag.reports.numbers import ratio_text, reading_text
from bifusion_diag.reports.page import Page, comparison_page, run_page
from bifusion_diag.reports.palette import css_variables


def render_comparison(comparisons: Sequence[RunComparison], baseline: Run, candidates: Sequence[Run]) -> str:
    """The page of a baseline and of the candidates compared with it, in the same order, as HTML."""
    return _render(comparison_page(comparisons, baseline, candidates))


def render_run(assessment: RunAssessment, run: Run) -> str:
    """The page of one run, as HTML."""
    return _render(run_page(assessment, run))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("bifusion_diag.reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["reading"] = reading_text
    environment.filters["ratio"] = ratio_text
    environment.filters["assignment"] = assignment
    return environment


def _render(page: Page) -> str:
    environment = _environment()
    css = environment.get_template("style.css.j2").render(light=css_variables("light"), dark=css_variables("dark"))
    js = environment.get_template("report.js").render()
    values = json.dumps(page.timeline.values, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return environment.get_template("report.html.j2").render(page=page, css=css, js=js, values=values)
