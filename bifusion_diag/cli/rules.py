"""``bifusion-diag rules``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bifusion_diag.errors import UserError


def rules(
    rule: Annotated[str | None, typer.Argument(help="Show the page of this rule.")] = None,
    table: Annotated[
        bool, typer.Option("--thresholds", help="List the bounds of the rules, and why each is what it is.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write rules, pages and bounds as JSON.")] = None,
) -> None:
    """List the rules that look for what is wrong, or show one rule's page."""
    from bifusion_diag.diagnosis.rules import page_of

    if rule is not None and (table or json is not None):
        raise UserError("give either a rule, or --thresholds, or --json")
    console = Console()
    if rule is not None:
        from rich.markdown import Markdown

        console.print(Markdown(page_of(rule)))
        return
    if json is not None:
        _write(json)
        console.print(f"data: {json}", soft_wrap=True, highlight=False, markup=False)
    if table:
        _print_thresholds(console)
    elif json is None:
        _print_rules(console)


def _print_rules(console: Console) -> None:
    from bifusion_diag.diagnosis.rules import RULES, rule_ids

    lines = Table(box=None, pad_edge=False)
    for title in ("rule", "what it finds", "probes it needs"):
        lines.add_column(title, style="bold" if title == "rule" else "", no_wrap=title == "rule")
    for rule in RULES:
        lines.add_row(Text(rule.id), Text(rule.title), Text(", ".join(rule.needs) or "—"))
    known = {rule.id for rule in RULES}
    for name in rule_ids():
        if name not in known:
            lines.add_row(Text(name), Text(_lead(name)), Text("— (found by bifusion-diag audit)"))
    console.print(lines)
    console.print(Text("A rule's page: bifusion-diag rules ID", style="dim"))


def _print_thresholds(console: Console) -> None:
    from bifusion_diag.diagnosis.thresholds import Thresholds

    lines = Table(box=None, pad_edge=False)
    lines.add_column("threshold", style="bold", no_wrap=True)
    lines.add_column("value", justify="right", no_wrap=True)
    lines.add_column("why")
    for name, field in Thresholds.model_fields.items():
        lines.add_row(Text(name), Text(f"{field.default:g}"), Text(field.description or ""))
    console.print(lines)
    console.print(Text("Others: --threshold NAME=NUMBER, or --thresholds FILE.yaml with a line for each", style="dim"))


def _lead(rule: str) -> str:
    """The first sentence of a page."""
    from bifusion_diag.diagnosis.rules import page_of

    return page_of(rule).split("\n\n")[1].replace("\n", " ")


def _write(path: Path) -> None:

    from bifusion_diag.diagnosis.rules import RULES, page_of, rule_ids
    from bifusion_diag.diagnosis.thresholds import Thresholds
    from bifusion_diag.reports.files import write_json

    known = {rule.id: rule for rule in RULES}
    pages = [
        {
            "id": name,
            "title": known[name].title if name in known else _lead(name),
            "needs": list(known[name].needs) if name in known else [],
            "page": page_of(name),
        }
        for name in rule_ids()
    ]
    bounds = [
        {"name": name, "value": field.default, "why": field.description}
        for name, field in Thresholds.model_fields.items()
    ]
    write_json(path, {"rules": pages, "thresholds": bounds})
