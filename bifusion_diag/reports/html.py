"""The HTML report: one self-contained page that asks the network for nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, pass_context
from markupsafe import Markup, escape

from bifusion_diag.diagnosis.assess import RunAssessment
from bifusion_diag.diagnosis.comparing.groups import GroupComparison
from bifusion_diag.diagnosis.comparing.pair import RunComparison
from bifusion_diag.record.schema import Run
from bifusion_diag.reports.budget import BUDGETS, MAX_BYTES, Budget, cut
from bifusion_diag.reports.incidents import assignment
from bifusion_diag.reports.language import language, tr
from bifusion_diag.reports.numbers import ratio_text, reading_text, text
from bifusion_diag.reports.page import Page, comparison_page, groups_page, run_page
from bifusion_diag.reports.palette import css_variables
from bifusion_diag.reports.svg import Plot

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


NOT_DRAWN = Plot("", "", "", "", "")
#: What a page gives up in turn where it does not fit in the smallest budget: its parts by their title, and what is
#: then in their place.
PARTS: dict[str, dict[str, Any]] = {
    "Why: losses, updates, features, projection, gate": {"why": []},
    "Where: gradients by module": {"heatmaps": [], "modules": []},
    "Cost: time and memory": {"cost": ([], [])},
    "Incidents: bad steps taken apart": {"incidents": []},
    "Measures": {"measures": [], "measured": ()},
    "Settings": {"settings": []},
    "What makes up the difference": {"suspicions": []},
    "To reproduce": {"reproduce": []},
    "Criteria of the documents": {"criteria": []},
    "Timeline": {"timeline": NOT_DRAWN, "validation": None},
}
KEPT = 20  # runs, and lines about them, of a page that holds no more than verdicts
#: Characters that reorder or hide the text around them; names are the user's.
_UNSEEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


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
        if _fits(html):
            return html, page
    return _without_parts(page), page


def _without_parts(page: Page) -> str:
    """The page without as many of its parts as it takes to fit, the heaviest first; the verdict always stays."""
    left_out: list[str] = []
    for title, nothing in PARTS.items():
        left_out.append(tr(title))
        page = replace(page, **nothing)
        said = tr(
            "Left out, as this page would be too large: {parts}. The JSON beside this page has all of it.",
            parts=", ".join(left_out),
        )
        html = render(replace(page, limits=[*page.limits[:KEPT], said]))
        if _fits(html):
            return html
    shown = [replace(run, findings=[], unmeasured=()) for run in page.judged[:KEPT]]
    page = replace(page, title=cut(page.title, KEPT * 10), judged=shown, facts=page.facts[:KEPT], groups=None)
    return render(replace(page, names=page.names[:1], limits=[said]))


def _fits(html: str) -> bool:
    return len(html.encode("utf-8")) <= MAX_BYTES


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
    html = template.render(page=page, css=css, js=js, data=_script_json(data), language=language())
    return _UNSEEN.sub("\ufffd", html)


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
    environment.filters["short"] = _short
    return environment


@pass_context
def _translated(_context: object, said: str, **values: Any) -> str:
    """`tr`; given the context, Jinja does not work out constants once, in the language of the first page."""
    return tr(said, **values)


def _short(said: str, length: int = 300) -> str:
    """What records and capsules say may be of any length."""
    return cut(said, length)


def _marked(said: str) -> Markup:
    """A text with `code` between backquotes, as docs write it; everything else is escaped."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(said))))
