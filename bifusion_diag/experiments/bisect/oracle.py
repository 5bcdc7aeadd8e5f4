"""When a run is bad, and how early that is certain."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from bifusion_diag.diagnosis import DEFINITIONS, RULES, Thresholds, assess_run, find_spikes, measure
from bifusion_diag.diagnosis.definitions import is_defined
from bifusion_diag.diagnosis.names import NORM, TOTAL
from bifusion_diag.diagnosis.quantity import NotMeasured
from bifusion_diag.diagnosis.rules.incidents import PREFIX
from bifusion_diag.diagnosis.spikes import MIN_PREVIOUS, SpikeDetector
from bifusion_diag.errors import UserError, near_matches
from bifusion_diag.experiments.bisect.search import Outcome
from bifusion_diag.record import Run

Row = Mapping[str, float | None]  # a step's scalars by series; None where missing

UNSTABLE = "unstable"
FINDING = "finding:"
EXAMPLES = "'unstable', 'nonfinite_steps>0', 'grad_norm/p99>50' or 'finding:gradient-spike'"
_COMPARISON = re.compile(r"\s*([\w./*-]+?)\s*(>=|<=|>|<)\s*(\S+)\s*")
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
#: The probe that measures what begins so; the losses and the loop's own numbers are always there.
_PROBE_OF = {
    "clip": "clip",
    "projection": "projection",
    "gate": "gate",
    "update_ratio": "updates",
    "updates": "updates",
    "gradient_share": "loss_gradients",
    "gradient_cosine": "loss_gradients",
    "gradient_conflict": "loss_gradients",
    "activations": "activations",
    "weights": "weights",
    "attention": "attention",
    "matching": "matching",
    "normalize": "normalize",
    "data": "data",
    "throughput": "throughput",
}


class Judged(NamedTuple):
    """What a run is, and why in words."""

    outcome: Outcome
    why: str


class Watch(Protocol):
    """Follows one run."""

    def step(self, step: int, row: Row) -> str | None:
        """Why the run is bad, once that is certain whatever is to come."""

    def end(self, run: Run) -> Judged:
        """Of a run that has done all its steps."""


class Oracle(Protocol):
    """When a run is bad."""

    @property
    def text(self) -> str:
        """What the user writes."""

    @property
    def words(self) -> str:
        """What that means."""

    @property
    def probes(self) -> tuple[str, ...]:
        """That it needs."""

    @property
    def examines(self) -> bool:
        """Whether bad steps have to be taken apart, which takes up to thirty times as long as a step."""

    def watch(self, steps: int) -> Watch:
        """Of a run of so many steps."""


def read_oracle(text: str, thresholds: Thresholds) -> Oracle:
    """An oracle from what the user writes.

    Args:
        text: "unstable", "finding:<rule>", or a comparison of a measure with a number.
        thresholds: of "unstable" and of the rules.

    Raises:
        UserError: it is none of these; the rule or the measure is unknown.
    """
    text = text.strip()
    if text == UNSTABLE:
        return Unstable(thresholds)
    if text.startswith(FINDING):
        return HasFinding.of(text.removeprefix(FINDING).strip(), thresholds)
    found = _COMPARISON.fullmatch(text)
    if found is None:
        raise UserError(f"--oracle {text!r} cannot be read. Write {EXAMPLES}.")
    key, sign, number = found.groups()
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if math.isnan(limit):
        raise UserError(f"--oracle {text!r}: {number!r} is no number. Write {EXAMPLES}.")
    if not is_defined(key) or key.endswith("*"):
        keys = [definition.key for definition in DEFINITIONS]
        raise UserError(f"--oracle {text!r}: there is no measure {key!r}.{near_matches(key, keys)} Write {EXAMPLES}.")
    if key.startswith("eval/"):
        raise UserError(f"--oracle {text!r}: the runs of a bisection are short and not evaluated. Write {EXAMPLES}.")
    return Comparison(key, sign, limit)


def nonfinite_of(row: Row) -> str | None:
    """The first quantity of a step that is NaN or infinite, of those by which a step is "non-finite"."""
    named = [name for name in row if name.startswith("loss/") and name.endswith("/raw")]
    for name in (*named, TOTAL, NORM):
        value = row.get(name)
        if value is not None and not math.isfinite(value):
            return name
    return None


class _Counts:
    """What of a run can only grow: non-finite steps, spikes, the largest norm."""

    def __init__(self) -> None:
        self.nonfinite = self.spikes = 0
        self.largest = -math.inf
        self._detector = SpikeDetector()

    def add(self, row: Row) -> str | None:
        """Count a step; the quantity that is not finite in it."""
        bad = nonfinite_of(row)
        norm = row.get(NORM)
        self.nonfinite += bad is not None
        self.spikes += norm is not None and self._detector.update(norm)
        if norm is not None and math.isfinite(norm):
            self.largest = max(self.largest, norm)
        return bad


@dataclass(frozen=True)
class Unstable:
    """As the verdict on one run: any non-finite step, or several spikes that are more than the bound's share."""

    thresholds: Thresholds
    text: str = UNSTABLE
    probes: tuple[str, ...] = ()
    examines: bool = False

    @property
    def words(self) -> str:
        rate = f"{self.thresholds.spike_rate:g}"
        return f"a non-finite step, or several spikes of the gradient norm in more than {rate} of the steps"

    def watch(self, steps: int) -> Watch:
        return _WatchUnstable(self.thresholds.spike_rate, max(steps - MIN_PREVIOUS, 1))


class _WatchUnstable:
    def __init__(self, rate: float, most_judged: int) -> None:
        self._rate, self._most_judged = rate, most_judged
        self._counts = _Counts()

    def step(self, step: int, row: Row) -> str | None:
        bad = self._counts.add(row)
        if bad is not None:
            return f"{bad} is not finite at step {step}"
        spikes = self._counts.spikes
        if spikes > 1 and spikes / self._most_judged > self._rate:
            return f"{spikes} spikes of the gradient norm by step {step}"
        return None

    def end(self, run: Run) -> Judged:
        norm = run.series(NORM)
        found = find_spikes(() if norm is None else norm.value)
        spikes, judged = int(found.is_spike.sum()), int(found.judged.sum())
        if spikes > 1 and spikes / judged > self._rate:
            return Judged("bad", f"{spikes} spikes of the gradient norm in {judged} steps")
        also = f", {spikes} spike" if spikes == 1 else ""
        return Judged("stable", f"no non-finite step in {len(run.steps)}{also}")


@dataclass(frozen=True)
class Comparison:
    """A measure of the run is above or below a number."""

    key: str
    sign: str
    limit: float
    examines: bool = False

    @property
    def text(self) -> str:
        return f"{self.key}{self.sign}{self.limit:g}"

    @property
    def words(self) -> str:
        return f"the run's measure {self.key} is {self.sign} {self.limit:g}"

    @property
    def probes(self) -> tuple[str, ...]:
        probe = _PROBE_OF.get(self.key.partition("/")[0])
        return () if probe is None else (probe,)

    def watch(self, steps: int) -> Watch:
        return _WatchMeasure(self, steps)


class _WatchMeasure:
    def __init__(self, oracle: Comparison, steps: int) -> None:
        self._oracle = oracle
        self._most_judged = max(steps - MIN_PREVIOUS, 1)
        self._counts = _Counts()

    def step(self, step: int, row: Row) -> str | None:
        self._counts.add(row)
        counts, oracle = self._counts, self._oracle
        grows = {
            "nonfinite_steps": counts.nonfinite,
            "bad_steps": counts.nonfinite + counts.spikes,
            "spikes": counts.spikes,
            "spike_rate": counts.spikes / self._most_judged,
            "grad_norm/max": counts.largest,
        }
        now = grows.get(oracle.key)
        if now is None or oracle.sign not in (">", ">=") or not _OPERATORS[oracle.sign](now, oracle.limit):
            return None
        return f"{oracle.key} is {now:.4g} at step {step}"

    def end(self, run: Run) -> Judged:
        oracle = self._oracle
        reading = measure(run).readings.get(oracle.key, NotMeasured("was not recorded"))
        if isinstance(reading, NotMeasured):
            return Judged("unresolved", f"{oracle.key} is not measured: {reading.reason}")
        value = reading.value
        bad = value is not None and _OPERATORS[oracle.sign](value, oracle.limit)
        return Judged("bad" if bad else "stable", f"{oracle.key} is {'none' if value is None else f'{value:.4g}'}")


@dataclass(frozen=True)
class HasFinding:
    """A rule fires on the run."""

    rule: str
    probes: tuple[str, ...]
    thresholds: Thresholds

    @classmethod
    def of(cls, rule: str, thresholds: Thresholds) -> HasFinding:
        """With the probes that the rule needs.

        Raises:
            UserError: there is no such rule of records.
        """
        rules = {one.id: one for one in RULES}
        if not rule.startswith(PREFIX) and rule not in rules:
            raise UserError(f"--oracle {FINDING}{rule}: there is no rule {rule!r}.{near_matches(rule, rules)}")
        needed = rules[rule].needs if rule in rules else ()
        return cls(rule, tuple(needed), thresholds)

    @property
    def text(self) -> str:
        return f"{FINDING}{self.rule}"

    @property
    def words(self) -> str:
        return f"the rule {self.rule} has a finding"

    @property
    def examines(self) -> bool:
        return self.rule.startswith(PREFIX)

    def watch(self, steps: int) -> Watch:
        return _WatchFinding(self)


class _WatchFinding:
    def __init__(self, oracle: HasFinding) -> None:
        self._oracle = oracle

    def step(self, step: int, row: Row) -> str | None:
        return None

    def end(self, run: Run) -> Judged:
        found = assess_run(run, self._oracle.thresholds)
        for finding in found.findings:
            if finding.rule == self._oracle.rule:
                return Judged("bad", str(finding.title))
        for gap in found.unmeasured:
            if gap.rule == self._oracle.rule:
                return Judged("unresolved", f"{self._oracle.rule} is not measured: {gap.reason}")
        return Judged("stable", f"no finding of {self._oracle.rule}")
