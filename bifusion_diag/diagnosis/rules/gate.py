"""Rules of the fusion gate's α."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.diagnosis.criteria import warm_up_steps
from bifusion_diag.diagnosis.findings import Context, Evidence, Finding, Severity
from bifusion_diag.diagnosis.phrase import Phrase, join, say
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity, number
from bifusion_diag.diagnosis.rules.declared import alpha_where_seen, declared
from bifusion_diag.record.schema import Series


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
    seen = alpha_where_seen(context, mean.value, number(valid))
    if seen is not None:
        evidence.append(Evidence("mean α of the points with a view, derived", Quantity(seen), "gate/mean"))
    explained = mean.value < low and seen is not None and low <= seen <= high
    mechanism = join(
        [
            "The fusion leans on the 3D branch." if mean.value < low else "The fusion leans on the 2D branch.",
            "Points without a valid view have α fixed at a low value. That alone pulls the mean down here: where a "
            "view sees the point, α is in the band."
            if explained
            else "Points without a valid view have α fixed at a low value, so a low valid share alone pulls the mean "
            "down."
            if mean.value < low and seen is None
            else "",
        ]
    )
    title = say("Mean α lies outside [{low}, {high}]", low=low, high=high)
    severity: Severity = "note" if explained else "warning"
    return [Finding("alpha-out-of-band", severity, title, tuple(evidence), mechanism)]


def alpha_stuck(context: Context) -> list[Finding] | NotMeasured:
    """α does not move after the warm-up, in which it is frozen by design."""
    mean = context.run.series("gate/mean")
    if mean is None:
        return NotMeasured("gate/mean was not recorded")
    if declared(context.run.settings, "model.fusion") == "simple":
        return NotMeasured("this fusion learns no α: it takes the mean of both branches")
    later = (mean.steps >= warm_up_steps(context.run)) & np.isfinite(mean.value)
    if (count := int(later.sum())) < context.thresholds.min_steps:
        return NotMeasured(_too_few(count, context.thresholds.min_steps))
    values, derived = _without_fixed(context, mean, later)
    spread = float(values.std())
    if spread >= context.thresholds.alpha_stuck:
        return []
    label = "standard deviation of the mean α of points with a view, derived" if derived else _SPREAD
    evidence = (
        Evidence(label, Quantity(spread), "gate/mean"),
        Evidence("its mean", Quantity(float(values.mean())), "gate/mean"),
    )
    mechanism = "The gate is not learning, nor does α depend on the features: it is the same in every batch."
    title = "α does not move after the warm-up"
    return [Finding("alpha-stuck", "warning", title, evidence, mechanism)]


_SPREAD = "standard deviation of the mean α"


def _too_few(count: int, needed: int) -> Phrase:
    return say("{count} steps after the warm-up; {needed} are needed", count=count, needed=needed)


def _without_fixed(context: Context, mean: Series, later: NDArray[np.bool_]) -> tuple[NDArray[np.float64], bool]:
    """The mean α of points with a view at these steps, where the record tells it: the mean over all points moves with
    the share of points without one, even if the gate does not. Else the plain mean. And which of the two it is."""
    share = context.run.series("projection/valid_share")
    plain = mean.value[later]
    if share is None or not share.exact or not mean.exact or not np.array_equal(share.steps, mean.steps):
        return plain, False
    pairs = zip(plain.tolist(), share.value[later].tolist(), strict=True)
    seen = [alpha_where_seen(context, alpha, valid) for alpha, valid in pairs if np.isfinite(valid)]
    known = np.array([alpha for alpha in seen if alpha is not None])
    return (known, True) if known.size >= context.thresholds.min_steps else (plain, False)


def gate_saturated(context: Context) -> list[Finding] | NotMeasured:
    """Most of α is at the ends."""
    low, high = context.reading("gate/share_lt_0.05"), context.reading("gate/share_gt_0.95")
    if isinstance(low, NotMeasured) or isinstance(high, NotMeasured):
        return NotMeasured("no finite shares of α at its ends were recorded (probe gate)")
    if (low.value or 0.0) + (high.value or 0.0) <= context.thresholds.saturated_share:
        return []
    if declared(context.run.settings, "model.fusion") == "simple":
        return []  # α is ½ or 0 by definition, and nothing learns it
    evidence = [Evidence("α < .05", low, "gate/share_lt_0.05"), Evidence("α > .95", high, "gate/share_gt_0.95")]
    valid = context.reading("projection/valid_share")
    if isinstance(valid, Quantity):
        evidence.append(Evidence("valid share", valid, "projection/valid_share"))
    mechanism = "There the slope of the sigmoid is below 0.05: the gate hardly learns from these points."
    return [Finding("gate-saturated", "warning", "The gate is saturated", tuple(evidence), mechanism)]
