"""Stages, learning rate, weights of the losses and the gate's release over the whole run, and where they collide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from bifusion_diag.diagnosis.phrase import join, say
from bifusion_diag.experiments.audit.bench import Bench, Measured, part_of
from bifusion_diag.experiments.audit.calendar import Phase
from bifusion_diag.experiments.audit.gradient_flow import CLIP, listed
from bifusion_diag.experiments.audit.result import Cell, Draft, Section
from bifusion_diag.model.gate import LearnedGate

GROUPS = {
    "semantic": ("semantic",),
    "instance": ("instance_class", "instance_bce", "instance_dice", "instance_mask", "instance_score", "instance_box"),
    "clip_align": ("clip_align",),
    "spatial_consistency": ("spatial_consistency",),
    "no_view": ("no_view",),
}
RULE = "schedule-fights-warm-up"


def schedule(bench: Bench) -> Section:
    """The calendar, and its conflicts."""
    draft = Draft("schedule", "Calendar of the run")
    phases = bench.phases
    held = any(phase.gate_held for phase in phases)
    rows: list[list[Cell]] = []
    for phase in phases:
        weights = [phase.weights[name] for name in GROUPS]
        gate = "½" if phase.gate_held else "learns" if held else "–"
        span = say("{first}–{last}", first=phase.begin, last=phase.end - 1)
        rows.append([span, phase.stage.name, gate, phase.rates[0], phase.rates[1], *weights])
    columns = ("steps", "stage", "gate", "lr from", "to", "semantic", "instance", "clip", "spatial", "no view")
    draft.table("Calendar of the run", columns, rows)
    for number, phase in enumerate(phases):
        draft.number(f"begin/{number}", say("first step of phase {number}", number=number), phase.begin, "steps")
    _short(draft, bench)
    _weighed_for_nothing(draft, bench)
    _gate_never(draft, bench)
    _coincide(draft, bench)
    _late_release(draft, bench)
    return draft.done()


def _short(draft: Draft, bench: Bench) -> None:
    """A stage that is over before the optimiser's moments are worth anything."""
    lengths: dict[str, int] = {}
    for phase in bench.phases:
        lengths[phase.stage.name] = lengths.get(phase.stage.name, 0) + phase.end - phase.begin
    name = min(lengths, key=lambda stage: lengths[stage])
    shortest = draft.number(
        "shortest_stage", say("steps of the shortest stage, {stage}", stage=name), lengths[name], "steps"
    )
    if len(lengths) > 1 and lengths[name] < bench.thresholds.stage_steps:
        reference = bench.settings.training.reference_steps
        draft.report(
            "stage-too-short",
            "note",
            say("Stage {stage} has {steps} steps", stage=name, steps=lengths[name]),
            say(
                "The documents' counts are scaled from {reference} steps to {steps}. AdamW's mean square looks back "
                "over 1,000 steps, its mean over 10: a stage this short shows that the code runs, not how it trains.",
                reference=reference,
                steps=bench.settings.training.steps,
            ),
            shortest,
        )


def _weighed_for_nothing(draft: Draft, bench: Bench) -> None:
    """A term weighs something while all that it reaches is frozen."""
    for measured in bench.measured:
        for group, terms in GROUPS.items():
            if not measured.phase.weights[group]:
                continue
            reached = {
                name for term in terms for name, norm in bench.term_gradients.get(term, {}).items() if norm is not None
            }
            if reached and not reached & measured.trainable:
                weight = draft.number(
                    f"idle/{group}",
                    say("weight of {group} in stage {stage}", group=group, stage=measured.phase.stage.name),
                    measured.phase.weights[group],
                )
                draft.report(
                    RULE,
                    "warning",
                    say(
                        "{group} weighs something in stage {stage} and all that it reaches is frozen",
                        group=group,
                        stage=measured.phase.stage.name,
                    ),
                    "The stage and the schedule of the weights do not know of each other.",
                    weight,
                    term=group,
                    steps=(measured.phase.begin, measured.phase.end - 1),
                )
                return


def _gate_never(draft: Draft, bench: Bench) -> None:
    """The gate is held beyond the end of the run, or beyond the stage in which it should begin to learn."""
    gates = [module for module in bench.model.modules() if isinstance(module, LearnedGate)]
    if not gates:
        return
    steps = bench.settings.training.steps
    release = next((phase.begin for phase in bench.phases if not phase.gate_held), steps)
    learns = next((one.phase.begin for one in bench.measured if _gate_learns(one)), steps)
    released = draft.number("gate_released", "step from which α is no longer ½", release, "steps")
    begins = draft.number("gate_learns", "step from which the gate learns", learns, "steps")
    if learns >= steps:
        draft.report(
            RULE,
            "warning",
            "The gate never learns in this run",
            "It is held at α = ½, or frozen by its stage, until the last step.",
            released,
            begins,
            module="encoder.gate",
            remedy={"model.gate.early_steps": 3000} if release >= steps else None,
        )
    elif learns > release:
        draft.report(
            RULE,
            "note",
            say(
                "The gate makes α from step {release} on and learns from step {learns} on",
                release=release,
                learns=learns,
            ),
            "In between α comes out of random weights that the stage keeps frozen.",
            released,
            begins,
            module="encoder.gate",
            steps=(release, learns - 1),
        )


def _gate_learns(measured: Measured) -> bool:
    return not measured.phase.gate_held and any(
        part_of(name) == "encoder.gate" and not name.startswith("encoder.gate.channel") for name in measured.trainable
    )


def _coincide(draft: Draft, bench: Bench) -> None:
    """Several things change within a few steps: what follows cannot be put down to one of them."""
    window = bench.thresholds.schedule_distance
    clusters: list[list[_Change]] = []
    for change in _changes(bench.phases):
        if clusters and change.step - clusters[-1][-1].step <= window:
            clusters[-1].append(change)
        else:
            clusters.append([change])
    mixed = [cluster for cluster in clusters if len({change.of_weights for change in cluster}) == 2]
    worst = max(mixed, key=len, default=[])
    title = say("most things that change within {window} steps, stage and weights among them", window=window)
    together = draft.number("together", title, len(worst))
    if not worst:
        return
    first, last = worst[0].step, worst[-1].step
    draft.report(
        RULE,
        "note",
        say("Stage and loss weights change together at step {step}", step=first)
        if first == last
        else say("Stage and loss weights change together at steps {first} to {last}", first=first, last=last),
        join(
            [
                say("{changes}.", changes=join((change.text for change in worst), "; ")),
                "If the gradient jumps there, it cannot be told which of them did it.",
            ]
        ),
        together,
        steps=(first, last),
    )


class _Change(NamedTuple):
    step: int
    of_weights: bool
    text: str


def _changes(phases: Sequence[Phase]) -> Iterator[_Change]:
    """Everything that changes in the course of the run."""
    for before, phase in pairwise(phases):
        if before.stage is not phase.stage:
            yield _Change(phase.begin, False, say("stage {name} begins", name=phase.stage.name))
        if before.gate_held and not phase.gate_held:
            yield _Change(phase.begin, False, "the gate is released")
        for name in GROUPS:
            old, new = before.weights[name], phase.weights[name]
            if old != new:
                text = say("{name} goes from {old:g} to {new:g}", name=name, old=old, new=new)
                yield _Change(phase.begin, True, text)


def _late_release(draft: Draft, bench: Bench) -> None:
    """What a stage releases while the learning rate is nearly gone hardly learns."""
    top = bench.settings.optim.lr
    for before, measured in zip(bench.measured, bench.measured[1:], strict=False):
        fresh = measured.trainable - before.trainable
        if not fresh:
            continue
        parts = list(dict.fromkeys(map(part_of, fresh)))
        scale = bench.settings.optim.clip_lr_scale if measured.phase.stage.slow_clip and parts == [CLIP] else 1.0
        share = measured.phase.rates[0] * scale / top
        noted = draft.number(
            f"released/{measured.phase.begin}",
            say("learning rate where {parts} begins to learn, as a share of lr", parts=listed(sorted(parts))),
            share,
        )
        if share < bench.thresholds.release_rate:
            draft.report(
                RULE,
                "warning",
                say(
                    "{parts} begins to learn at {share:.1%} of the learning rate",
                    parts=listed(sorted(parts)),
                    share=share,
                ),
                "The learning rate has fallen to nearly nothing before the stage that needs it.",
                noted,
                steps=(measured.phase.begin, measured.phase.begin),
                count=1,
            )
