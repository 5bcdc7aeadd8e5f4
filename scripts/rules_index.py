"""Writes the table of rules in docs/rules.md anew, from the catalogue and the pages: python scripts/rules_index.py."""

from __future__ import annotations

from pathlib import Path

from bifusion_diag.diagnosis.rules import RULES, page_of, rule_ids

DOC = Path(__file__).resolve().parents[1] / "docs" / "rules.md"
BEGIN, END = "<!-- rules -->\n", "<!-- end of rules -->\n"
PAGES = "../bifusion_diag/diagnosis/rules/pages"


def table() -> str:
    """Every page: the rules in the order of the catalogue, then what only the audit finds."""
    needs = {rule.id: ", ".join(rule.needs) or "—" for rule in RULES}
    names = [*needs, *(name for name in rule_ids() if name not in needs)]
    lines = ["| rule | what it finds | probes it needs |", "|---|---|---|"]
    for name in names:
        lead = page_of(name).split("\n\n")[1].replace("\n", " ").replace("|", "\\|")
        lines.append(f"| [{name}]({PAGES}/{name}.md) | {lead} | {needs.get(name, '`bifusion-diag audit`')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Replace what stands between the marks."""
    text = DOC.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    DOC.write_text(before + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
