"""The rules: each looks for one thing in a record. A new rule is a function and a line in `RULES`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bifusion_diag.diagnosis.count_rules import (
    attention_masked_rows,
    data_nonfinite,
    empty_matches,
    labels_out_of_range,
    nonfinite_output,
)
from bifusion_diag.diagnosis.criteria import warm_up_steps
from bifusion_diag.diagnosis.findings import Context, Evidence, Finding, Rule
from bifusion_diag.diagnosis.incident_rules import incident_findings
from bifusion_diag.diagnosis.measures import LISTED_STEPS
from bifusion_diag.diagnosis.names import COEFFICIENT, NORM, TOTAL
from bifusion_diag.diagnosis.origins import Origin, most_common_place
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity, Reading
from bifusion_diag.diagnosis.spikes import FACTOR, WINDOW

LOSS_FACTOR = 1.5  # a loss above so many times its median of the steps before has risen

SANITIZE = "model.projection.sanitize"
#: Its ways other than 'strict', and what each makes of non-finite camera coordinates.
LETS_THROUGH = {
    "replace": " This run replaces such coordinates by the untransformed points: finite, and wrong.",
    "clamp": " This run clamps such coordinates, which bounds infinity and keeps NaN: a NaN pixel makes every feature "
    "of its scene NaN.",
    "none": " This run goes on with such coordinates: they give NaN pixels, which make every feature of the scene NaN.",
}


def nonfinite_loss(context: Context) -> list[Finding] | NotMeasured:
    """A loss term is NaN or infinite: one finding a term."""
    if context.run.series(TOTAL) is None:
        return NotMeasured(f"{TOTAL} was not recorded")
    if (untraced := _untraced(context)) is not None:
        return untraced
    findings = []
    for term in dict.fromkeys(term for origin in context.origins for term in origin.terms):
        steps = [origin for origin in context.origins if term in origin.terms]
        remedy = None
        if context.settings.get("losses.instance.empty_match") == "nan" and term.startswith("inst"):
            remedy = {"losses.instance.empty_match": "zero"}
        elif context.settings.get(SANITIZE) in LETS_THROUGH and _mostly_badly_projected(context, steps):
            remedy = {SANITIZE: "strict"}
        known = [finite for origin in steps if (finite := _is_finite(context, NORM, origin.step)) is not None]
        finite_norm = sum(known)
        if finite_norm:
            mechanism = (
                f"At {finite_norm} of {len(known)} steps every gradient is finite all the same: the term is averaged "
                "over nothing or is cut off from the weights, and skipping the step would throw good gradients away."
            )
        elif known:
            mechanism = "The gradient norm is non-finite at the same steps: the term reaches the weights."
        else:
            mechanism = "The record does not tell whether the gradients of these steps are finite."
        with_finite: Reading = (
            Quantity(finite_norm, "steps") if known else NotMeasured("no gradient norm of these steps")
        )
        findings.append(
            Finding(
                "nonfinite-loss",
                "error",
                f"Loss term {term} is non-finite",
                (
                    *_steps_evidence(context, steps, f"loss/{term}/raw"),
                    Evidence("of these with a finite gradient norm", with_finite, NORM),
                ),
                mechanism,
                *_extent(steps),
                term=term,
                samples=steps[0].scenes,
                remedy=remedy,
            )
        )
    return findings


def nonfinite_gradient(context: Context) -> list[Finding] | NotMeasured:
    """The loss is finite and the gradient is not: one finding a module where it starts."""
    norm = context.run.series(NORM)
    if norm is None:
        return NotMeasured(f"{NORM} was not recorded")
    if (untraced := _untraced(context)) is not None:
        return untraced
    started = [origin for origin in context.origins if origin.kind == "non-finite" and not origin.terms]
    findings = []
    for module in dict.fromkeys(origin.module for origin in started):
        steps = [origin for origin in started if origin.module == module]
        place = f"in {module}" if module else "in a place that the record does not show (probe grads tells)"
        remedy = None
        if context.settings.get(SANITIZE) in LETS_THROUGH and _mostly_badly_projected(context, steps):
            remedy = {SANITIZE: "strict"}
        findings.append(
            Finding(
                "nonfinite-gradient",
                "error",
                f"Non-finite gradient with a finite loss, first {place}",
                _steps_evidence(context, steps, NORM),
                "It arises in the backward pass. One non-finite element makes the total norm non-finite; clipping by "
                "that norm then spreads it to every gradient, and an optimiser step to every weight.",
                *_extent(steps),
                module=module,
                samples=steps[0].scenes,
                remedy=remedy,
            )
        )
    return findings


def gradient_spike(context: Context) -> list[Finding] | NotMeasured:
    """Jumps of the gradient norm: one finding."""
    if isinstance(reading := context.reading("spikes"), NotMeasured):
        return reading
    steps = [origin for origin in context.origins if origin.kind == "spike"]
    if not steps:
        return []
    place = most_common_place(steps)
    evidence = _steps_evidence(context, steps, NORM)
    mechanism = _loss_at_spikes(context, [origin.step for origin in steps])
    module = None
    if place is not None:
        module, count = place
        growths = [origin.growth or 0.0 for origin in steps if origin.module == module]
        growth = max(growths)
        evidence += (Evidence(f"largest growth in {module}", Quantity(growth, "×"), f"grads/{module}/param_norm"),)
        what = (
            "the first module of the backward pass whose gradient jumps"
            if min(growths) > FACTOR
            else "the first module of the backward pass whose gradient jumps, or the one whose gradient grew most"
            if growth > FACTOR
            else f"the module whose gradient grew most; no module's grew more than {FACTOR:g} ×"
        )
        mechanism += f" At {count} of {len(steps)}, {module} is {what}."
    return [
        Finding(
            "gradient-spike",
            "warning",
            "The gradient norm jumps",
            evidence,
            mechanism.strip(),
            *_extent(steps),
            module=module,
            samples=steps[0].scenes,
        )
    ]


def clipping_always_on(context: Context) -> list[Finding] | NotMeasured:
    """Nearly every step is clipped."""
    share = context.reading("clipped_share")
    if isinstance(share, NotMeasured):
        return share
    if share.value is None or share.value <= context.thresholds.clipped_share:
        return []
    return [
        Finding(
            "clipping-always-on",
            "note",
            "Nearly every step is clipped",
            (
                Evidence("clipped steps", share, COEFFICIENT),
                Evidence("mean shrink factor", context.reading("shrink_factor"), COEFFICIENT),
            ),
            "With clipping always on every step has the same gradient norm: its limit acts as a learning rate, and a "
            "term with a large gradient takes its share from all others.",
        )
    ]


def alpha_out_of_band(context: Context) -> list[Finding] | NotMeasured:
    """The mean α leaves the documents' band."""
    mean = context.reading("gate/mean")
    if isinstance(mean, NotMeasured) or mean.value is None:
        return mean if isinstance(mean, NotMeasured) else []
    low, high = context.thresholds.alpha_low, context.thresholds.alpha_high
    if low <= mean.value <= high:
        return []
    valid = context.reading("projection/valid_share")
    evidence = [Evidence("mean α", mean, "gate/mean")]
    if isinstance(valid, Quantity):
        evidence.append(Evidence("valid share", valid, "projection/valid_share"))
    branch = "3D" if mean.value < low else "2D"
    mechanism = f"The fusion leans on the {branch} branch."
    if branch == "3D":
        mechanism += (
            " Points without a valid view have α fixed at a low value, so a low valid share alone pulls the mean down."
        )
    title = f"Mean α lies outside [{low}, {high}]"
    return [Finding("alpha-out-of-band", "warning", title, tuple(evidence), mechanism)]


def alpha_stuck(context: Context) -> list[Finding] | NotMeasured:
    """α does not move after the warm-up, in which it is frozen by design."""
    mean = context.run.series("gate/mean")
    if mean is None:
        return NotMeasured("gate/mean was not recorded")
    later = mean.value[(mean.steps >= warm_up_steps(context.run)) & np.isfinite(mean.value)]
    if later.size < context.thresholds.min_steps:
        return NotMeasured(f"{later.size} steps after the warm-up; {context.thresholds.min_steps} are needed")
    spread = float(later.std())
    if spread >= context.thresholds.alpha_stuck:
        return []
    evidence = (Evidence("standard deviation of the mean α", Quantity(spread), "gate/mean"),)
    return [
        Finding("alpha-stuck", "warning", "α does not move after the warm-up", evidence, "The gate is not learning.")
    ]


def gate_saturated(context: Context) -> list[Finding] | NotMeasured:
    """Most of α is at the ends."""
    low, high = context.reading("gate/share_lt_0.05"), context.reading("gate/share_gt_0.95")
    if isinstance(low, NotMeasured) or isinstance(high, NotMeasured):
        return NotMeasured("no finite shares of α at its ends were recorded (probe gate)")
    if (low.value or 0.0) + (high.value or 0.0) <= context.thresholds.saturated_share:
        return []
    evidence = (Evidence("α < .05", low, "gate/share_lt_0.05"), Evidence("α > .95", high, "gate/share_gt_0.95"))
    mechanism = "There the slope of the sigmoid is below 0.05: the gate hardly learns from these points."
    return [Finding("gate-saturated", "warning", "The gate is saturated", evidence, mechanism)]


def projection_nonfinite(context: Context) -> list[Finding] | NotMeasured:
    """Points are projected to NaN or infinity."""
    series = [context.run.series(f"projection/{name}") for name in ("nan", "inf")]
    if series[0] is None or series[1] is None:
        return NotMeasured("no projection was recorded")
    bad = np.union1d(*(one.steps[one.max > 0] for one in series if one is not None))
    if not bad.size:
        return []
    exact = all(one.exact for one in series if one is not None)  # else these are buckets of several steps
    count: Reading = Quantity(bad.size, "steps") if exact else NotMeasured("the record is reduced")
    way = str(context.settings.get(SANITIZE))
    mechanism = "A pose or a point of these scenes is non-finite (ScanNet marks lost tracking with a pose of −inf)."
    mechanism += LETS_THROUGH.get(way, "")
    return [
        Finding(
            "projection-nonfinite",
            "warning",
            "Points are projected to NaN or infinity",
            (
                Evidence("steps", count, "projection/inf"),
                Evidence("NaN coordinates", context.reading("projection/nan"), "projection/nan"),
                Evidence("infinite coordinates", context.reading("projection/inf"), "projection/inf"),
            ),
            mechanism,
            (int(bad[0]), int(bad[-1])),
            int(bad.size) if exact else None,
            remedy={SANITIZE: "strict"} if way in LETS_THROUGH else None,
        )
    ]


def low_valid_share(context: Context) -> list[Finding] | NotMeasured:
    """Few points have a valid view."""
    share = context.reading("projection/valid_share")
    if isinstance(share, NotMeasured):
        return share
    if share.value is None or share.value >= context.thresholds.valid_share:
        return []
    evidence = (Evidence("mean valid share", share, "projection/valid_share"),)
    mechanism = "Only these points receive 2D features; the 2D losses are averaged over few points."
    return [Finding("low-valid-share", "warning", "Few points have a valid view", evidence, mechanism)]


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
    evidence = tuple(Evidence(f"largest |x|, {key.split('/')[1]}", reading, key) for key, reading in high.items())
    mechanism = f"Document 002 expects features within ±{limit:g}."
    return [Finding("clip-out-of-range", "warning", "CLIP features are out of range", evidence, mechanism)]


def scale_mismatch(context: Context) -> list[Finding] | NotMeasured:
    """2D and 3D features have very different norms."""
    ratio = context.reading("clip/ratio_2d_3d")
    if isinstance(ratio, NotMeasured):
        return ratio
    limit = context.thresholds.norm_ratio
    if ratio.value is None or 1 / limit <= ratio.value <= limit:
        return []
    small = "3D" if ratio.value > limit else "2D"
    evidence = (Evidence("median 2D : 3D norm ratio", ratio, "clip/ratio_2d_3d"),)
    mechanism = f"In the fused feature the {small} branch is drowned."
    return [Finding("scale-mismatch", "warning", "2D and 3D features differ in scale", evidence, mechanism)]


def dominant_term(context: Context) -> list[Finding] | NotMeasured:
    """One term is nearly all of the loss."""
    shares = {key: reading for key, reading in context.measures.readings.items() if key.startswith("loss_share/")}
    measured = {key: reading for key, reading in shares.items() if isinstance(reading, Quantity)}
    if not measured:
        return NotMeasured("the share of the loss terms was not measured")
    findings = []
    for key, reading in measured.items():
        if len(measured) > 1 and reading.value is not None and reading.value > context.thresholds.dominant_term:
            term = key.split("/", 1)[1]
            evidence: tuple[Evidence, ...] = (Evidence("mean share of the loss", reading, f"loss/{term}/weighted"),)
            title = f"{term} is nearly all of the loss"
            mechanism = "A share of the loss is not a share of the gradient, which this record does not hold."
            gradient = context.reading(f"gradient_share/{term}")
            if isinstance(gradient, Quantity):
                evidence += (Evidence("median share of the gradient", gradient, f"loss_gradients/{term}/share"),)
                mechanism = "A share of the loss is not a share of the gradient, which stands beside it."
            findings.append(Finding("dominant-term", "note", title, evidence, mechanism, term=term))
    return findings


RULES: tuple[Rule, ...] = (
    Rule("incident", "Bad steps taken apart", incident_findings),
    Rule("nonfinite-loss", "Non-finite loss", nonfinite_loss),
    Rule("nonfinite-gradient", "Non-finite gradient", nonfinite_gradient),
    Rule("gradient-spike", "Spikes of the gradient norm", gradient_spike),
    Rule("nonfinite-output", "Non-finite output of a module", nonfinite_output),
    Rule("attention-masked-rows", "Attention rows without a key", attention_masked_rows),
    Rule("empty-match", "Scenes without a matched query", empty_matches),
    Rule("labels-out-of-range", "Labels out of range", labels_out_of_range),
    Rule("data-nonfinite", "Non-finite data", data_nonfinite),
    Rule("projection-nonfinite", "Non-finite projection", projection_nonfinite),
    Rule("clipping-always-on", "Clipping always on", clipping_always_on),
    Rule("alpha-out-of-band", "Mean α outside its band", alpha_out_of_band),
    Rule("alpha-stuck", "α stuck after the warm-up", alpha_stuck),
    Rule("gate-saturated", "Gate saturated", gate_saturated),
    Rule("low-valid-share", "Low valid share", low_valid_share),
    Rule("clip-out-of-range", "CLIP features out of range", clip_out_of_range),
    Rule("scale-mismatch", "2D and 3D features differ in scale", scale_mismatch),
    Rule("dominant-term", "One term dominates the loss", dominant_term),
)


def _is_finite(context: Context, name: str, step: int) -> bool | None:
    """Whether a value is finite; None where the record doesn't tell."""
    series = context.run.series(name)
    if series is None:
        return None
    here = np.flatnonzero((series.steps <= step) & (step <= series.last))
    if not here.size or series.missing[here[0]]:
        return None
    nonfinite = series.nonfinite[here[0]]
    return None if 0 < nonfinite < series.rows[here[0]] else bool(nonfinite == 0)


def _untraced(context: Context) -> NotMeasured | None:
    """Why bad steps that are known have no origin, where that is so."""
    if context.measures.bad and not context.measures.origins:
        return NotMeasured("there are bad steps, but the record is reduced and holds no origins of them")
    return None


def _loss_at_spikes(context: Context, steps: Sequence[int]) -> str:
    """What the total loss does at these steps, in words; "" where the record doesn't tell."""
    total = context.run.series(TOTAL)
    if total is None:
        return ""
    if not total.exact:
        return "The loss is finite at these steps."
    risen = 0
    for step in steps:
        place = int(np.searchsorted(total.steps, step))
        before = total.value[max(0, place - WINDOW) : place]
        before = before[np.isfinite(before)]
        risen += bool(before.size and total.value[place] > LOSS_FACTOR * np.median(before))
    if not risen:
        return "The loss is finite at these steps and does not rise with the gradient norm."
    return (
        f"The loss is finite at these steps; at {risen} of {len(steps)} it rises too, to more than {LOSS_FACTOR:g} × "
        f"its median of the {WINDOW} steps before."
    )


def _mostly_badly_projected(context: Context, origins: Sequence[Origin]) -> bool:
    """Whether at least half of these steps also have non-finite camera coordinates."""
    series = [context.run.series(f"projection/{name}") for name in ("nan", "inf")]
    bad = {int(step) for one in series if one is not None for step in one.steps[one.max > 0]}
    return 2 * sum(origin.step in bad for origin in origins) >= len(origins)


def _extent(origins: Sequence[Origin]) -> tuple[tuple[int, int], int]:
    return (origins[0].step, origins[-1].step), len(origins)


def _steps_evidence(context: Context, origins: Sequence[Origin], series: str) -> tuple[Evidence, ...]:
    measures = context.measures
    all_listed = max(len(measures.nonfinite), len(measures.spikes)) < LISTED_STEPS
    label = "steps" if all_listed else f"steps, of the {len(measures.origins)} bad ones that were traced"
    return (
        Evidence(label, Quantity(len(origins), "steps"), series),
        Evidence("first step", Quantity(origins[0].step, "step"), series),
    )
