"""Rules of what the loss does in the long run: it falls, it does not, it climbs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.diagnosis.findings import Context, Evidence, Finding, Severity
from bifusion_diag.diagnosis.names import TOTAL
from bifusion_diag.diagnosis.phrase import join, say
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity
from bifusion_diag.diagnosis.rules.declared import declared_number
from bifusion_diag.diagnosis.rules.series import is_whole
from bifusion_diag.diagnosis.trend import BLOCKS, MIN_VALUES, block_levels, noise_of
from bifusion_diag.record.schema import Ints, Run, Series

EARLY, EARLY_BUCKETS = 30, 5  # values that the beginning is; of a reduced record, where each is of several steps
LATE = 0.25  # share of the steps that the end is
CHANCE = 0.01  # p below which a fall is taken as one
SUPERIORITY = 0.6  # a step of the end has a lower loss than one of the beginning so often at least, where it has fallen
DEVIATIONS = 2.0  # of a step's noise: what the end has to be above the best by, as well as
MEDIAN_DEVIATIONS = 6.0  # of a block's median
WORSE = 0.5  # of the loss at the beginning: what the end has to be above it by to be an error; a term that gains weight
#  raises a sound loss by less
MEDIAN_ERROR = 1.25  # standard error of a median of n normal values, times √n and ÷ their deviation
_NOT_WHOLE = "the record begins at step {step}: what was learnt before is not in it"
_STAGE = "stage"  # kind of an event from which on the loss may be another sum


def nothing_learned(context: Context) -> list[Finding] | NotMeasured:
    """The loss has not fallen although there were steps enough: Mann–Whitney's test of the end against the
    beginning."""
    total = context.run.series(TOTAL)
    needed = context.thresholds.learning_steps
    if total is None:
        return NotMeasured(say("{series} was not recorded", series=TOTAL))
    if not is_whole(context.run):
        return NotMeasured(say(_NOT_WHOLE, step=int(context.run.steps[0])))
    parts = [part for part in _stages(context.run, total) if part[2] >= needed]
    if not parts:
        return NotMeasured(say("no stage has {needed} steps with a finite loss", needed=needed))
    tests = [_fall(values, total.exact) for _, values, _ in parts]
    if any(p < CHANCE and superiority >= SUPERIORITY for p, superiority, _, _ in tests) or loss_divergence(context):
        return []
    p, superiority, early, late = tests[-1]
    resumed = context.settings.get("model.init_from", "None") not in ("None", "null", "")
    severity: Severity = "note" if resumed or _several_optimisers(context) else "warning"
    evidence = [
        Evidence("median loss at the beginning", Quantity(early), TOTAL),
        Evidence("median loss of the last quarter", Quantity(late), TOTAL),
        Evidence("a late step has a lower loss than an early one, share of pairs", Quantity(superiority), TOTAL),
        Evidence("chance of such a fall where there is none (Mann–Whitney)", Quantity(p), TOTAL),
    ]
    ratio = context.reading("update_ratio/p50")
    if isinstance(ratio, Quantity):
        evidence.append(Evidence("median of ‖Δw‖ ÷ ‖w‖ over modules", ratio, "updates/<module>/ratio"))
    mechanism = join(
        [
            "No stage of the run ends with a loss below that of its beginning, beyond the noise of its steps. Either "
            "the weights hardly move, or what moves them does not carry the labels: a frozen part, a detached loss, "
            "shuffled targets, a learning rate far too small or far too large.",
            "The run starts from trained weights, which may have been at their best already." if resumed else "",
            _OPPOSED if _several_optimisers(context) else "",
        ]
    )
    span = int(parts[0][0][0]), int(parts[-1][0][-1])
    return [Finding("nothing-learned", severity, "The loss has not fallen", tuple(evidence), mechanism, span)]


def loss_divergence(context: Context) -> list[Finding] | NotMeasured:
    """The loss climbs back over many steps while it is finite."""
    total = context.run.series(TOTAL)
    if total is None:
        return NotMeasured(say("{series} was not recorded", series=TOTAL))
    *_, (steps, values, _) = _stages(context.run, total)
    if values.size < MIN_VALUES:
        return NotMeasured(
            say("{n} finite losses since the last stage began; {needed} are needed", n=values.size, needed=MIN_VALUES)
        )
    levels = block_levels(values)
    best = int(np.argmin(levels[:-2]))
    initial, final = float(np.median(values[:EARLY_BUCKETS])), float(levels[-2:].min())
    size = values.size // BLOCKS
    offset = values.size - size * BLOCKS
    noise = noise_of(values[offset + best * size : offset + (best + 1) * size])
    rise, fall = final - levels[best], max(initial - levels[best], 0.0)
    # A loss that reached 0 has no noise there; what it gives back counts against what it had learnt.
    margin = noise * max(DEVIATIONS, MEDIAN_DEVIATIONS * MEDIAN_ERROR / size**0.5)
    if rise <= margin or rise <= context.thresholds.divergence_share * fall or rise <= 1e-6 * abs(initial):
        return []
    worse = is_whole(context.run) and final > initial + margin
    evidence = (
        Evidence("median loss at its best", Quantity(float(levels[best])), TOTAL),
        Evidence("median loss at the end", Quantity(final), TOTAL),
        Evidence("median loss at the beginning", Quantity(initial), TOTAL),
        Evidence("standard deviation from step to step at its best, robust", Quantity(noise), TOTAL),
    )
    mechanism = join(
        [
            "The loss is up for the last eighth of these steps at least, and is far beyond what the loss varies by "
            "from step to step: it is no bad batch. Steps that are too long for the loss's curvature, or weights that "
            "a bad step has thrown away, look like this.",
            "The loss is now above where it began." if worse else "",
            _OPPOSED if _several_optimisers(context) else "",
        ]
    )
    climbed = int(np.flatnonzero(levels <= levels[best] + rise / 2)[-1]) + 1
    begin = int(steps[offset + climbed * size])
    title = "The loss climbs and stays up"
    lost = worse and final - initial > WORSE * abs(initial)
    grades: tuple[Severity, Severity] = ("warning", "note") if _several_optimisers(context) else ("error", "warning")
    severity = grades[0 if lost else 1]
    return [Finding("loss-divergence", severity, title, evidence, mechanism, (begin, int(steps[-1])))]


_OPPOSED = (
    "The run has several optimisers: where their losses pull against each other, as in adversarial training, the sum "
    "of these need not fall."
)


def _several_optimisers(context: Context) -> bool:
    return declared_number(context.run.provenance, "optimizers") is not None


def _stages(run: Run, total: Series) -> Iterator[tuple[Ints, NDArray[np.float64], int]]:
    """Steps (K,) and finite losses (K,) between two announced stages, and how many recorded steps these are."""
    begins = sorted({event.step for event in run.events if event.kind == _STAGE and event.step is not None})
    edges = [-1, *(step for step in begins if len(run.steps) and step > run.steps[0]), 2**62]
    for begin, end in itertools.pairwise(edges):
        here = (total.steps >= begin) & (total.steps < end) & np.isfinite(total.value)
        yield total.steps[here], total.value[here], int(total.rows[here].sum())


def _fall(values: NDArray[np.float64], exact: bool) -> tuple[float, float, float, float]:
    """The test of a fall: p, the share of pairs in which the late step is lower, and both medians."""
    from scipy import stats  # as in diagnosis.trend

    early = values[: EARLY if exact else EARLY_BUCKETS]
    late = values[-max(int(LATE * len(values)), 1) :]
    test = stats.mannwhitneyu(late, early, alternative="less")
    superiority = 1.0 - float(test.statistic) / (len(late) * len(early))
    return float(test.pvalue), superiority, float(np.median(early)), float(np.median(late))
