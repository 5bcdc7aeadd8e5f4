"""Takes a bad step apart: runs it again, compares, traces, and says where it began, why, and what may help."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from bifusion_diag.probes.norms import norms_of
from bifusion_diag.probes.ranks import world_size
from bifusion_diag.replay.examine import census
from bifusion_diag.replay.examine.backward_trace import trace_backward
from bifusion_diag.replay.examine.choose import Choice, choose, outlier
from bifusion_diag.replay.examine.facts import GRAPH, SPIKES, UPDATE, Facts, few_row_norm, shows
from bifusion_diag.replay.examine.forward_trace import trace_forward
from bifusion_diag.replay.examine.gradient_end import where_gradient_ends
from bifusion_diag.replay.examine.mechanisms import MECHANISMS
from bifusion_diag.replay.examine.optimizer_state import bad_moments, rate_changes
from bifusion_diag.replay.examine.passes import run_pass
from bifusion_diag.replay.examine.recognise import Verdict, recognise
from bifusion_diag.replay.examine.samples import Names, SampleFinding, Split, sample_shares
from bifusion_diag.replay.examine.terms import LOSS_KINDS, TermTable, attribute_term, term_gradients
from bifusion_diag.replay.examine.user_hooks import user_hooks, without
from bifusion_diag.replay.incident import Incident, Reproduction
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Fingerprint, Training
from bifusion_diag.replay.watch.vitals import Vitals

STEP_TIMES = 24.0  # after so many nothing more is begun
AT_LEAST = 5.0  # s, whatever a step takes: watching an operation costs as much as a small operation itself
MAX_HOOKS = 4  # of the user's, that the step is tried without
SIGHTS = 4  # of the census in the evidence
ROWS = 2000  # of a table

T = TypeVar("T")


def diagnose(
    plain: Incident,
    training: Training,
    notes: StepNotes,
    vitals: Vitals,
    first: Fingerprint | None,
    *,
    contrast: StepNotes | None,
    history: Mapping[str, Any],
    split: Split | None = None,
    names: Names | None = None,
    error: BaseException | None = None,
) -> Incident:
    """The incident with all that re-executing the step can tell. Weights, gradients, buffers and random numbers of the
    run are afterwards as they were. What cannot be measured is said in the evidence, and the rest goes on.

    Args:
        plain: the incident as the alarm knows it.
        training: what runs.
        notes: of the bad step.
        vitals: of the bad step.
        first: its losses and gradients as they were the first time, to the bit.
        contrast: notes of the last healthy step.
        history: what was usual, see :meth:`~bifusion_diag.replay.watch.detect.Detector.typical`.
        split: batch → one batch a sample.
        names: batch → a name a sample.
        error: that the step has raised.
    """
    began = time.perf_counter()
    gradients = training.gradients()
    given = dict(zip(gradients, map(float, norms_of(list(gradients.values()))), strict=True))
    facts = Facts(plain, training, vitals, history, given)
    alone = world_size() > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in training.model.modules())
    if alone:
        reproduction = Reproduction(None, difference="SyncBatchNorm waits for processes whose step was good")
        facts.unmeasured.append("the step was not run again: SyncBatchNorm waits for processes whose step was good")
    else:
        limit = max(STEP_TIMES * plain.step_seconds, AT_LEAST)
        diagnosis = _Diagnosis(facts, notes, contrast, began + limit, split, names)
        reproduction = diagnosis.rerun(first, error)
        if diagnosis.happened_again(reproduction):
            diagnosis.measure()
        else:
            facts.unmeasured.append("it did not happen again: what is said is what the first time showed")
    choice = choose(facts)
    verdict = recognise(facts, choice)
    seconds = time.perf_counter() - began
    return dataclasses.replace(
        plain,
        cause=choice.cause,
        terms=choice.terms,
        samples=choice.samples,
        mechanism=verdict.mechanism,
        explanation=verdict.explanation,
        evidence=_evidence(facts, choice, verdict) | _cost(seconds, plain.step_seconds),
        tables=_tables(facts),
        remedies=_remedies(verdict, choice),
        reproduction=reproduction,
        harmless=verdict.harmless,
        seconds=seconds,
    )


class _Diagnosis:
    """The measurements of one bad step, the most telling first. Each is guarded."""

    def __init__(
        self,
        facts: Facts,
        notes: StepNotes,
        contrast: StepNotes | None,
        deadline: float,
        split: Split | None,
        names: Names | None,
    ) -> None:
        self.facts, self.notes, self.contrast, self.deadline = facts, notes, contrast, deadline
        self.split, self.names = split, names
        self.training = facts.training

    def rerun(self, first: Fingerprint | None, error: BaseException | None) -> Reproduction:
        """Run the step again, plainly, and compare it with the first time, bit for bit."""
        facts = self.facts
        if facts.updated:
            return Reproduction(None, difference="the weights were updated before the alarm, and are others now")
        again = facts.again = self._take("the step again", lambda: run_pass(self.training, self.notes, bits=True))
        if again is None:
            return Reproduction(None, difference=facts.unmeasured[-1])
        said = "" if again.error is None else f"{type(again.error).__name__}: {again.error}"
        if error is not None:
            same = said == f"{type(error).__name__}: {error}"
            difference = "" if same else f"it raised {said}" if said else "it ran to its end this time"
            return Reproduction(same, "the error that was raised", difference)
        if again.bits is None:
            return Reproduction(False, "whether it runs", f"it raised {said}, which it did not the first time")
        if first is None or not (first.losses or first.gradients):
            return Reproduction(None, difference="nothing of the first time was kept to compare with")
        if world_size() > 1:  # gradients of the first time are the mean of all processes
            first = Fingerprint(first.losses, {})
        parts = {"losses": len(first.losses), "gradients": len(first.gradients)}
        what = " and ".join(f"{count} {name}" for name, count in parts.items() if count)
        difference = first.difference(again.bits)
        return Reproduction(not difference, f"{what}, bit for bit", difference)

    def happened_again(self, reproduction: Reproduction) -> bool:
        """Whether running the step again shows what set the alarm off."""
        facts = self.facts
        if facts.again is None or reproduction.identical is not False:
            return True
        return (facts.kind not in SPIKES and not facts.nonfinite) or shows(facts.again, facts)

    def measure(self) -> None:
        """Everything that this kind of alarm needs."""
        facts = self.facts
        if facts.kind in GRAPH:
            self._where_gradient_ends()
            return
        if facts.kind == "rank-divergence":
            return
        if facts.kind == "exception":
            facts.forward = self._take("the forward", lambda: trace_forward(self.training, self.notes))
            self._samples()
            return
        numeric = facts.nonfinite or facts.kind in SPIKES
        bad_gradients = facts.again is not None and bool(facts.again.bad_parameters)
        if numeric and self.contrast is not None:
            contrast = self.contrast
            facts.healthy = self._take("the last healthy batch", lambda: run_pass(self.training, contrast))
        if facts.kind in UPDATE or facts.healthy_too or facts.kind == "alpha-collapse":
            usual = facts.history.get("norms", {})
            facts.moments = self._take("the optimisers' states", lambda: bad_moments(self.training, usual)) or []
            facts.rates = rate_changes(facts.vitals.rates, facts.history.get("rates", {}))
        if not numeric and not (facts.kind == "altered-gradient" and bad_gradients):
            return
        facts.forward = self._take("the forward", lambda: trace_forward(self.training, self.notes))
        if facts.kind in SPIKES and facts.healthy_too is not False:
            self._guilty_hook()
        self._terms()
        loss_is_bad = facts.forward is not None and (facts.forward.bad_total or bool(facts.forward.bad_terms))
        if facts.kind in SPIKES or (bad_gradients and not loss_is_bad):
            facts.backward = self._take("the backward", lambda: trace_backward(self.training, self.notes))
        self._census()  # before the samples, which take most of the time
        if not facts.healthy_too:
            self._samples()
        if facts.kind in SPIKES and facts.healthy_too is False:
            self._healthy_traces()

    def _terms(self) -> None:
        facts, training = self.facts, self.training
        facts.terms = self._take("the terms' gradients", lambda: term_gradients(training, self.notes))
        if facts.terms is None:
            return
        contrast = self.contrast
        if facts.kind in LOSS_KINDS and facts.healthy is not None and facts.healthy_too is False:
            facts.healthy_terms = TermTable(facts.healthy.terms, {}, {}, {})  # judged by their values: those are known
        elif facts.kind in SPIKES and facts.healthy_too is False and contrast is not None:
            facts.healthy_terms = self._take(
                "the terms' gradients of the healthy batch", lambda: term_gradients(training, contrast)
            )
        module, usual = facts.plain.triggers[0].module, facts.history.get("terms", {})
        kind = "nonfinite-gradient" if facts.kind == "altered-gradient" else facts.kind
        facts.term_shares = attribute_term(facts.terms, kind, facts.healthy_terms, typical=usual, module=module)

    def _samples(self) -> None:
        facts = self.facts
        kind = "nonfinite-gradient" if facts.kind == "altered-gradient" else facts.kind
        terms = [share.name for share in facts.term_shares]

        def find(kind: str) -> SampleFinding:
            return sample_shares(
                self.training,
                self.notes,
                kind,
                contrast=self.contrast,
                split=self.split,
                names=self.names,
                terms=terms,
            )

        facts.samples = self._take("the samples", lambda: find(kind))
        if kind in SPIKES and facts.samples is not None and not facts.samples.shares and outlier(facts) is not None:
            far = self._take("whose input is far out", lambda: find("input-outlier"))
            if far is not None and far.shares:
                facts.samples = dataclasses.replace(facts.samples, shares=far.shares, reason="")

    def _census(self) -> None:
        facts, contrast = self.facts, self.contrast
        facts.census = self._take("the census", lambda: census.take_census(self.training, self.notes)) or {}
        if facts.kind in SPIKES and contrast is not None and facts.census:
            found = self._take("the census of the healthy batch", lambda: census.take_census(self.training, contrast))
            facts.healthy_census = found or {}
            if facts.healthy_census and few_row_norm(facts) is not None:
                name = "the step with BatchNorm's running statistics"
                facts.held = self._take(name, lambda: run_pass(self.training, self.notes, hold_norms=True))

    def _healthy_traces(self) -> None:
        facts, contrast = self.facts, self.contrast
        assert contrast is not None
        name = "the forward of the healthy batch"
        facts.healthy_forward = self._take(name, lambda: trace_forward(self.training, contrast))
        name = "the backward of the healthy batch"
        facts.healthy_backward = self._take(name, lambda: trace_backward(self.training, contrast))

    def _where_gradient_ends(self) -> None:
        facts = self.facts
        module = facts.plain.triggers[0].module
        if module is not None and facts.kind in ("detached-module", "dead-module"):
            facts.gradient_end = self._take(
                "where the gradient ends", lambda: where_gradient_ends(self.training, self.notes, module)
            )

    def _guilty_hook(self) -> None:
        """Find the first of the user's hooks without which the step is as usual."""
        for hook in user_hooks(self.training)[:MAX_HOOKS]:
            with without(hook):
                found = self._take(f"the step without {hook.source}", lambda: run_pass(self.training, self.notes))
            if found is not None and found.error is None and not shows(found, self.facts):
                self.facts.hook, self.facts.hookless = hook, found
                return

    def _take(self, what: str, measure: Callable[[], T]) -> T | None:
        """A measurement, or None and a line that says why there is none."""
        if time.perf_counter() > self.deadline:
            self.facts.unmeasured.append(f"not measured: {what}: the time for it is used up")
            return None
        try:
            return measure()
        except Exception as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            self.facts.unmeasured.append(f"not measured: {what}: {said}")
            return None


def _evidence(facts: Facts, choice: Choice, verdict: Verdict) -> dict[str, Any]:
    """Names and numbers, the most important first."""
    found: dict[str, Any] = dict(verdict.evidence)
    guilty = {share.name: share.why for share in facts.term_shares}
    found |= {f"term {name}": guilty[name] for name in choice.terms[:3] if name in guilty}
    found |= {f"sample {share.name or share.index}": share.why for share in choice.samples[:3]}
    if not choice.samples and facts.samples is not None and facts.samples.reason:
        found["no sample is named"] = facts.samples.reason
    if facts.healthy_too is not None:
        found["the last healthy step with these weights"] = "bad too" if facts.healthy_too else "healthy"
    found |= dict(list(census.evidence(facts.census, facts.healthy_census).items())[:SIGHTS])
    if facts.vitals.local_norm is not None:
        found["local gradient norm"] = facts.vitals.local_norm
    if facts.unmeasured:
        found["left out"] = "; ".join(facts.unmeasured)
    return found


def _cost(seconds: float, step_seconds: float) -> dict[str, Any]:
    return {"the diagnosis took, in step times": round(seconds / step_seconds, 1)} if step_seconds > 0 else {}


def _tables(facts: Facts) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    if facts.terms is not None:
        tables["terms"] = facts.terms.rows()
    if facts.samples is not None and facts.samples.rows:
        tables["samples"] = list(facts.samples.rows)
    trace = facts.backward or facts.forward
    if trace is not None and trace.modules:
        tables["modules"] = [dataclasses.asdict(call) for call in trace.modules[:ROWS]]
    return tables


def _remedies(verdict: Verdict, choice: Choice) -> tuple[str, ...]:
    remedies = MECHANISMS[verdict.mechanism].remedies
    if choice.samples:
        return remedies if "drop-sample" in remedies else (*remedies, "drop-sample")
    return tuple(remedy for remedy in remedies if remedy != "drop-sample")
