"""Rules of the gradient that the alignment loss sends: how much is let through, and how steep it is."""

from __future__ import annotations

from bifusion_diag.diagnosis.findings import Context, Evidence, Finding
from bifusion_diag.diagnosis.phrase import join, say
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity
from bifusion_diag.diagnosis.rules.declared import ALIGN, declared, declared_number, gradient_share, term_weight, usual

FLOW = f"{ALIGN}.gradient_flow"
FORMULA = f"{ALIGN}.gradient_formula"
TEMPERATURE = f"{ALIGN}.temperature"


def declared_vs_measured_flow(context: Context) -> list[Finding] | NotMeasured:
    """The share of the gradient that reaches the 2D side is another one than the settings say."""
    share = context.run.series("flow/share")
    measured = usual(share)
    if share is None or measured is None:
        return NotMeasured("the gradient at the two sides of the alignment loss was not measured (probe flow)")
    stated = declared_number(context.run.settings, FLOW)
    if stated is None:
        return NotMeasured("the settings declare no gradient_flow to compare with")
    if abs(measured - stated) <= context.thresholds.flow_error:
        return []
    evidence = (
        Evidence("declared share", Quantity(stated), FLOW),
        Evidence("measured share, median", Quantity(measured), share.name),
        Evidence("smallest measured", Quantity(share.stats.min), share.name),
        Evidence("largest measured", Quantity(share.stats.max), share.name),
    )
    swapped = abs(measured - (1 - stated)) <= context.thresholds.flow_error
    mechanism = join(
        [
            say(
                "The settings say that {stated:.3g} of the gradient is let through to the 2D side; what arrives there "
                "is {measured:.3g} of what the loss would send.",
                stated=stated,
                measured=measured,
            ),
            "That is the formula with its two weights swapped: (1 − r)·f + r·f.detach() lets 1 − r through. Document "
            "003 writes 0.95·f + 0.05·f.detach() for 5 %."
            if swapped
            else "",
        ]
    )
    remedy = None
    if swapped and declared(context.run.settings, FORMULA) == "as_written":
        remedy = {FORMULA: "as_declared"}
    return [
        Finding(
            "declared-vs-measured-flow",
            "warning",
            "The 2D side gets another share of the gradient than declared",
            evidence,
            mechanism,
            term="clip_align",
            remedy=remedy,
        )
    ]


def temperature_gain(context: Context) -> list[Finding] | NotMeasured:
    """The alignment loss is so steep that it dominates the gradient."""
    gain = context.run.series("flow/gain")
    steep = usual(gain)
    if gain is None or steep is None:
        return NotMeasured("the slope of the alignment loss was not measured (probe flow)")
    if steep <= context.thresholds.temperature_gain:
        return []
    share = gradient_share(context.measures, "clip_align")
    if share is None:
        return NotMeasured("whether the alignment loss dominates was not measured (probe loss_gradients)")
    if share <= context.thresholds.dominant_gradient:
        return []
    weight, temperature = term_weight(context.run, "clip_align"), declared_number(context.run.settings, TEMPERATURE)
    evidence = [
        Evidence("slope of the loss per pair, median", Quantity(steep), gain.name),
        Evidence("largest", Quantity(gain.stats.max), gain.name),
        Evidence("median share of the gradient", Quantity(share), "loss_gradients/clip_align/share"),
    ]
    if weight is not None:
        evidence.append(Evidence("median weight", Quantity(weight), "loss/clip_align/weighted"))
    bound = ""
    if temperature is not None:
        evidence.append(Evidence("bound of the slope, 1/τ", Quantity(1 / temperature), TEMPERATURE))
        bound = say(
            "The slope is bounded by 1/τ = {bound:.4g}: it does not grow without limit, and cannot explode by itself.",
            bound=1 / temperature,
        )
    mechanism = join(
        [
            "The gradient of −log σ(cos/τ) with respect to the cosine grows as 1/τ; times the weight of the loss it is "
            "most of what the shared weights learn from.",
            bound,
        ]
    )
    safe = 0.1  # document 002: max(τ, 0.1)
    remedy = {TEMPERATURE: safe} if temperature is not None and temperature < safe else None
    title = "The temperature makes the alignment loss dominate the gradient"
    return [Finding("temperature-gain", "warning", title, tuple(evidence), mechanism, term="clip_align", remedy=remedy)]
