"""The HTML report: one self-contained page that asks the network for nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, pass_context
from markupsafe import Markup, escape

from bifusion_diag.diagnosis.assess import RunAssessment
from bifusion_diag.diagnosis.comparing.groups import GroupComparison
from bifusion_diag.diagnosis.comparing.pair import RunComparison
from bifusion_diag.record.schema import Run
from bifusion_diag.reports.budget import BUDGETS, MAX_BYTES, Budget
from bifusion_diag.reports.incidents import assignment
from bifusion_diag.reports.language import language, tr
from bifusion_diag.reports.numbers import ratio_text, reading_text, text
from bifusion_diag.reports.page import Page, comparison_page, groups_page, run_page
from bifusion_diag.reports.palette import css_variables

#: What the page's program says.
WORDS = {
    "copy": "Copy",
    "copied": "Copied",
    "step": "step {n}",
    "nonfinite": "non-finite",
    "reset": "Whole run",
    "zoomed": "steps {first} to {last}",
    "search": "Search modules",
    "order": "Sort rows",
    "execution": "in execution order",
    "norm": "by size",
    "growth": "by growth",
    "bad": "by non-finite steps",
    "sortable": "Sort by this column",
}


def render_comparison(
    comparisons: Sequence[RunComparison], baseline: Run, candidates: Sequence[Run], sources: Sequence[str] = ()
) -> str:
    """The page of a baseline and of the candidates compared with it, in the same order, as HTML."""
    return fitted(lambda budget: comparison_page(comparisons, baseline, candidates, sources=sources, budget=budget))[0]


def render_run(assessment: RunAssessment, run: Run, source: str = "") -> str:
    """The page of one run, as HTML."""
    return fitted(lambda budget: run_page(assessment, run, source=source, budget=budget))[0]


def render_groups(
    group: GroupComparison, baselines: Sequence[Run], candidates: Sequence[Run], sources: Sequence[str] = ()
) -> str:
    """The page of two sides of several runs each, as HTML."""
    return fitted(lambda budget: groups_page(group, baselines, candidates, sources=sources, budget=budget))[0]


def fitted(build: Callable[[Budget], Page]) -> tuple[str, Page]:
    """The page in the largest budget in which it is not too large, and what it shows."""
    for budget in BUDGETS:
        page = build(budget)
        html = render(page)
        if len(html.encode("utf-8")) <= MAX_BYTES:
            break
    return html, page


def render(page: Page) -> str:
    """The page as HTML, in the language that is spoken."""
    environment = _environment()
    css = environment.get_template("style.css.j2").render(light=css_variables("light"), dark=css_variables("dark"))
    js = "\n".join(environment.get_template(name).render() for name in ("time.js", "tables.js"))
    data = {
        "words": {key: tr(words) for key, words in WORDS.items()},
        "values": {label: line for plot in page.plots for label, line in plot.values.items()},
        "zoom": {plot.name: plot.zoom for plot in page.plots if plot.zoom is not None},
        "rows": {plot.name: plot.rows for plot in page.plots if plot.rows is not None},
    }
    template = environment.get_template("report.html.j2")
    return template.render(page=page, css=css, js=js, data=_script_json(data), language=language())


def _script_json(data: Any) -> str:
    """JSON that ends no script element, whatever texts it holds."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("bifusion_diag.reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["reading"] = reading_text
    environment.filters["ratio"] = ratio_text
    environment.filters["number"] = text
    environment.filters["assignment"] = assignment
    environment.filters["tr"] = _translated
    environment.filters["marked"] = _marked
    return environment


@pass_context
def _translated(_context: object, said: str, **values: Any) -> str:
    """`tr`; given the context, Jinja does not work out constants once, in the language of the first page."""
    return tr(said, **values)


def _marked(said: str) -> Markup:
    """A text with `code` between backquotes, as docs write it; everything else is escaped."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(said))))
