"""Rules of what changes in the course of a run: stages, the gate's release, weights of losses, the learning rate."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from bifusion_diag.diagnosis.criteria import warm_up_steps
from bifusion_diag.diagnosis.findings import Context, Evidence, Finding
from bifusion_diag.diagnosis.names import NORM, TOTAL, loss_terms
from bifusion_diag.diagnosis.phrase import Phrase, join, say
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity
from bifusion_diag.diagnosis.rules.declared import declared_number
from bifusion_diag.record.schema import Run, Series

RATE = "train/lr"
WINDOW = 10  # steps before and after a change that are compared
MIN_SIDE = 3  # of them, the fewest on each side
WEIGHT_CHANGE = 1.1  # a weight that changes by less in one step is on its way (a smooth schedule)


class Change(NamedTuple):
    """Something changes at a step by plan."""

    step: int
    kind: str  # "stage", "gate", "weight", "rate"
    what: str  # in words


def schedule_fights_warm_up(context: Context) -> list[Finding] | NotMeasured:
    """Changes by plan that fall on each other: one finding a place, worse where the run jumps there; and a gate that is
    released when the learning rate is spent."""
    run = context.run
    if not len(run.steps):
        return NotMeasured("the run has no step")
    changes = planned_changes(run)
    late = _spent_rate(context)
    if not changes:
        return late or NotMeasured("neither stages nor schedules nor a gate's warm-up change anything in this run")
    near = context.thresholds.schedule_distance
    findings = []
    for group in _groups(changes, near):
        kinds = {change.kind for change in group}
        if len(kinds) < 2:
            continue
        first, last = group[0].step, group[-1].step
        jumps = {name: jump for name in (NORM, TOTAL) if (jump := _jump(run.series(name), first, last)) is not None}
        limit = context.thresholds.schedule_jump
        high = {name: jump for name, jump in jumps.items() if jump > limit}
        evidence = [Evidence("step", Quantity(first, "step"), NORM)]
        labels = {NORM: "gradient norm after ÷ before, medians", TOTAL: "total loss after ÷ before, medians"}
        evidence += [Evidence(labels[name], Quantity(jump, "×"), name) for name, jump in jumps.items()]
        mechanism = join(
            [
                join([change.what for change in group]),
                "The run jumps there, and these changes cannot be told apart as its cause."
                if high
                else "The run does not jump there; if it did, these changes could not be told apart as its cause."
                if jumps
                else "Whether the run jumps there is not known: there are too few steps on one side.",
            ]
        )
        findings.append(
            Finding(
                "schedule-fights-warm-up",
                "warning" if high else "note",
                say("{n} planned changes fall on each other", n=len(group)),
                tuple(evidence),
                mechanism,
                (first, last),
            )
        )
    return [*findings, *late]


def planned_changes(run: Run) -> list[Change]:
    """What changes by plan after the first step, in order: by the record's events, settings and series."""
    begin = int(run.steps[0])
    found = [
        Change(
            event.step, "stage", say("At step {step} the stage changes ({name}).", step=event.step, name=_name(event))
        )
        for event in run.events
        if event.kind == "stage" and event.step is not None and event.step > begin
    ]
    if (release := gate_release(run)) is not None and release > begin:
        found.append(Change(release, "gate", say("At step {step} the gate's α is released.", step=release)))
    for term in loss_terms(run):
        for step, before, after in _weight_changes(run, term):
            what = say(
                "At step {step} the weight of {term} goes from {before:.3g} to {after:.3g}.",
                step=step,
                term=term,
                before=before,
                after=after,
            )
            found.append(Change(step, "weight", what))
    found += [
        Change(step, "rate", say("At step {step} the learning rate goes from {a:.3g} to {b:.3g}.", step=step, a=a, b=b))
        for step, a, b in _rate_changes(run.series(RATE))
    ]
    return sorted(found, key=lambda change: change.step)


def gate_release(run: Run) -> int | None:
    """The step at which the gate begins to learn, None where the settings hold it for no step or no run has one."""
    if run.series("gate/mean") is None or not declared_number(run.settings, "model.gate.early_steps"):
        return None
    step = warm_up_steps(run)
    return step if step <= int(run.steps[-1]) else None


def _name(event: object) -> str:
    data = getattr(event, "data", {})
    return str(data.get("name", "")) or str(getattr(event, "message", ""))


def _weight_changes(run: Run, term: str) -> list[tuple[int, float, float]]:
    """Steps at which a term's weight jumps, with the weight before and after."""
    raw, weighted = run.series(f"loss/{term}/raw"), run.series(f"loss/{term}/weighted")
    if raw is None or weighted is None or not (raw.exact and weighted.exact):
        return []
    if not np.array_equal(raw.steps, weighted.steps):
        return []
    with np.errstate(invalid="ignore", divide="ignore"):
        weight = weighted.value / raw.value
    known = np.flatnonzero(np.isfinite(weight))
    found = []
    for one, other in pairwise(known.tolist()):
        before, after = float(weight[one]), float(weight[other])
        low, high = sorted((abs(before), abs(after)))
        if high > 0 and high > WEIGHT_CHANGE * low:
            found.append((int(raw.steps[other]), before, after))
    return found


def _rate_changes(rate: Series | None) -> list[tuple[int, float, float]]:
    """Steps at which the learning rate jumps by more than a schedule that decays or warms up smoothly."""
    if rate is None or not rate.exact:
        return []
    known = np.flatnonzero(np.isfinite(rate.value) & (rate.value > 0))
    values, steps = rate.value[known], rate.steps[known]
    return [
        (int(steps[place]), float(values[place - 1]), float(values[place]))
        for place in range(1, len(values))
        if not 1 / _RATE_JUMP < values[place] / values[place - 1] < _RATE_JUMP
    ]


_RATE_JUMP = 3.0  # the last steps of a polynomial decay lose half of the rate each


def _groups(changes: list[Change], near: int) -> list[list[Change]]:
    """Changes with at most so many steps from one to the next; those of one kind at one step are kept together."""
    groups: list[list[Change]] = []
    for change in changes:
        if groups and change.step - groups[-1][-1].step <= near:
            groups[-1].append(change)
        else:
            groups.append([change])
    return groups


def _jump(series: Series | None, first: int, last: int) -> float | None:
    """The median of the steps after a change divided by that of the steps before; None where there are too few."""
    if series is None or not series.exact:
        return None
    before = series.value[(series.steps >= first - WINDOW) & (series.steps < first)]
    after = series.value[(series.steps >= last) & (series.steps < last + WINDOW)]
    before, after = before[np.isfinite(before)], after[np.isfinite(after)]
    if min(before.size, after.size) < MIN_SIDE or np.median(before) <= 0:
        return None
    return float(np.median(after) / np.median(before))


def _spent_rate(context: Context) -> list[Finding]:
    """The gate is released when the learning rate is nearly spent."""
    rate, release = context.run.series(RATE), gate_release(context.run)
    if rate is None or release is None or not rate.stats.max:
        return []
    there = rate.value[(rate.last >= release) & np.isfinite(rate.value)]
    if not there.size:
        return []
    share = float(there[0]) / rate.stats.max
    if share >= context.thresholds.spent_rate:
        return []
    return [
        Finding(
            "schedule-fights-warm-up",
            "warning",
            "The gate is released when the learning rate is spent",
            (
                Evidence("the gate's release", Quantity(release, "step"), "gate/mean"),
                Evidence("learning rate there", Quantity(float(there[0])), RATE),
                Evidence("as a share of its largest", Quantity(share), RATE),
            ),
            _too_late(share),
            (release, int(context.run.steps[-1])),
        )
    ]


def _too_late(share: float) -> Phrase:
    return say("What is left of the learning rate, {share:.2g} of it, moves α by next to nothing.", share=share)
