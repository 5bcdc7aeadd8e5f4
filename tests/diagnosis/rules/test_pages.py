"""Every rule has a page that says everything, and every bound is named on one."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from bifusion_diag.diagnosis.rules import RULES, page_of, rule_ids
from bifusion_diag.diagnosis.rules.pages import SECTIONS
from bifusion_diag.diagnosis.thresholds import Thresholds
from bifusion_diag.errors import UserError
from bifusion_diag.probes import PROBES

ROOT = Path(__file__).resolve().parents[3]
REPEATED = "Written anew by `python scripts/rules_index.py`."


def test_every_rule_of_the_catalogue_has_a_page_and_an_id_of_its_own() -> None:
    ids = [rule.id for rule in RULES]
    assert len(ids) == len(set(ids))
    assert set(ids) <= set(rule_ids())


@pytest.mark.parametrize("rule", rule_ids())
def test_a_page_has_every_section_in_order_and_none_is_empty(rule: str) -> None:
    title, lead, *rest = page_of(rule).split("\n\n")
    assert title == f"# {rule}"
    assert lead.endswith(".")
    parts = re.split(r"^## (.+)\n", "\n\n".join(rest), flags=re.MULTILINE)
    assert tuple(parts[1::2]) == SECTIONS
    assert all(text.strip() for text in parts[2::2])


def test_the_page_of_an_incident_is_that_of_all_incidents_and_a_typo_is_told() -> None:
    assert page_of("incident-masked-softmax-row") == page_of("incident")
    with pytest.raises(UserError, match="dead-units"):
        page_of("dead-unit")


@pytest.mark.parametrize("name", list(Thresholds.model_fields))
def test_every_bound_is_named_on_a_page_and_says_why(name: str) -> None:
    assert any(f"`{name}`" in page_of(rule) for rule in rule_ids())
    assert len(Thresholds.model_fields[name].description or "") > 10


@pytest.mark.parametrize("rule", rule_ids())
def test_the_number_that_a_page_gives_a_bound_is_its_default(rule: str) -> None:
    section = page_of(rule).split("## Thresholds\n")[1].split("\n## ")[0]
    stated = re.findall(r"`(\w+)`\s+\(([\d.,e-]+)\)", section)
    defaults = Thresholds().model_dump()
    assert all(float(number.replace(",", "")) == defaults[name] for name, number in stated)


def test_rules_need_probes_that_exist() -> None:
    assert {name for rule in RULES for name in rule.needs} <= set(PROBES)


def test_the_index_in_the_docs_lists_every_page() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "rules_index.py"))
    inside = (ROOT / "docs" / "rules.md").read_text().split(script["BEGIN"])[1].split(script["END"])[0]
    assert inside == script["table"](), REPEATED
    assert set(re.findall(r"^\| \[([\w-]+)\]", inside, re.MULTILINE)) == set(rule_ids())
