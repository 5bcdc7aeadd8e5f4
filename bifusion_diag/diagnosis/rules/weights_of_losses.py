"""Rules of the weights that the loss terms were given: against the baseline, and of the background."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bifusion_diag.config import load_settings
from bifusion_diag.diagnosis.findings import Context, Evidence, Finding
from bifusion_diag.diagnosis.phrase import Phrase, join, say
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity
from bifusion_diag.diagnosis.rules.declared import declared, declared_number, usual

INSTANCE = "losses.instance"
NO_OBJECT = f"{INSTANCE}.no_object_weight"
PARTS = f"{INSTANCE}.parts"
STYLE = f"{INSTANCE}.style"
BASELINE = "baseline"  # the preset that a run is held to where it is compared with no other
#: What the weights of `parts` are of, in their order, in each style of the instance loss.
PART_NAMES = {
    "esam": ("class", "BCE", "Dice", "score", "box"),
    "mask3d": ("class", "BCE", "Dice"),
    "unified": ("class", "mask", "objectness"),
}
#: Weights that stand beside each other in every model.
_WEIGHTS = (
    "losses.semantic.weight",
    f"{INSTANCE}.weight",
    NO_OBJECT,
    "losses.clip_align.weight",
    "losses.spatial_consistency.weight",
    "losses.no_view.weight",
)
_LISTED = 8


def loss_weights_vs_baseline(context: Context) -> list[Finding] | NotMeasured:
    """Weights of the losses that the baseline has otherwise: one finding that lists them."""
    ours = context.run.settings
    if not weights_of(ours):
        return NotMeasured("the settings declare no weights of losses")
    if context.baseline is not None:
        theirs: Mapping[str, Any] = context.baseline.settings
        if not weights_of(theirs):
            return NotMeasured("the baseline's settings declare no weights of losses")
    else:
        theirs = load_settings(BASELINE).model_dump(mode="json")
    one, other = weights_of(theirs), weights_of(ours)
    limit = context.thresholds.weight_factor
    different = {key for key in {**one, **other} if differs(one.get(key), other.get(key), limit)}
    styles = declared(theirs, STYLE), declared(ours, STYLE)
    if not different and styles[0] == styles[1]:
        return []
    evidence: list[Evidence] = []
    for key in [key for key in {**one, **other} if key in different][:_LISTED]:
        before, now = one.get(key), other.get(key)
        evidence.append(
            Evidence(
                say("{key}: baseline {before}, this run", key=key, before="—" if before is None else f"{before:.4g}"),
                Quantity(now) if now is not None else NotMeasured("this run has no such weight"),
                key,
            )
        )
    baseline = (
        say("the run that it is compared with ({name})", name=context.baseline.header.name)
        if context.baseline is not None
        else "the preset 'baseline'"
    )
    schedule = declared(ours, "losses.schedule")
    mechanism = join(
        [
            say("Held to {baseline}.", baseline=baseline),
            say(
                "The instance losses are of different styles ({one} and {other}): their parts are not comparable one "
                "by one.",
                one=styles[0],
                other=styles[1],
            )
            if styles[0] != styles[1]
            else "",
            say("The schedule '{schedule}' replaces some of them in the course of the run.", schedule=schedule)
            if schedule not in (None, "constant")
            else "",
            "A difference is no fault; it is what a comparison of the two runs compares besides the model.",
        ]
    )
    title = say("{n} weights of losses differ from the baseline's", n=len(different))
    if not different:
        title = say("The instance loss is of another style than the baseline's")
    return [Finding("loss-weights-vs-baseline", "note", title, tuple(evidence), mechanism)]


def weights_of(settings: Mapping[str, Any]) -> dict[str, float]:
    """Every weight that the settings declare, by dotted key; those of the instance loss's parts by what they are of."""
    found = {key: value for key in _WEIGHTS if (value := declared_number(settings, key)) is not None}
    if found.get(f"{INSTANCE}.weight") == 0.0:
        found.pop(NO_OBJECT, None)
        return found
    style, parts = declared(settings, STYLE), declared(settings, PARTS)
    names = PART_NAMES.get(str(style), ())
    if isinstance(parts, list | tuple) and len(parts) == len(names):
        found |= {f"{PARTS}[{name}]": float(part) for name, part in zip(names, parts, strict=True)}
    if style == "unified":
        found.pop(NO_OBJECT, None)  # the focal loss has an α instead
    return found


def differs(one: float | None, other: float | None, factor: float) -> bool:
    """Whether two weights are further apart than a factor, or only one of them is there and is not 0."""
    if not one or not other:
        return (one or 0.0) != (other or 0.0)
    return abs(math.log(other / one)) > math.log(factor)


def background_weight(context: Context) -> list[Finding] | NotMeasured:
    """The queries without an object weigh next to nothing, or next to everything, in the classification."""
    settings = context.run.settings
    style, weight = declared(settings, STYLE), declared_number(settings, NO_OBJECT)
    scenes = declared_number(settings, "training.batch_size")
    if weight is None or scenes is None:
        return NotMeasured("the settings declare no weight of 'no object'")
    if declared_number(settings, f"{INSTANCE}.weight") == 0.0:
        return NotMeasured("the run has no instance loss")
    if style == "unified":
        return NotMeasured(
            "the focal loss weighs each query by its own probability, which is not recorded; no_object_weight has no "
            "part in it"
        )
    queries, matched = usual(context.run.series("matching/queries")), usual(context.run.series("matching/queries_mean"))
    if queries is None or matched is None or queries <= 0:
        return NotMeasured("how many queries there are, and how many are matched, was not recorded (probe matching)")
    objects = min(matched * scenes, queries)
    share = background_of_weights(weight, queries, objects) or 0.0
    low, high = context.thresholds.background_low, context.thresholds.background_high
    if low <= share <= high:
        return []
    evidence = (
        Evidence(SHARE_OF_BACKGROUND, Quantity(share), NO_OBJECT),
        Evidence("weight of 'no object'", Quantity(weight), NO_OBJECT),
        Evidence("queries a step, median", Quantity(queries, "queries"), "matching/queries"),
        Evidence("matched of these", Quantity(objects, "queries"), "matching/queries_mean"),
    )
    little = share < low
    balanced = balanced_weight(queries, objects)
    mechanism = join(
        [
            "Unmatched queries hardly count: predicting an object where there is none costs next to nothing."
            if little
            else "Unmatched queries are nearly all that counts: predicting 'no object' everywhere is nearly right.",
            _balance(balanced),
        ]
    )
    title = TOO_LITTLE if little else TOO_MUCH
    remedy = {NO_OBJECT: balanced} if balanced else None
    return [Finding("background-weight", "warning", title, evidence, mechanism, term="instance_class", remedy=remedy)]


SHARE_OF_BACKGROUND = "share of the background in the classification's weights"
TOO_LITTLE = "The background weighs too little in the classification"
TOO_MUCH = "The background outweighs the objects in the classification"


def background_of_weights(weight: float, queries: float, matched: float) -> float | None:
    """Share of unmatched queries in what the classification's mean weighs; None where nothing weighs anything."""
    background = weight * (queries - matched)
    return background / (background + matched) if background + matched > 0 else None


def balanced_weight(queries: float, matched: float) -> float | None:
    """The weight of no object that gives both the same share; None where no positive one does."""
    return _rounded(matched / (queries - matched)) if queries > matched > 0 else None


def _balance(weight: float | None) -> Phrase | str:
    if weight is None:
        return ""
    return say("With this many queries, a weight of {weight:.2g} would give both the same share.", weight=weight)


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")
