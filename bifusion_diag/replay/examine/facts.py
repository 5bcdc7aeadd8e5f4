"""What the diagnosis of a bad step has measured, and what it compares it with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from bifusion_diag.probes.base import ROOT
from bifusion_diag.replay.examine.backward_trace import BackwardTrace
from bifusion_diag.replay.examine.census import Sight
from bifusion_diag.replay.examine.forward_trace import ForwardTrace
from bifusion_diag.replay.examine.optimizer_state import BadMoment, RateChange
from bifusion_diag.replay.examine.passes import Pass
from bifusion_diag.replay.examine.samples import SampleFinding
from bifusion_diag.replay.examine.terms import TermShare, TermTable
from bifusion_diag.replay.examine.user_hooks import UserHook
from bifusion_diag.replay.incident import Cause, Incident
from bifusion_diag.replay.step import Training
from bifusion_diag.replay.watch.vitals import Vitals

GRAPH = frozenset({"detached-module", "dead-module", "frozen-module", "not-updated"})  # nothing is wrong with numbers
UPDATE = frozenset({"nonfinite-weights", "update-jump"})  # seen after the update
SPIKES = frozenset({"gradient-spike", "loss-spike", "loss-shift", "input-outlier", "overflowed-norm", "rule"})
FEW_ROWS = 32  # of BatchNorm: below it a close-up or a blank image leaves channels that are nearly constant
FAR = 10.0  # times smaller than in the healthy step


@dataclass
class Facts:
    """All that is known of a bad step. None: not measured.

    Attributes:
        plain: the incident as the alarm knows it.
        training: what runs.
        vitals: of the step.
        history: what was usual, see :meth:`~bifusion_diag.replay.watch.detect.Detector.typical`.
        given: L2 norm of the gradient by parameter, as the optimiser is about to see it.
        again: the step once more.
        healthy: the last healthy step's batch with the weights of now.
        forward: what the step's forward did.
        healthy_forward: and that of the healthy batch.
        backward: what the step's backward did.
        healthy_backward: and that of the healthy batch.
        terms: gradients of the loss terms.
        healthy_terms: and those of the healthy batch.
        term_shares: guilty terms.
        samples: what running the samples apart has shown.
        census: extremes of the forward.
        healthy_census: and of the healthy batch.
        held: the step with BatchNorm's running statistics, where it took those of unusually few rows.
        hook: without which the step is healthy.
        hookless: the step without it.
        moments: of the optimisers that no gradients can have left.
        rates: learning rates that have jumped.
        gradient_end: why a module that runs gets no gradient.
        unmeasured: what could not be measured and why.
    """

    plain: Incident
    training: Training
    vitals: Vitals
    history: Mapping[str, Any]
    given: Mapping[str, float] = field(default_factory=dict)
    again: Pass | None = None
    healthy: Pass | None = None
    forward: ForwardTrace | None = None
    healthy_forward: ForwardTrace | None = None
    backward: BackwardTrace | None = None
    healthy_backward: BackwardTrace | None = None
    terms: TermTable | None = None
    healthy_terms: TermTable | None = None
    term_shares: list[TermShare] = field(default_factory=list)
    samples: SampleFinding | None = None
    census: Mapping[str, Sight] = field(default_factory=dict)
    healthy_census: Mapping[str, Sight] = field(default_factory=dict)
    held: Pass | None = None
    hook: UserHook | None = None
    hookless: Pass | None = None
    moments: list[BadMoment] = field(default_factory=list)
    rates: list[RateChange] = field(default_factory=list)
    gradient_end: Cause | None = None
    unmeasured: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """Of the first trigger."""
        return self.plain.kind

    @property
    def kinds(self) -> frozenset[str]:
        """Of all triggers."""
        return frozenset(trigger.kind for trigger in self.plain.triggers)

    @property
    def updated(self) -> bool:
        """The weights are those after the update."""
        return self.vitals.moved is not None

    @property
    def nonfinite(self) -> bool:
        """Something was NaN or infinite before the update."""
        return self.kind in ("nonfinite-loss", "nonfinite-gradient", "nonfinite-buffers", "nonfinite-input")

    @property
    def bad_given(self) -> tuple[str, ...]:
        """Parameters whose gradient is bad as the optimiser is about to see it."""
        return tuple(name for name, norm in self.given.items() if not math.isfinite(norm))

    @property
    def healthy_too(self) -> bool | None:
        """Whether even the last healthy batch is bad with the weights and the code of now: then no sample of this batch
        is to blame. None: not measured."""
        if self.healthy is None or self.healthy.error is not None:
            return None
        return shows(self.healthy, self)

    @property
    def guilty(self) -> tuple[int, ...]:
        """Indices of guilty samples."""
        if self.samples is None or self.healthy_too:
            return ()
        return tuple(share.index for share in self.samples.shares)


def shows(found: Pass, facts: Facts) -> bool:
    """Whether a pass shows what set the alarm off. Of a jump half of it, in orders of magnitude over the bound, will
    do: other batches are not equally affected."""
    if facts.nonfinite:
        return not found.finite
    if facts.kind == "overflowed-norm":
        return not found.grad_norm < 1e17
    if not found.finite:
        return True
    trigger = facts.plain.triggers[0]
    value = value_of(found, facts)
    if value is None or trigger.value is None or not math.isfinite(trigger.value):
        return False
    usual = usual_value(facts)
    if usual is not None and 0 < usual < trigger.value:
        return value > math.sqrt(usual * trigger.value)
    return value > trigger.value / 4


def unusual(facts: Facts, *whats: str) -> bool:
    """Whether the census of the step has something much smaller than that of the healthy step."""
    for what in whats:
        here, there = facts.census.get(what), facts.healthy_census.get(what)
        if here is not None and (
            there is None or here.value * FAR < there.value or (what.endswith("rows") and here.value * 4 <= there.value)
        ):
            return True
    return False


def few_row_norm(facts: Facts) -> Sight | None:
    """The BatchNorm that took its statistics of the fewest rows, where they are few as in no healthy step, and the step
    is not as bad with the running statistics: a handful of points is extreme in other ways too."""
    rows = facts.census.get("batch norm rows")
    if facts.kind not in SPIKES or rows is None or rows.value > FEW_ROWS:
        return None
    if facts.held is not None and facts.held.error is None and shows(facts.held, facts):
        return None
    return rows if unusual(facts, "batch norm rows", "batch norm variance") else None


def value_of(found: Pass, facts: Facts) -> float | None:
    """The number that set the alarm off, of another pass."""
    trigger = facts.plain.triggers[0]
    if trigger.kind in ("loss-spike", "loss-shift"):
        return found.terms.get(trigger.term or "", found.total)
    if trigger.kind in ("gradient-spike", "overflowed-norm", "input-outlier", "rule"):
        return found.grad_norm if trigger.module is None else by_owner(found.norms).get(trigger.module)
    return None


def usual_value(facts: Facts) -> float | None:
    """What it was in the steps before."""
    trigger = facts.plain.triggers[0]
    if trigger.kind in ("loss-spike", "loss-shift"):
        terms = facts.history.get("terms", {})
        return terms.get(trigger.term) if trigger.term is not None else facts.history.get("total")
    if trigger.kind == "gradient-spike":
        norms = facts.history.get("norms", {})
        return norms.get(trigger.module) if trigger.module is not None else facts.history.get("grad_norm")
    return None


def owner(parameter: str) -> str:
    """The module that holds a parameter or buffer."""
    return parameter.rpartition(".")[0] or ROOT


def by_owner(norms: Mapping[str, float]) -> dict[str, float]:
    """Norms by module of norms by parameter."""
    found: dict[str, float] = {}
    for name, norm in norms.items():
        found[owner(name)] = math.hypot(found.get(owner(name), 0.0), norm)
    return found


def common_part(modules: Iterable[str]) -> str:
    """The innermost module that holds all of them."""
    paths = [[] if name == ROOT else name.split(".") for name in modules]
    shared = takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return ".".join(names[0] for names in shared) or ROOT
