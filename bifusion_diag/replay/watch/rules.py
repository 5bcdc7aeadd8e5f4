"""Rules of the user's: when a step is bad besides what the detector knows."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from bifusion_diag.errors import UserError
from bifusion_diag.replay.watch.vitals import Vitals

#: What is wrong with a step, in words; None: nothing.
Rule: TypeAlias = Callable[[Vitals], str | None]

EXAMPLE = "'loss/mask > 10'"
SERIES = (
    "loss/<term>, loss/<term>/weighted, loss/total, train/grad_norm, train/lr, grads/<module>/param_norm, "
    "gate/<module>/mean (or share_lt_0.05, share_gt_0.95, nonfinite), input/<field>/absmax"
)
_OPERATORS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
_RULE = re.compile(r"\s*([^\s<>][^<>]*?)\s*(>=|<=|>|<)\s*(\S+)\s*")
_GATE = {"mean": "mean", "share_lt_0.05": "low", "share_gt_0.95": "high", "nonfinite": "bad"}


def make_rules(rules: Iterable[str | Rule]) -> tuple[Rule, ...]:
    """Rules from texts such as "loss/mask > 10", named as the record's series are; functions stay as they are.

    A comparison with a number that is not there, or is NaN, is not true.

    Raises:
        UserError: a text that is no comparison of a known series with a number.
    """
    if isinstance(rules, str):
        rules = (rules,)
    return tuple(rule if callable(rule) else _parse(rule) for rule in rules)


def _parse(text: str) -> Rule:
    found = _RULE.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise UserError(f"the rule {text!r} is no comparison; write one like {EXAMPLE}, with >, >=, < or <=")
    series, sign, number = found.groups()
    try:
        limit = float(number)
    except ValueError:
        raise UserError(f"the rule {text!r}: {number!r} is no number; write a rule like {EXAMPLE}") from None
    if limit != limit:
        raise UserError(f"the rule {text!r}: nothing is above or below NaN; non-finite steps are found without a rule")
    values, compare = _reader(series, text), _OPERATORS[sign]

    def rule(vitals: Vitals) -> str | None:
        value = next((value for value in values(vitals) if value is not None and compare(value, limit)), None)
        return None if value is None else f"{series} is {value:.4g}: the rule {series} {sign} {limit:g} holds"

    return rule


def _reader(series: str, text: str) -> Callable[[Vitals], Sequence[float | None]]:
    """What reads a series: all the numbers that its name means."""
    first, _, rest = series.partition("/")
    name, _, key = rest.rpartition("/")
    if series == "train/grad_norm":
        return lambda v: [v.grad_norm]
    if series == "train/lr":
        return lambda v: list(v.rates.values())[:1]
    if series == "loss/total":
        return lambda v: [v.total if v.total is not None else v.terms.get("total")]
    if first == "loss" and rest and key == "weighted" and name:
        return lambda v: [v.terms[name] * v.weights[name] if name in v.terms and name in v.weights else None]
    if first == "loss" and rest:
        term = name if key == "raw" and name else rest
        return lambda v: [v.terms.get(term, v.terms.get(rest))]
    if first == "grads" and name and key == "param_norm":
        return lambda v: [v.norms.get(name)]
    if first == "grads" and name and key == "state":
        return lambda v: [v.states.get(name)]
    if first == "gate" and key in _GATE:  # as in the record, where one gate's series have no module's name
        field = _GATE[key]
        return lambda v: [getattr(alpha, field) for gate, alpha in v.alphas.items() if name in ("", gate)]
    if first == "input" and name and key == "absmax":
        return lambda v: [v.inputs[name].absmax if name in v.inputs else None]
    raise UserError(f"the rule {text!r}: there is no series {series!r}; there are {SERIES}. An example: {EXAMPLE}")
