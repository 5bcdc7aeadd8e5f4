"""Rules of CLIP's features: how large they are, how they meet the 3D ones, and whether what is frozen stays so."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from bifusion_diag.diagnosis.findings import Context, Evidence, Finding
from bifusion_diag.diagnosis.instruments import matching
from bifusion_diag.diagnosis.phrase import join, say
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity
from bifusion_diag.diagnosis.rules.declared import (
    ALIGN,
    declared,
    declared_number,
    early,
    gradient_share,
    late,
    term_weight,
)
from bifusion_diag.diagnosis.validation import evaluated_at
from bifusion_diag.record.schema import Run, Series

CLAMP = f"{ALIGN}.clamp"
CLIP_PART = "encoder.clip"  # of our models
UNIFORMITY = "eval/uniformity"
SIDES = {"3D": "clip/alike_3d", "2D": "clip/alike_2d"}
_ENDS = {
    "3D": ("mean cosine of two points' 3D features, first step", "the same, last quarter of the run (3D)"),
    "2D": ("mean cosine of two points' 2D features, first step", "the same, last quarter of the run (2D)"),
}
Likeness = Mapping[str, tuple[float, float]]  # side → mean cosine of two points at the beginning, at the end
ROUNDING = 1e-6  # relative: a norm that is summed in another order differs by less
FROZEN, NO_GRADIENT = 0, 1  # codes of grads/<module>/state
LISTED = 5  # modules that one finding names


def clip_out_of_range(context: Context) -> list[Finding] | NotMeasured:
    """Features past the projection head are large."""
    readings = {key: context.reading(key) for key in ("clip/head/absmax", "clip/points/absmax")}
    measured = {key: reading for key, reading in readings.items() if isinstance(reading, Quantity)}
    if not measured:
        return NotMeasured("no CLIP features past the projection head were recorded")
    limit = context.thresholds.clip_absmax
    high = {key: reading for key, reading in measured.items() if reading.value is not None and reading.value > limit}
    if not high:
        return []
    labels = {"clip/head/absmax": "largest |x|, head", "clip/points/absmax": "largest |x|, points"}
    evidence = [Evidence(labels[key], reading, key) for key, reading in high.items()]
    for key in high:
        beyond = context.reading(key.replace("absmax", "share_gt_10"))
        if isinstance(beyond, Quantity):
            evidence.append(Evidence("share of elements with |x| > 10", beyond, key.replace("absmax", "share_gt_10")))
    at_points = "clip/points/absmax" in high
    mechanism = join(
        [
            say("Document 002 expects features within ±{limit:g}.", limit=limit),
            ""
            if at_points
            else "At the points they are within: a normalisation lies between, and what is large is only its input.",
        ]
    )
    # The clamp acts on what enters the alignment loss: on the points' features, and only there.
    clamped = declared(context.run.settings, ALIGN) is not None and declared(context.run.settings, CLAMP) is not None
    use = at_points and declared(context.run.settings, ALIGN) is not None and not clamped
    return [
        Finding(
            "clip-out-of-range",
            "warning" if at_points else "note",
            "CLIP features are out of range",
            tuple(evidence),
            mechanism,
            remedy={CLAMP: 10.0} if use else None,
        )
    ]


def scale_mismatch(context: Context) -> list[Finding] | NotMeasured:
    """2D and 3D features have very different norms."""
    ratio = context.reading("clip/ratio_2d_3d")
    if isinstance(ratio, NotMeasured):
        return ratio
    limit = context.thresholds.norm_ratio
    if ratio.value is None or 1 / limit <= ratio.value <= limit:
        return []
    evidence = [Evidence("median 2D : 3D norm ratio", ratio, "clip/ratio_2d_3d")]
    norm = context.reading("clip/points/norm_mean")
    if isinstance(norm, Quantity):
        evidence.append(Evidence("median norm of the 2D features", norm, "clip/points/norm_mean"))
    mechanism = (
        "In the fused feature the 3D branch is drowned."
        if ratio.value > limit
        else "In the fused feature the 2D branch is drowned."
    )
    return [Finding("scale-mismatch", "warning", "2D and 3D features differ in scale", tuple(evidence), mechanism)]


def alignment_collapse(context: Context) -> list[Finding] | NotMeasured:
    """Under an alignment loss, the features of all points have become one."""
    run, limit = context.run, context.thresholds.alike_features
    if run.series("loss/clip_align/raw") is None:
        return NotMeasured(say("{series} was not recorded", series="loss/clip_align/raw"))
    ends = {side: (early(run.series(name)), late(run.series(name))) for side, name in SIDES.items()}
    known = {side: (begin, end) for side, (begin, end) in ends.items() if begin is not None and end is not None}
    evaluated = _uniformity(run)
    if not known and not evaluated:
        return NotMeasured("how alike features are was not measured (probe clip, or an evaluation)")
    alike = {side: (begin, end) for side, (begin, end) in known.items() if end > limit}
    if any(begin <= limit for begin, _ in alike.values()):
        return [_collapse(context, alike, evaluated)]
    if alike:
        return [
            Finding(
                "alignment-collapse",
                "note",
                "Features are all alike from the first step on",
                _likeness(alike),
                "Training did not do it: they are alike with the weights that the run began with.",
                term="clip_align",
            )
        ]
    # exp(−2 ‖x − y‖²) of unit vectors is exp(−4 (1 − cos)): the same bound for both measures
    if evaluated and evaluated[-1].value is not None and evaluated[-1].value > -4 * (1 - limit):
        return [_alike_in_evaluation(context, known, evaluated)]
    return []


def _collapse(context: Context, alike: Likeness, evaluated: tuple[Quantity, ...]) -> Finding:
    """Features that training has pulled together."""
    run = context.run
    evidence = [*_likeness(alike), *_evaluations(evaluated)]
    weight, share = term_weight(run, "clip_align"), gradient_share(context.measures, "clip_align")
    if weight is not None:
        evidence.append(Evidence("median weight of clip_align", Quantity(weight), "loss/clip_align/weighted"))
    if share is not None:
        evidence.append(
            Evidence("its median share of the gradient", Quantity(share), "loss_gradients/clip_align/share")
        )
    mechanism = join(
        [
            "The alignment loss has no negatives: it only pulls features together, and is smallest where all of them "
            "are one. Then no feature tells one point from another.",
            say(
                "This was seen after {steps} steps; a later stage that lowers the weight may undo it.",
                steps=len(run.steps),
            ),
        ]
    )
    schedule = declared(run.settings, "losses.schedule")
    return Finding(
        "alignment-collapse",
        "warning",
        "Features have collapsed: they are all alike",
        tuple(evidence),
        mechanism,
        term="clip_align",
        remedy=None if schedule in (None, "progressive_clip") else {"losses.schedule": "progressive_clip"},
    )


def _alike_in_evaluation(context: Context, known: Likeness, evaluated: tuple[Quantity, ...]) -> Finding:
    """Features that are alike where the model is evaluated, and not in training as far as that was measured."""
    evidence = [*_evaluations(evaluated), *_likeness(known)]
    momentum = declared_number(context.run.settings, "model.backbone.bn_momentum")
    if momentum is not None:
        left = Quantity((1 - momentum) ** len(context.run.steps))
        evidence.append(Evidence("share of BatchNorm's running statistics left from before the run", left, UNIFORMITY))
    mechanism = join(
        [
            "In training they are not alike. The evaluation uses BatchNorm's running statistics, which begin at 0 and "
            "1 and follow slowly: as long as they lag behind, it sees other features than training does."
            if known
            else "Whether they are alike in training too was not measured (probe clip). The evaluation uses "
            "BatchNorm's running statistics, which lag behind in a young run: it may see other features.",
        ]
    )
    title = "Features are all alike in the evaluation"
    return Finding("alignment-collapse", "note", title, tuple(evidence), mechanism, term="clip_align")


def _likeness(alike: Likeness) -> tuple[Evidence, ...]:
    return tuple(
        Evidence(label, Quantity(value), SIDES[side])
        for side, ends in alike.items()
        for label, value in zip(_ENDS[side], ends, strict=True)
    )


def _uniformity(run: Run) -> tuple[Quantity, ...]:
    """Of the first and of the last evaluation; of a single one, that one; empty without any."""
    values = evaluated_at(run.series(UNIFORMITY))[1]
    return tuple(Quantity(float(value)) for value in (values if values.size < 2 else values[[0, -1]]))


def _evaluations(evaluated: tuple[Quantity, ...]) -> tuple[Evidence, ...]:
    labels = ("uniformity of the 3D features, first evaluation", "uniformity of the 3D features, last evaluation")
    return tuple(
        Evidence(label, value, UNIFORMITY)
        for label, value in zip(labels[-len(evaluated) :], evaluated, strict=bool(evaluated))
    )


def clip_leak(context: Context) -> list[Finding] | NotMeasured:
    """What is frozen gets a gradient, or its weights change."""
    states = dict(matching(context.run, r"grads/(.+)/state"))
    if not states:
        return NotMeasured("which parameters are frozen was not recorded (probe grads)")
    reached = _reached(context.run, states)
    moved = _moved(context.run, states)
    findings = []
    if reached:
        first = min(reached.values())
        module = next(name for name, step in reached.items() if step == first)
        also = [name for name in reached if name in _changed(context.run, reached)]
        findings.append(
            Finding(
                "clip-leak",
                "error" if also else "warning",
                "A gradient reaches CLIP, which is declared frozen",
                (
                    Evidence("modules with a gradient", Quantity(len(reached), "modules"), f"grads/{module}/state"),
                    Evidence("first step", Quantity(first, "step"), f"grads/{module}/state"),
                    Evidence("of these, modules whose weights change", _count(context.run, also), _norm_name(module)),
                ),
                join(
                    [
                        "The settings say that nothing of CLIP learns (model.clip.tune: none), and its parameters "
                        "require a gradient.",
                        "Their weights change: CLIP's features are no longer those that it was trained for."
                        if also
                        else "Their weights did not change as far as this was measured: no optimiser holds them.",
                    ]
                ),
                (first, int(context.run.steps[-1])),
                module=module,
            )
        )
    still = {name: step for name, step in moved.items() if name not in reached}
    if still:
        first = min(still.values())
        module = next(name for name, step in still.items() if step == first)
        names = ", ".join(list(still)[:LISTED])
        findings.append(
            Finding(
                "clip-leak",
                "error",
                "Weights of a frozen part change",
                (
                    Evidence(
                        "frozen modules whose weights change", Quantity(len(still), "modules"), _norm_name(module)
                    ),
                    Evidence("first noticed at step", Quantity(first, "step"), _norm_name(module)),
                ),
                join(
                    [
                        say("They require no gradient and change all the same: {names}.", names=names),
                        "Momentum or weight decay goes on where gradients are set to 0 and not to None, or something "
                        "else than the optimiser writes to them.",
                    ]
                ),
                (first, first),
                module=module,
            )
        )
    return findings


def _reached(run: Run, states: dict[str, Series]) -> dict[str, int]:
    """Modules of CLIP that the settings declare frozen and that require a gradient: the first step at which they do."""
    if declared(run.settings, "model.clip.tune") != "none":
        return {}
    inside = {name: series for name, series in states.items() if name.startswith(f"{CLIP_PART}.")}
    found = {}
    for name, series in inside.items():
        here = np.flatnonzero(series.max > FROZEN)
        if here.size:
            found[name] = int(series.steps[here[0]])
    return found


def _changed(run: Run, names: dict[str, int]) -> set[str]:
    """Those of the modules whose norm of weights is not always the same."""
    found = set()
    for name in names:
        norm = run.series(_norm_name(name))
        low, high = (None, None) if norm is None else (norm.stats.min, norm.stats.max)
        if low is not None and high is not None and high - low > ROUNDING * high:
            found.add(name)
    return found


def _moved(run: Run, states: dict[str, Series]) -> dict[str, int]:
    """Modules whose norm of weights changes between two measurements with every step between them frozen: at which
    step that is noticed. Of a reduced record, none."""
    found = {}
    for name, state in states.items():
        norm = run.series(_norm_name(name))
        if norm is None or not norm.exact or not state.exact:
            continue
        there = np.flatnonzero(np.isfinite(norm.value))
        for one, other in pairwise(there.tolist()):
            between = (state.steps >= norm.steps[one]) & (state.steps < norm.steps[other])
            frozen = between.any() and (state.value[between] == FROZEN).all()
            if frozen and abs(norm.value[other] - norm.value[one]) > ROUNDING * abs(norm.value[one]):
                found[name] = int(norm.steps[other])
                break
    return found


def _norm_name(module: str) -> str:
    return f"weights/{module}/norm"


def _count(run: Run, changed: list[str]) -> Quantity | NotMeasured:
    if not run.names("weights/"):
        return NotMeasured("the weights were not measured (probe weights)")
    return Quantity(len(changed), "modules")
