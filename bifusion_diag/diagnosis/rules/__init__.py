"""The rules: each looks for one thing in a record, and has a page in `pages/`."""

from bifusion_diag.diagnosis.rules.catalogue import RULES
from bifusion_diag.diagnosis.rules.pages import page_of, rule_ids

__all__ = ["RULES", "page_of", "rule_ids"]
