"""The audit in the terminal: below 60 lines, the worst first. Everything else is in the JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from shlex import quote
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from bifusion_diag.diagnosis.findings import SEVERITIES, Finding
from bifusion_diag.diagnosis.quantity import Quantity
from bifusion_diag.experiments.audit.result import Audit, Cell, Table
from bifusion_diag.reports.language import tr
from bifusion_diag.reports.numbers import reading_text
from bifusion_diag.reports.numbers import text as number_text

_FINDINGS = 8  # shown; the rest is in the JSON
_EVIDENCE = 2
_TABLES = (  # (section, table), in this order
    ("flow", 0),
    ("schedule", 0),
    ("balance", 0),
    ("temperature", 0),
)
_ROWS = 10
_ROOMY = 8  # columns; more of them stand closer, so that no number is cut at 80 characters
_NARROW = {"spatial_consistency": "spatial", "clip_align": "CLIP", "semantic": "sem", "instance": "inst"}
_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
_TIGHT: dict[str, Any] = {"soft_wrap": True, "highlight": False}


def print_audit(console: Console, audit: Audit) -> None:
    """Print verdict, findings and the tables that a reader checks first."""
    counts = {severity: audit.count(severity) for severity in SEVERITIES}
    style = "bold red" if counts["error"] else "bold yellow" if counts["warning"] else "bold green"
    verdict = tr(
        "errors: {errors}, warnings: {warnings}, notes: {notes}",
        errors=counts["error"],
        warnings=counts["warning"],
        notes=counts["note"],
    )
    about = tr(
        "{preset} ({scale}), {scenes} scenes in a batch, {looked} scenes looked at, {seconds:.0f} s",
        preset=audit.preset,
        scale=audit.scale,
        scenes=len(audit.batch),
        looked=_looked_at(audit),
        seconds=audit.seconds,
    )
    console.print(Text.assemble((verdict, style), "  ", (about, "dim")), **_TIGHT)
    for finding in audit.findings[:_FINDINGS]:
        _print_finding(console, finding)
    if len(audit.findings) > _FINDINGS:
        more = tr("and {n} more findings: --json FILE has them all", n=len(audit.findings) - _FINDINGS)
        console.print(Text(more, style="dim"), **_TIGHT)
    for name, place in _TABLES:
        tables = audit.section(name).tables
        if place < len(tables) and tables[place].shown:
            _print_table(console, tables[place])
    for section in audit.sections:
        if section.not_measured is not None:
            line = tr("{title}: not measured, {reason}", title=section.title, reason=section.not_measured)
            console.print(Text(line, style="dim"), **_TIGHT)


def _looked_at(audit: Audit) -> str:
    found = [one for one in audit.section("data").numbers if one.key == "data/scenes"]
    return reading_text(found[0].reading) if found else "0"


def _print_finding(console: Console, finding: Finding) -> None:
    """Two lines: what and how much, then what to change."""
    words = Text.assemble((tr(finding.severity), _STYLES[finding.severity]), "  ", (tr(finding.title), "bold"))
    words.append(f"  ({finding.rule})", style="dim")
    console.print(words, **_TIGHT)
    parts = [
        f"{tr(one.label)}: {reading_text(one.reading)}"
        for one in finding.evidence[:_EVIDENCE]
        if isinstance(one.reading, Quantity)
    ]
    change = "" if finding.remedy is None else patch(finding.remedy)
    line = " · ".join(parts)
    console.print(Text.assemble("    ", (line, "dim"), "  " if change and line else "", (change, "cyan")), **_TIGHT)


def patch(remedy: Mapping[str, Any]) -> str:
    """A remedy as options of `bifusion-diag train`; what the shell would take apart is quoted."""
    return " ".join(
        "--set " + quote(f"{key}={json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value}")
        for key, value in remedy.items()
    )


def _print_table(console: Console, table: Table) -> None:
    columns = _without_empty(table)
    gap = 2 if len(columns) <= _ROOMY else 1
    shown = RichTable(box=None, pad_edge=False, padding=(0, gap, 0, 0))
    for place in columns:
        justify = "left" if all(isinstance(row[place], str | None) for row in table.rows) else "right"
        shown.add_column(Text(_short(tr(table.columns[place]))), justify=justify, no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]
    for row in table.rows[:_ROWS]:
        shown.add_row(*(Text(_cell(row[place])) for place in columns))
    console.print(Text(tr(table.title), style="bold"), **_TIGHT)  # a table's own title is cut to the table's width
    console.print(shown)


def _without_empty(table: Table) -> list[int]:
    """Columns that say something in some row."""
    return [
        place
        for place in range(len(table.columns))
        if place == 0 or any(row[place] not in (None, 0, 0.0, "–") for row in table.rows)
    ]


def _short(name: str) -> str:
    """Names of terms, narrow enough for a column."""
    return _NARROW.get(name, name.removeprefix("instance_"))


def _cell(value: Cell) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return tr(value.removeprefix("encoder."))
    return number_text(float(value), whole=isinstance(value, int))
