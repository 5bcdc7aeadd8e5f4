"""Weights of the losses against the baseline's: as configured, and as shares of the gradient on the shared trunk."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from bifusion_diag.config import Settings, load_settings
from bifusion_diag.diagnosis.phrase import join, say
from bifusion_diag.diagnosis.quantity import NotMeasured
from bifusion_diag.diagnosis.rules.weights_of_losses import (
    SHARE_OF_BACKGROUND,
    TOO_LITTLE,
    TOO_MUCH,
    background_of_weights,
    balanced_weight,
    differs,
)
from bifusion_diag.experiments.audit.bench import Bench
from bifusion_diag.experiments.audit.gradient_flow import of_part
from bifusion_diag.experiments.audit.result import Cell, Draft, Number, Section
from bifusion_diag.model.losses.schedule import group_weights

TRUNK = "encoder.backbone"
#: What a term is for, so that other styles of the instance loss compare.
PURPOSES = {
    "semantic": "semantic",
    "instance_class": "class",
    "instance_bce": "mask",
    "instance_dice": "mask",
    "instance_mask": "mask",
    "instance_score": "score",
    "instance_box": "box",
    "clip_align": "CLIP",
    "spatial_consistency": "auxiliary",
    "no_view": "auxiliary",
}
NO_OBJECT = "losses.instance.no_object_weight"
PARTS = "losses.instance.parts"


def baseline_of(settings: Settings) -> Settings:
    """The 3D baseline on this run's data, at its grid and scale."""
    near = settings.model.backbone.voxel_size >= 0.05
    name = "baseline-5cm" if near else "baseline"
    baseline = load_settings(name, scale=settings.scale)
    return baseline.model_copy(
        update={"data": settings.data, "training": settings.training.model_copy(update={"stages": "none"})}
    )


def balance(bench: Bench) -> Section:
    """Shares of this run and of its baseline side by side."""
    draft = Draft("balance", "Loss weights against the baseline")
    own = _shares(bench.term_gradients, _last_weights(bench))
    if bench.settings.model.fusion == "none":
        draft.table(
            "Share of the gradient on the shared trunk", ("purpose", "this run"), [[k, v] for k, v in own.items()]
        )
        for purpose, value in own.items():
            draft.number(f"share/{purpose}", say("gradient share of {purpose}", purpose=purpose), value)
        if bench.settings.losses.instance.style != "unified" and bench.settings.losses.instance.weight:
            _of_weights(draft, bench)
        return draft.done()
    settings = baseline_of(bench.settings)
    bench.say("measuring the 3D baseline on the same scenes")
    reference = Bench(settings, bench.thresholds, bench.source, bench.say)
    theirs = _shares(reference.term_gradients, _last_weights(reference))
    _dominant(draft, bench, own)
    _parts(draft, bench.settings, settings)
    rows: list[list[Cell]] = []
    for purpose in dict.fromkeys(PURPOSES.values()):
        mine, other = own.get(purpose), theirs.get(purpose)
        if mine is None and other is None:
            continue
        rows.append([purpose, mine, other, *_weights(bench.settings, settings, purpose)])
        for name, found in (("share", mine), ("baseline_share", other)):
            whose = "this run" if name == "share" else "the baseline"
            draft.number(
                f"{name}/{purpose}",
                say("gradient share of {purpose} on the shared trunk, {whose}", purpose=purpose, whose=whose),
                NotMeasured("there is no such term") if found is None else found,
            )
    columns = ("purpose", "share", "baseline's", "weight", "baseline's ")
    draft.table("Share of the gradient on the shared trunk, last phase", columns, rows)
    _shifted(draft, bench, own, theirs)
    _background(draft, bench, reference)
    return draft.done()


def _last_weights(bench: Bench) -> Mapping[str, float]:
    """Weight of each term in the last phase."""
    return bench.step.output.loss.weights


def _shares(gradients: Mapping[str, Mapping[str, float | None]], weights: Mapping[str, float]) -> dict[str, float]:
    """Share of each purpose in the sum of the weighted norms on the trunk."""
    norms: dict[str, float] = {}
    for term, by_parameter in gradients.items():
        norm = of_part(by_parameter, TRUNK)
        if norm is not None:
            norms[PURPOSES[term]] = norms.get(PURPOSES[term], 0.0) + weights[term] * norm
    total = sum(norms.values())
    return {purpose: norm / total for purpose, norm in norms.items()} if total and math.isfinite(total) else {}


def _weights(own: Settings, baseline: Settings, purpose: str) -> tuple[Cell, Cell]:
    """The configured weight of a purpose in the last step, instance parts multiplied by their group's weight."""
    found = []
    for settings in (own, baseline):
        groups = group_weights(settings.losses, settings.training.steps - 1, settings.training.steps)
        names = {
            "unified": ("class", "mask", "score"),
            "esam": ("class", "mask", "mask", "score", "box"),
            "mask3d": ("class", "mask", "mask"),
        }[settings.losses.instance.style]
        weight = sum(
            groups["instance"] * part
            for name, part in zip(names, settings.losses.instance.parts, strict=True)
            if name == purpose
        )
        by_group = {"semantic": "semantic", "CLIP": "clip_align"}
        if purpose in by_group:
            weight = groups[by_group[purpose]]
        elif purpose == "auxiliary":
            weight = groups["spatial_consistency"] + groups["no_view"]
        found.append(weight)
    return found[0], found[1]


def _dominant(draft: Draft, bench: Bench, own: Mapping[str, float]) -> None:
    """One purpose is nearly all of the gradient on the trunk."""
    for purpose, share in own.items():
        if len(own) > 1 and share > bench.thresholds.dominant_term:
            noted = draft.number("dominant", say("gradient share of {purpose}", purpose=purpose), share)
            draft.report(
                "dominant-term",
                "note",
                say("{purpose} is nearly all of the gradient on the shared trunk", purpose=purpose),
                "Norms of the weighted terms' gradients on this batch, with fresh weights.",
                noted,
                module=TRUNK,
            )


def _parts(draft: Draft, own: Settings, baseline: Settings) -> None:
    """The instance parts of the same style differ from the baseline's."""
    mine, theirs = own.losses.instance, baseline.losses.instance
    if mine.style != theirs.style or mine.weight == 0 or mine.parts == theirs.parts:
        return
    titles = ("class", "BCE", "Dice", "score", "box")
    worst: tuple[float, str] = (1.0, "")
    noted = []
    for title, a, b in zip(titles, mine.parts, theirs.parts, strict=True):
        if a == b:
            continue
        noted.append(
            draft.number(
                f"part/{title}", say("weight of {part}, the baseline's is {theirs:g}", part=title, theirs=b), a
            )
        )
        factor = math.inf if not a or not b else max(a / b, b / a)
        worst = max(worst, (factor, title))
    draft.report(
        "loss-weights-vs-baseline",
        "note",  # as in a record: a difference is no fault by itself
        say(
            "Instance weights {mine} instead of the baseline's {theirs}",
            mine=_row(mine.parts),
            theirs=_row(theirs.parts),
        ),
        join(
            [
                say(
                    "Class against mask is {mine:.3g} instead of {theirs:.3g}.",
                    mine=_ratio(mine.parts),
                    theirs=_ratio(theirs.parts),
                ),
                "The baseline is known to train with its own.",
            ]
        ),
        *noted,
        remedy={PARTS: list(theirs.parts)},
    )


def _row(parts: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{part:g}" for part in parts) + "]"


def _ratio(parts: tuple[float, ...]) -> float:
    mask = parts[1] + parts[2]
    return parts[0] / mask if mask else math.inf


def _shifted(draft: Draft, bench: Bench, own: Mapping[str, float], theirs: Mapping[str, float]) -> None:
    """What only this run has takes most of the gradient on what both have."""
    new = {purpose: share for purpose, share in own.items() if purpose not in theirs}
    share = draft.number("new_share", "gradient share of the terms that the baseline has not", sum(new.values()))
    if sum(new.values()) > bench.thresholds.new_terms_share:
        draft.report(
            "loss-weights-vs-baseline",
            "warning",
            say(
                "Terms that the baseline has not take {share:.0%} of the gradient on the shared trunk",
                share=sum(new.values()),
            ),
            say("They are {names}. On the trunk that both models share they outweigh the task.", names=", ".join(new)),
            share,
            module=TRUNK,
        )


def _background(draft: Draft, bench: Bench, reference: Bench) -> None:
    """How much of the class term's gradient comes from queries without an object."""
    mine, theirs = bench.settings.losses.instance, reference.settings.losses.instance
    for name, one in (("background", bench), ("baseline_background", reference)):
        value = background_share(one)
        draft.number(
            name,
            "share of the class term's gradient from queries without an object"
            if one is bench
            else "and in the baseline",
            NotMeasured("no object was matched") if value is None else value,
        )
    if mine.style == "unified" or not mine.weight:
        return
    share, other = draft.numbers[-2:]
    weight = draft.number("no_object_weight", "weight of no object", mine.no_object_weight)
    if differs(theirs.no_object_weight, mine.no_object_weight, bench.thresholds.weight_factor):
        draft.report(
            "loss-weights-vs-baseline",
            "note",
            say(
                "Queries without an object weigh {mine:g}, in the baseline {theirs:g}",
                mine=mine.no_object_weight,
                theirs=theirs.no_object_weight,
            ),
            _MOST_MATCH_NOTHING,
            weight,
            share,
            other,
            term="instance_class",
            remedy={NO_OBJECT: theirs.no_object_weight},
        )
    _of_weights(draft, bench, weight, share)


def _of_weights(draft: Draft, bench: Bench, *evidence: Number) -> None:
    """The background's share of the classification's weights, as the rule of records has it."""
    matches = bench.step.output.loss.matches
    if matches is None:
        return
    queries = sum(map(len, bench.step.output.predictions.layers[-1].classes))
    matched = sum(len(one.queries) for one in matches)
    found = background_of_weights(bench.settings.losses.instance.no_object_weight, queries, matched)
    if found is None:
        return
    noted = draft.number("background_of_weights", SHARE_OF_BACKGROUND, found)
    low, high = bench.thresholds.background_low, bench.thresholds.background_high
    if low <= found <= high:
        return
    balanced = balanced_weight(queries, matched)
    draft.report(
        "background-weight",
        "warning",
        TOO_LITTLE if found < low else TOO_MUCH,
        _MOST_MATCH_NOTHING,
        noted,
        *evidence,
        term="instance_class",
        remedy=None if balanced is None else {NO_OBJECT: balanced},
    )


_MOST_MATCH_NOTHING = (
    "Most queries match nothing. What they weigh in the cross-entropy decides how readily the class head says "
    "'object': lower, and false objects cost little."
)


def background_share(bench: Bench) -> float | None:
    """Share of |dL/dlogits| of the class term, last layer, in queries that no object is matched with."""
    loss = bench.step.output.loss
    term = loss.terms.get("instance_class")
    if term is None or loss.matches is None:
        return None
    logits = bench.step.output.predictions.layers[-1].classes
    gradients = torch.autograd.grad(term, logits, retain_graph=True, allow_unused=True)
    background = total = 0.0
    for gradient, matches in zip(gradients, loss.matches, strict=True):
        if gradient is None:
            continue
        size = gradient.abs().sum(dim=1)
        free = torch.ones(len(size), dtype=torch.bool, device=size.device)
        free[matches.queries] = False
        background += float(size[free].sum())
        total += float(size.sum())
    return background / total if total else None
