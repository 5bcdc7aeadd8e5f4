"""When a run is bad, and how early that is certain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from bifusion_diag.diagnosis import RULES, Thresholds, assess_run, find_spikes
from bifusion_diag.diagnosis.comparing.gates import Gate, check_run_gates, parse_gates
from bifusion_diag.diagnosis.names import NORM, TOTAL
from bifusion_diag.diagnosis.quantity import NotMeasured
from bifusion_diag.diagnosis.spikes import MIN_PREVIOUS, SpikeDetector
from bifusion_diag.errors import UserError
from bifusion_diag.experiments.bisect.search import Outcome
from bifusion_diag.record import Run

Row = Mapping[str, float | None]  # a step's scalars by series; None where missing

UNSTABLE = "unstable"
EXAMPLES = "'unstable', 'nonfinite_steps>0', 'grad_norm/p99>50' or 'finding:gradient-spike'"
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
    """An oracle from what the user writes: "unstable", or a gate of one run as `compare --fail-on` has them.

    Args:
        text: for example "unstable", "grad_norm/p99>50", "finding:gradient-spike".
        thresholds: of "unstable" and of the rules.

    Raises:
        UserError: it is none of these; the rule or the measure is unknown.
    """
    try:
        (gate,) = parse_gates([text.strip()])
    except UserError as error:
        raise UserError(f"{str(error).replace('--fail-on', '--oracle')} Of a bisection: {EXAMPLES}.") from error
    if gate.kind == "unstable":
        return Unstable(thresholds)
    if gate.kind in ("ratio", "worse"):
        raise UserError(f"--oracle {text}: every run of a bisection is judged by itself. Write {EXAMPLES}.")
    if gate.key.startswith("eval/") or gate.kind == "criterion":
        raise UserError(f"--oracle {text}: the runs of a bisection are short and not evaluated. Write {EXAMPLES}.")
    return OfGate(gate, thresholds)


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
class OfGate:
    """A measure of the run is above or below a number, or a rule has a finding."""

    gate: Gate
    thresholds: Thresholds

    @property
    def text(self) -> str:
        return self.gate.text

    @property
    def words(self) -> str:
        return self.gate.text

    @property
    def probes(self) -> tuple[str, ...]:
        if self.gate.kind == "finding":
            return next((rule.needs for rule in RULES if rule.id == self.gate.key), ())
        probe = _PROBE_OF.get(self.gate.key.partition("/")[0])
        return () if probe is None else (probe,)

    @property
    def examines(self) -> bool:
        return self.gate.kind == "finding" and self.gate.key.startswith("incident")

    def watch(self, steps: int) -> Watch:
        return _WatchGate(self, max(steps - MIN_PREVIOUS, 1))


class _WatchGate:
    def __init__(self, oracle: OfGate, most_judged: int) -> None:
        self._oracle, self._most_judged = oracle, most_judged
        self._counts = _Counts()

    def step(self, step: int, row: Row) -> str | None:
        self._counts.add(row)
        gate, now = self._oracle.gate, self._at_least()
        if gate.kind != "measure" or gate.sign not in (">", ">=") or now is None:
            return None
        holds = now > gate.bound or (gate.sign == ">=" and now == gate.bound)
        return f"{gate.key} is {now:.4g} at step {step}" if holds else None

    def _at_least(self) -> float | None:
        """What the measure will be at the least, whatever is to come; None of one that may still fall."""
        counts = self._counts
        grows = {
            "nonfinite_steps": counts.nonfinite,
            "bad_steps": counts.nonfinite + counts.spikes,
            "spikes": counts.spikes,
            "spike_rate": counts.spikes / self._most_judged,
            "grad_norm/max": counts.largest,
        }
        return grows.get(self._oracle.gate.key)

    def end(self, run: Run) -> Judged:
        if not len(run.steps):
            return Judged("unresolved", "no step was recorded")
        (found,) = check_run_gates([self._oracle.gate], assess_run(run, self._oracle.thresholds))
        if isinstance(found.reading, NotMeasured):
            return Judged("unresolved", str(found.reason))
        return Judged("bad" if found.failed else "stable", str(found.reason))
