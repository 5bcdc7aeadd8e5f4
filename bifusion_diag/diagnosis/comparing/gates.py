"""Gates: conditions under which a command fails, for use in CI. "Not measured" fails too, unless it is allowed to pass.

- ``spike_rate>0.01``: a measure of the candidate (:mod:`bifusion_diag.diagnosis.definitions`); of several runs a side
  their mean. Operators: ``>``, ``>=``, ``<``, ``<=``.
- ``ratio:grad_norm/p99>2``: that measure ÷ the baseline's.
- ``finding:error`` (or ``warning``, which includes errors, or ``note``, or a rule's id): there is such a finding.
- ``criterion:miou``: that criterion of the documents fails.
- ``worse``: the verdict is "less stable", or "unstable" where no run of the baseline is by itself or the test shows
  more bad steps than the baseline's. More of them that chance may explain are "not measured".
- ``unstable``: the verdict is "unstable", or a candidate run is unstable by itself.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bifusion_diag.diagnosis.assess import RunAssessment
from bifusion_diag.diagnosis.comparing.groups import BY_THEMSELVES, GroupComparison
from bifusion_diag.diagnosis.criteria import CRITERIA
from bifusion_diag.diagnosis.definitions import DEFINITIONS, definition_of, is_defined
from bifusion_diag.diagnosis.findings import SEVERITIES
from bifusion_diag.diagnosis.phrase import Phrase, say
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity, Reading
from bifusion_diag.diagnosis.rules import RULES, rule_ids
from bifusion_diag.diagnosis.rules.incidents import PREFIX
from bifusion_diag.diagnosis.verdict import CHANCE, State
from bifusion_diag.errors import UserError, near_matches

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_COMPARISON = re.compile(r"\s*(ratio:)?\s*([^<>=\s]+)\s*(>=|<=|>|<)\s*(\S+)\s*")
_WORDS = ("worse", "unstable")
More = Literal["shown", "untold", "none"]  # bad steps than the baseline's
_SHAPE = (
    "Write it as spike_rate>0.01, ratio:grad_norm/p99>2, finding:error, criterion:miou, worse or unstable (in quotes: "
    "> is the shell's)."
)


@dataclass(frozen=True)
class Gate:
    """One condition.

    Attributes:
        text: as the user wrote it.
        kind: what is looked at.
        key: a measure, a severity or rule, or a criterion.
        sign: of a comparison.
        bound: likewise.
    """

    text: str
    kind: Literal["measure", "ratio", "finding", "criterion", "worse", "unstable"]
    key: str = ""
    sign: str = ""
    bound: float = math.nan


@dataclass(frozen=True)
class GateResult:
    """A gate that was looked at.

    Attributes:
        gate: as the user wrote it.
        subject: the candidate.
        failed: the condition holds, or could not be told and that is not allowed.
        reading: the number that was compared, or why there is none.
        reason: in words.
    """

    gate: str
    subject: str
    failed: bool
    reading: Reading
    reason: str


def parse_gates(texts: Iterable[str]) -> tuple[Gate, ...]:
    """Read gates.

    Raises:
        UserError: one is not of the form, or names what is not there.
    """
    return tuple(_parse(text) for text in texts)


def _parse(text: str) -> Gate:
    word = text.strip()
    if word == "worse":
        return Gate(text, "worse")
    if word == "unstable":
        return Gate(text, "unstable")
    kind, sign, name = word.partition(":")
    if kind == "finding" and sign:
        known = {*SEVERITIES, *rule_ids(), *(rule.id for rule in RULES)}
        if name not in known and not name.startswith(PREFIX):
            raise UserError(f"--fail-on {text}: there is no rule or severity {name!r}.{near_matches(name, known)}")
        return Gate(text, "finding", name)
    if kind == "criterion" and sign:
        if name not in CRITERIA:
            raise UserError(f"--fail-on {text}: there is no criterion {name!r}.{near_matches(name, CRITERIA)}")
        return Gate(text, "criterion", name)
    found = _COMPARISON.fullmatch(text)
    if found is None:
        raise UserError(f"--fail-on {text}: no such gate.{near_matches(word, _WORDS)} {_SHAPE}")
    ratio, key, operation, bound = found.groups()
    if not is_defined(key) or key.endswith("*"):
        measures = [definition.key for definition in DEFINITIONS]
        raise UserError(
            f"--fail-on {text}: there is no measure {key!r}.{near_matches(key, measures)} "
            "The report's JSON names them all."
        )
    try:
        number = float(bound)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise UserError(f"--fail-on {text}: {bound!r} is no number. {_SHAPE}")
    return Gate(text, "ratio" if ratio else "measure", key, operation, number)


def check_gates(
    gates: Sequence[Gate], comparison: GroupComparison, *, allow_unmeasured: bool = False
) -> tuple[GateResult, ...]:
    """Look at every gate of a candidate side."""
    more = _shown_worse(comparison)
    return tuple(
        _check(
            gate,
            comparison.candidate.name,
            comparison.candidate.runs,
            comparison.baseline.runs,
            comparison.verdict.state,
            more,
            allow_unmeasured,
        )
        for gate in gates
    )


def check_run_gates(
    gates: Sequence[Gate], assessment: RunAssessment, *, allow_unmeasured: bool = False
) -> tuple[GateResult, ...]:
    """Look at every gate of one run by itself; those that need a baseline are "not measured"."""
    return tuple(
        _check(gate, assessment.name, (assessment,), (), assessment.verdict.state, None, allow_unmeasured)
        for gate in gates
    )


def _check(
    gate: Gate,
    subject: str,
    runs: Sequence[RunAssessment],
    baseline: Sequence[RunAssessment],
    state: State,
    more: More | None,
    allow: bool,
) -> GateResult:
    holds, reading, reason = _look(gate, runs, baseline, state, more)
    if holds is None:
        return GateResult(gate.text, subject, not allow, reading, say("not measured: {reason}", reason=reason))
    return GateResult(gate.text, subject, holds, reading, reason)


def _look(
    gate: Gate, runs: Sequence[RunAssessment], baseline: Sequence[RunAssessment], state: State, more: More | None
) -> tuple[bool | None, Reading, str]:
    """Whether the condition holds (None: it cannot be told), the number, and the reason."""
    if gate.kind in ("measure", "ratio"):
        return _compare(gate, runs, baseline)
    if gate.kind == "finding":
        return _find(gate, runs)
    if gate.kind == "criterion":
        return _judge(gate, runs)
    verdict = say("the verdict is “{state}”", state=state)
    if gate.kind == "unstable":
        alone = sum(run.verdict.state == "unstable" for run in runs)
        if state == "unstable" or alone:
            return True, Quantity(alone, "runs"), verdict if state == "unstable" else _alone(runs, baseline)
    elif more is None:
        return None, NotMeasured(_NO_BASELINE), _NO_BASELINE
    elif state == "less stable" or (state == "unstable" and more == "shown"):
        return True, Quantity(None), verdict
    if state == "not enough data" or (gate.kind == "worse" and state == "unstable" and more == "untold"):
        return None, NotMeasured(verdict), verdict
    return False, Quantity(None), verdict


def _alone(runs: Sequence[RunAssessment], baseline: Sequence[RunAssessment]) -> Phrase:
    unstable = [sum(run.verdict.state == "unstable" for run in side) for side in (runs, baseline)]
    return say(BY_THEMSELVES, unstable=unstable[0], runs=len(runs), before=unstable[1], runs_before=len(baseline))


_NO_BASELINE = "there is no baseline to compare with"


def _mean_of(key: str, runs: Sequence[RunAssessment]) -> Reading:
    readings = [
        run.measures.readings.get(key)
        or run.measures.readings.get(f"{key.split('/')[0]}/*")
        or NotMeasured("was not recorded")
        for run in runs
    ]
    for reading in readings:
        if isinstance(reading, NotMeasured):
            return reading
    values = [reading.value for reading in readings if isinstance(reading, Quantity)]
    known = [value for value in values if value is not None]
    unit = next(reading.unit for reading in readings if isinstance(reading, Quantity))
    return Quantity(float(np.mean(known)) if known else None, unit)


def _compare(
    gate: Gate, runs: Sequence[RunAssessment], baseline: Sequence[RunAssessment]
) -> tuple[bool | None, Reading, str]:
    reading = _mean_of(gate.key, runs)
    if isinstance(reading, NotMeasured):
        return None, reading, reading.reason
    if gate.kind == "ratio":
        if not baseline:
            return None, NotMeasured(_NO_BASELINE), _NO_BASELINE
        before = _mean_of(gate.key, baseline)
        if isinstance(before, NotMeasured):
            reason = say("the baseline's: {reason}", reason=before.reason)
            return None, NotMeasured(reason), reason
        reading = Quantity(_ratio(reading.value, before.value))
        if reading.value is None:
            gap = "there is no such number in one of the runs"
            return None, NotMeasured(gap), gap
    title = definition_of(gate.key).title
    if reading.value is None:  # such as no first non-finite step: nothing is above or below a bound
        return False, reading, say("{measure}: none", measure=title)
    holds = _OPERATORS[gate.sign](reading.value, gate.bound) or math.isnan(reading.value)
    of = say("mean of {count} runs", count=len(runs)) if len(runs) > 1 else ""
    what = say("{measure} ÷ the baseline's", measure=title) if gate.kind == "ratio" else title
    number = f"{reading.value:.6g}"
    return (
        holds,
        reading,
        (
            say("{measure} is {number} ({of})", measure=what, number=number, of=of)
            if of
            else say("{measure} is {number}", measure=what, number=number)
        ),
    )


def _ratio(candidate: float | None, baseline: float | None) -> float | None:
    """Candidate ÷ baseline; of two zeros 1: they are alike."""
    if candidate is None or baseline is None:
        return None
    if baseline == 0:
        return 1.0 if candidate == 0 else math.copysign(math.inf, candidate)
    return candidate / baseline


def _find(gate: Gate, runs: Sequence[RunAssessment]) -> tuple[bool | None, Reading, str]:
    if gate.key in SEVERITIES:
        meant = SEVERITIES[: SEVERITIES.index(gate.key) + 1]
        found = [finding for run in runs for finding in run.findings if finding.severity in meant]
    else:
        found = [finding for run in runs for finding in run.findings if finding.rule == gate.key]
        unmeasured = [one for run in runs for one in run.unmeasured if one.rule == gate.key]
        if not found and unmeasured:
            return None, NotMeasured(unmeasured[0].reason), unmeasured[0].reason
    if not found:
        return False, Quantity(0, "findings"), "no such finding"
    first = found[0]
    return True, Quantity(len(found), "findings"), say("{title} ({rule})", title=first.title, rule=first.rule)


def _judge(gate: Gate, runs: Sequence[RunAssessment]) -> tuple[bool | None, Reading, str]:
    judged = [criterion for run in runs for criterion in run.criteria if criterion.key == gate.key]
    failed = next((one for one in judged if one.result == "fail"), None)
    if failed is not None:
        return True, failed.reading, say("{title}: fail", title=failed.title)
    gap = next((one for one in judged if one.result == "not measured"), None)
    if gap is not None:
        reason = gap.reading.reason if isinstance(gap.reading, NotMeasured) else gap.note
        return None, gap.reading, reason
    return False, judged[0].reading, say("{title}: pass", title=judged[0].title)


def _shown_worse(comparison: GroupComparison) -> More:
    """Whether an unstable candidate is worse than the baseline, by what the verdict's test allows to say."""
    if not any(run.verdict.state == "unstable" for run in comparison.baseline.runs):
        return "shown"
    primary = comparison.tested[0]
    if not isinstance(primary.difference, Quantity) or primary.difference.value is None or primary.p is None:
        return "untold"
    if primary.difference.value <= 0:
        return "none"
    return "shown" if primary.p <= CHANCE else "untold"
