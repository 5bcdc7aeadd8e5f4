"""The success criteria of the documents: pass, fail or not measured, with the number and the threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from bifusion_diag.diagnosis.measures import Measures
from bifusion_diag.diagnosis.names import MIOU, NORM, TOTAL, loss_terms
from bifusion_diag.diagnosis.phrase import join, say
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity, Reading
from bifusion_diag.diagnosis.validation import against, common_evaluation, evaluated_at, same_validation
from bifusion_diag.record.schema import Run

CLEAN_EPOCHS = 20
GRAD_NORM_LIMIT = 3.0
ALPHA_BAND = (0.3, 0.7)
CRITERIA = ("clean_epochs", "grad_norm", "no_jump", "alpha", "miou")
WARM_UP_SHARE = 3000 / 33_000  # document 003: stage S0 is 3,000 of 33,000 steps


@dataclass(frozen=True)
class Criterion:
    """One criterion, judged.

    Attributes:
        key: stable id.
        title: what is asked for, in words.
        threshold: the bound in words.
        result: "not measured" is never a pass.
        reading: the number that was judged, or why there is none.
        note: what the number means, where that needs saying.
    """

    key: str
    title: str
    threshold: str
    result: Literal["pass", "fail", "not measured"]
    reading: Reading
    note: str = ""


def judge(
    run: Run, measures: Measures, baseline: Run | None = None, scales: tuple[float, float] = (1.0, 1.0)
) -> tuple[Criterion, ...]:
    """Judge a run by every criterion.

    Args:
        run: judged.
        measures: of it.
        baseline: what its validation mIoU is compared with.
        scales: how far a step of the baseline and one of the run go, where the same step is not the same moment.
    """
    return (
        _clean_epochs(run),
        _norm_after_warm_up(run),
        _no_jump(measures),
        _alpha_in_band(measures),
        _miou_above(run, baseline, scales),
    )


def warm_up_steps(run: Run) -> int:
    """Length of the warm-up: the document's stage S0, scaled to the run's planned length.

    The share is the run's own ``model.gate.early_steps ÷ training.reference_steps`` where its settings state both, else
    3,000 ÷ 33,000.
    """
    planned = run.header.steps_planned or (int(run.steps[-1]) + 1 if len(run.steps) else 0)
    early = setting(run.settings, "model", "gate", "early_steps")
    reference = setting(run.settings, "training", "reference_steps")
    share = early / reference if early is not None and reference else WARM_UP_SHARE
    return math.ceil(planned * min(share, 1.0))


def samples_per_step(run: Run) -> float | None:
    """Scenes that all processes together see in one step; None where the record doesn't tell."""
    batch = setting(run.settings, "training", "batch_size")
    ranks = run.environment.get("ranks", 1)
    if not isinstance(batch, int | float) or batch <= 0 or not isinstance(ranks, int) or ranks < 1:
        return None
    return float(batch) * ranks


def steps_per_epoch(run: Run) -> float | None:
    """Optimiser steps an epoch, None where the record doesn't tell how many scenes an epoch has."""
    stated = run.provenance.get("steps_per_epoch")
    if isinstance(stated, int | float) and stated > 0:
        return float(stated)
    scenes = run.provenance.get("scenes_per_epoch")
    if scenes is None and setting(run.settings, "data", "source") == "synthetic":
        scenes = setting(run.settings, "data", "scenes")
    samples = samples_per_step(run)
    if not isinstance(scenes, int | float) or samples is None or scenes <= 0:
        return None
    return max(float(scenes) / samples, 1.0)


def setting(settings: Mapping[str, Any], *path: str) -> Any:
    """A nested setting; None where there is none."""
    value: Any = settings
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def _clean_epochs(run: Run) -> Criterion:
    key, title, threshold = (
        "clean_epochs",
        "No NaN or Inf loss in 20 epochs on end",
        say("≥ {number} epochs", number=CLEAN_EPOCHS),
    )
    epoch = steps_per_epoch(run)
    names = [TOTAL, *loss_terms(run).values()]
    losses = [series for name in names if (series := run.series(name)) is not None]
    if not losses or not len(run.steps):
        return Criterion(key, title, threshold, "not measured", NotMeasured("no loss was recorded"))
    if epoch is None:
        reason = "the record does not tell how many scenes an epoch has"
        return Criterion(key, title, threshold, "not measured", NotMeasured(reason))
    bad = np.unique(np.concatenate([series.steps[series.nonfinite > 0] for series in losses]))
    ends = np.unique(np.concatenate([series.last[series.nonfinite > 0] for series in losses]))  # of reduced buckets
    starts = np.concatenate([bad, [run.steps[-1] + 1]])
    longest = float((starts - np.concatenate([[run.steps[0] - 1], ends])).max() - 1) / epoch
    reading = Quantity(longest, "epochs")
    if longest >= CLEAN_EPOCHS:
        return Criterion(key, title, threshold, "pass", reading, "longest stretch without a non-finite loss")
    if bad.size:
        first = min(series.stats.first_nonfinite_step or 0 for series in losses if series.stats.nonfinite)
        note = (
            say(
                "longest stretch without a non-finite loss; non-finite at {count} steps, first at step {step}",
                count=bad.size,
                step=first,
            )
            if all(series.exact for series in losses)
            else say("longest stretch without a non-finite loss; non-finite at first at step {step}", step=first)
        )
        return Criterion(key, title, threshold, "fail", reading, note)
    reason = say("clean so far, but the run has only {epochs} epochs", epochs=f"{longest:.3g}")
    return Criterion(key, title, threshold, "not measured", NotMeasured(reason))


def _norm_after_warm_up(run: Run) -> Criterion:
    key, threshold = "grad_norm", f"< {GRAD_NORM_LIMIT}"
    warm_up = warm_up_steps(run)
    title = say("Pre-clip gradient norm after warm-up ({steps} steps)", steps=warm_up)
    norm = run.series(NORM)
    if norm is None:
        return Criterion(key, title, threshold, "not measured", NotMeasured(say("{name} was not recorded", name=NORM)))
    later = norm.steps >= warm_up
    values = norm.max[later]
    finite = values[np.isfinite(values)]
    nonfinite = int(norm.nonfinite[later].sum())
    if not finite.size and not nonfinite:
        return Criterion(key, title, threshold, "not measured", NotMeasured("no step after the warm-up"))
    largest = float(finite.max()) if finite.size else math.nan
    of = "largest norm after the warm-up" if finite.size else "no norm after the warm-up is finite"
    note = join([of, say("{count} steps are non-finite", count=nonfinite) if nonfinite else ""], "; ")
    result: Literal["pass", "fail"] = "pass" if largest < GRAD_NORM_LIMIT and not nonfinite else "fail"
    return Criterion(key, title, threshold, result, Quantity(largest), note)


def _no_jump(measures: Measures) -> Criterion:
    key, title, threshold = "no_jump", "No jump like 5 → 45 of the gradient norm", "0 spikes"
    spikes = measures.readings["spikes"]
    if isinstance(spikes, NotMeasured):
        return Criterion(key, title, threshold, "not measured", spikes)
    note = say("first at step {step}", step=measures.spikes[0]) if measures.spikes else ""
    return Criterion(key, title, threshold, "pass" if spikes.value == 0 else "fail", spikes, note)


def _alpha_in_band(measures: Measures) -> Criterion:
    key, title = "alpha", "Mean α (“fusion_2d_ratio”)"
    low, high = ALPHA_BAND
    threshold = say("in [{low}, {high}]", low=low, high=high)
    alpha = measures.readings.get("gate/mean", NotMeasured("no gate was recorded"))
    if isinstance(alpha, NotMeasured) or alpha.value is None:
        return Criterion(key, title, threshold, "not measured", alpha)
    return Criterion(key, title, threshold, "pass" if low <= alpha.value <= high else "fail", alpha)


def _miou_above(run: Run, baseline: Run | None, scales: tuple[float, float]) -> Criterion:
    """At the last step at which both runs were evaluated, if it was on the same scenes."""
    key, title, threshold = "miou", "Validation mIoU above the baseline's", "> baseline"

    def not_measured(reason: str) -> Criterion:
        return Criterion(key, title, threshold, "not measured", NotMeasured(reason))

    if baseline is None:
        return not_measured("no baseline to compare with")
    if not all(evaluated_at(each.series(MIOU))[0].size for each in (run, baseline)):
        return not_measured(say("{name} was not recorded in both runs", name=MIOU))
    if not same_validation(run, baseline):
        return not_measured("the runs were evaluated on different scenes")
    found = common_evaluation(run, baseline, MIOU, (scales[1], scales[0]))
    if found is None:
        return not_measured("the runs were evaluated at no common step")
    result: Literal["pass", "fail"] = "pass" if found.one > found.other else "fail"
    compared = say("baseline {number}, both at step {step}", number=f"{found.other:.4g}", step=found.step)
    note = join([compared, against(run)], ", ")
    return Criterion(key, title, threshold, result, Quantity(found.one), note)
