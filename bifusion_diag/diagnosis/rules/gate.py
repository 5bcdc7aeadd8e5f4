"""Rules of the fusion gate's α."""

from __future__ import annotations

import numpy as np

from bifusion_diag.diagnosis.criteria import warm_up_steps
from bifusion_diag.diagnosis.findings import Context, Evidence, Finding
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity


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
