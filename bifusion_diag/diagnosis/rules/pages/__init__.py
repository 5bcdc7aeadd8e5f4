"""One page a rule, in Markdown: see `SECTIONS`."""

from __future__ import annotations

from importlib import resources

from bifusion_diag.diagnosis.rules.incidents import PREFIX
from bifusion_diag.errors import UserError, near_matches

#: Of every page, in this order.
SECTIONS = ("Detects", "Mechanism", "Evidence", "Remedy", "Known false alarms", "Thresholds", "Reference")
_SUFFIX = ".md"


def rule_ids() -> tuple[str, ...]:
    """Every id that has a page: of rules of records and of checks of the audit."""
    files = resources.files(__package__).iterdir()
    return tuple(sorted(file.name[: -len(_SUFFIX)] for file in files if file.name.endswith(_SUFFIX)))


def page_of(rule: str) -> str:
    """The page of a rule; findings of incidents, ``incident-<mechanism>``, share one.

    Raises:
        UserError: there is no such rule.
    """
    known = rule_ids()
    name = PREFIX.rstrip("-") if rule.startswith(PREFIX) else rule
    if name not in known:
        raise UserError(f"there is no rule {rule!r}.{near_matches(rule, known)} `bifusion-diag rules` lists them.")
    return resources.files(__package__).joinpath(name + _SUFFIX).read_text(encoding="utf-8")
