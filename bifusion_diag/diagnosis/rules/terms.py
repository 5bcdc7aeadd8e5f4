"""Rules of the loss terms against each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bifusion_diag.diagnosis.findings import Context, Evidence, Finding, Severity
from bifusion_diag.diagnosis.instruments import GRADIENT_COSINE, GRADIENT_SHARE, matching
from bifusion_diag.diagnosis.phrase import join, say
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity
from bifusion_diag.diagnosis.rules.series import finite_from
from bifusion_diag.record.schema import Run, Series

FEWEST = 5  # measured steps from which on "always" is said: five of one sign by chance are 3 %
CHANCE = 0.05
#: Schedule of the weights → terms whose own weight counts only where it is 0.
_REPLACED = {"staged": ("semantic", "instance", "clip_align"), "progressive_clip": ("clip_align",)}


def dominant_term(context: Context) -> list[Finding] | NotMeasured:
    """One term is nearly all of the loss, or of the gradient on what the terms share."""
    shares = {key: reading for key, reading in context.measures.readings.items() if key.startswith("loss_share/")}
    measured = {key: reading for key, reading in shares.items() if isinstance(reading, Quantity)}
    gradients = {term: series for term, series in matching(context.run, GRADIENT_SHARE) if series.stats.p50 is not None}
    if not measured and not gradients:
        return NotMeasured("neither the terms' share of the loss (probe losses) nor of the gradient was measured")
    findings = _of_the_gradient(context, gradients)
    told = {finding.term for finding in findings}
    for key, reading in measured.items():
        term = key.split("/", 1)[1]
        if len(measured) < 2 or reading.value is None or reading.value <= context.thresholds.dominant_term:
            continue
        if term in told:
            continue
        evidence: tuple[Evidence, ...] = (Evidence("mean share of the loss", reading, f"loss/{term}/weighted"),)
        mechanism = "A share of the loss is not a share of the gradient, which this record does not hold."
        gradient = context.reading(f"gradient_share/{term}")
        if isinstance(gradient, Quantity):
            evidence += (Evidence("median share of the gradient", gradient, f"loss_gradients/{term}/share"),)
            mechanism = "A share of the loss is not a share of the gradient, which stands beside it."
        title = say("{term} is nearly all of the loss", term=term)
        findings.append(Finding("dominant-term", "note", title, evidence, mechanism, term=term))
    return findings


def conflicting_terms(context: Context) -> list[Finding] | NotMeasured:
    """Two terms pull the weights that they share in opposite directions, step after step."""
    cosines = dict(matching(context.run, GRADIENT_COSINE))
    shares = {term: series.stats.p50 or 0.0 for term, series in matching(context.run, GRADIENT_SHARE)}
    if not cosines:
        return NotMeasured("the gradients of the terms were not compared (probe loss_gradients)")
    count = max(series.stats.count - series.stats.nonfinite for series in cosines.values())
    if count < FEWEST:
        return NotMeasured(say("{n} steps were measured; {needed} are needed", n=count, needed=FEWEST))
    findings = []
    for pair, series in cosines.items():
        one, _, other = pair.partition("/")
        middle = series.stats.p50
        if middle is None or middle > -context.thresholds.conflict_cosine or not _mostly_negative(series):
            continue
        if min(shares.get(one, 0.0), shares.get(other, 0.0)) < context.thresholds.conflict_share:
            continue
        evidence = (
            Evidence("median cosine", Quantity(middle), series.name),
            Evidence("steps that were measured", Quantity(series.stats.count, "steps"), series.name),
            Evidence(say("median share of {term}", term=one), Quantity(shares[one]), f"loss_gradients/{one}/share"),
            Evidence(
                say("median share of {term}", term=other), Quantity(shares[other]), f"loss_gradients/{other}/share"
            ),
        )
        mechanism = join(
            [
                "Each undoes a part of what the other does; the sum is shorter than its parts, and whichever is larger "
                "at a step decides. It is no fault by itself: terms that share weights may have to compromise.",
                _place(context.run),
            ]
        )
        title = say("{one} and {other} pull in opposite directions", one=one, other=other)
        findings.append(Finding("conflicting-terms", "warning", title, evidence, mechanism, term=one))
    return findings


def _of_the_gradient(context: Context, gradients: Mapping[str, Series]) -> list[Finding]:
    """The term that is nearly all of the gradient on what the terms share."""
    findings = []
    for term, series in gradients.items():
        middle, count = series.stats.p50, series.stats.count - series.stats.nonfinite
        if len(gradients) < 2 or middle is None or middle <= context.thresholds.dominant_term or count < FEWEST:
            continue
        evidence: tuple[Evidence, ...] = (
            Evidence("median share of the gradient", Quantity(middle), series.name),
            Evidence("steps that were measured", Quantity(count, "steps"), series.name),
        )
        share = context.reading(f"loss_share/{term}")
        drowned = True
        if isinstance(share, Quantity):
            evidence += (Evidence("mean share of the loss", share, f"loss/{term}/weighted"),)
            drowned = _beside(context, term, gradients, share) >= context.thresholds.conflict_share
        mechanism = join(
            [
                "Where the terms share weights, this one decides where these go. Clipping by the whole norm takes from "
                "the others, too.",
                "The others are a good part of the loss and next to nothing of the gradient: measured, and hardly "
                "trained."
                if drowned
                else "The others are next to nothing of the loss as well, as regularisers may be.",
                _place(context.run),
            ]
        )
        title = say("{term} is nearly all of the gradient on the shared weights", term=term)
        remedy = _lighter(context, term, middle) if drowned else None
        severity: Severity = "warning" if drowned else "note"
        findings.append(Finding("dominant-term", severity, title, evidence, mechanism, term=term, remedy=remedy))
    return findings


def _beside(context: Context, term: str, gradients: Mapping[str, Series], share: Quantity) -> float:
    """Share of the loss of the other terms that reach the compared weights too: a term of another part of the model,
    such as a critic's, is not drowned by one that it shares no weight with."""
    others = [context.reading(f"loss_share/{other}") for other in gradients if other != term]
    known = [other.value or 0.0 for other in others if isinstance(other, Quantity)]
    return sum(known) if len(known) == len(others) else 1 - (share.value or 0.0)


def _lighter(context: Context, term: str, share: float) -> dict[str, Any] | None:
    """The term's weight with which it would be half of the gradient; None where the settings have none, or a schedule
    replaces it."""
    key = f"losses.{term}.weight"
    if term in _REPLACED.get(str(context.settings.get("losses.schedule")), ()):
        return None
    try:
        weight = float(context.settings[key])
    except (KeyError, ValueError):
        return None
    return {key: float(f"{weight * (1 - share) / share:.1g}")} if weight > 0 and share < 1 else None


def _mostly_negative(series: Series) -> bool:
    """Whether a sign test says so; of a reduced record, whether 95 % of the steps are negative."""
    if not series.exact:
        return (series.stats.p95 or 0.0) < 0
    from scipy import stats  # as in diagnosis.trend

    values = finite_from(series, 0)[1]
    if values.size < FEWEST:
        return False
    negative = int(np.count_nonzero(values < 0))
    return bool(stats.binomtest(negative, values.size, alternative="greater").pvalue < CHANCE)


def _place(run: Run) -> str:
    """Where the terms were compared, as the probe has told."""
    told = [
        event.message for event in run.events if event.data.get("probe") == "loss_gradients" and event.kind == "note"
    ]
    return say("The record says where: {note}.", note=told[-1]) if told else ""
