"""Rules of what the optimiser makes of the gradients."""

from __future__ import annotations

import math

import numpy as np

from bifusion_diag.diagnosis.findings import Context, Evidence, Finding, Severity
from bifusion_diag.diagnosis.names import COEFFICIENT, NORM
from bifusion_diag.diagnosis.phrase import join, say
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity
from bifusion_diag.diagnosis.rules.series import by_module, finite_from, listed, middle_step
from bifusion_diag.record.schema import Ints, Series

RATE = "train/lr"
SCALE, SKIPPED = "updates/scale", "updates/skipped"
FULL_RATE = 0.5  # of the largest learning rate: steps with less say nothing about an update's size
FINITE_GRADIENT = 3  # code in grads/<module>/state
SETTLES = 20  # steps in which a GradScaler may look for its scale: from 65,536 down to 0.06
STANDSTILL = 10  # steps one after the other without an update at the end, from which on nothing moves any more
_ALL = 0.5  # share of the modules from which on it is the learning rate and not a module


def clipping_always_on(context: Context) -> list[Finding] | NotMeasured:
    """Nearly every step is clipped."""
    share = context.reading("clipped_share")
    if isinstance(share, NotMeasured):
        return share
    if share.value is None or share.value <= context.thresholds.clipped_share:
        return []
    norm = context.run.series(NORM)
    evidence = [
        Evidence("clipped steps", share, COEFFICIENT),
        Evidence("mean shrink factor", context.reading("shrink_factor"), COEFFICIENT),
    ]
    if norm is not None and norm.stats.p95 is not None:
        evidence.append(Evidence("95 % of the norms are at most", Quantity(norm.stats.p95), NORM))
    return [
        Finding(
            "clipping-always-on",
            "note",
            "Nearly every step is clipped",
            tuple(evidence),
            "With clipping always on every step has the same gradient norm. Under SGD the limit acts as a learning "
            "rate; Adam divides a constant factor out again, and what remains is that a quiet step counts as much as a "
            "loud one. Either way a term with a large gradient takes its share from all others.",
        )
    ]


def update_ratio_off(context: Context) -> list[Finding] | NotMeasured:
    """Modules whose update is far too long or far too short for their weights, all the time."""
    ratios = by_module(context, "updates", "ratio")
    if not ratios:
        return NotMeasured("the updates were not measured (probe updates, told the optimisers)")
    steps = _full_rate(context)
    if steps.size < context.thresholds.min_steps:
        needed = context.thresholds.min_steps
        return NotMeasured(
            say("{n} steps near the full learning rate; {needed} are needed", n=steps.size, needed=needed)
        )
    late = max(middle_step(context.run), int(steps[len(steps) // 2]))
    long, short, lengths = dict[str, float](), dict[str, float](), list[float]()
    for module, series in ratios.items():
        all_steps, values = finite_from(series, 0)
        here = np.isin(all_steps, steps)
        if not here.any() or _began_at_zero(context, module, series):
            continue
        settled = values[here & (all_steps >= late)]
        lengths.append(float(np.median(settled)) if settled.size else 0.0)
        if settled.size and float(np.median(settled)) > context.thresholds.update_ratio_high:
            long[module] = float(np.median(settled))
        if float(np.median(values[here])) < context.thresholds.update_ratio_low and _learns(
            context, module, values[here]
        ):
            short[module] = float(np.median(values[here]))
    found = []
    span = int(steps[0]), int(steps[-1])
    if long:
        found.append(_too_long(context, long, lengths, (late, span[1])))
    if short:
        found.append(_too_short(context, short, len(lengths), span))
    return found


def amp_scale_collapse(context: Context) -> list[Finding] | NotMeasured:
    """The GradScaler keeps halving its scale and leaving steps out."""
    scale, skipped = context.run.series(SCALE), context.run.series(SKIPPED)
    if scale is None or skipped is None:
        return NotMeasured("no GradScaler was recorded (Monitor(..., scaler=scaler) and probe updates)")
    if len(context.run.steps) <= SETTLES:
        return NotMeasured(
            say("{n} steps; a scaler may look for its scale for {all}", n=len(context.run.steps), all=SETTLES)
        )
    begin = int(context.run.steps[0]) + SETTLES
    steps, left_out = finite_from(skipped, begin)
    values = finite_from(scale, begin)[1]
    if not steps.size or not values.size:
        return NotMeasured("no step has a scale and an update")
    share, low = float(left_out.mean()), float(values[-1])
    tail = len(left_out) - int(np.flatnonzero(left_out < 1)[-1]) - 1 if (left_out < 1).any() else len(left_out)
    if share <= context.thresholds.skipped_share and low >= context.thresholds.amp_scale:
        return []
    standstill = tail >= STANDSTILL
    severity: Severity = "error" if standstill else "warning"
    evidence = (
        Evidence("steps left out, share", Quantity(share), SKIPPED),
        Evidence("the scale at the end", Quantity(low), SCALE),
        Evidence("largest scale", Quantity(scale.stats.max), SCALE),
        Evidence("steps without an update at the end", Quantity(tail, "steps"), SKIPPED),
    )
    mechanism = join(
        [
            "A scaler halves its scale and leaves the update out whenever a scaled gradient is not finite. It settles "
            "within a few steps where only the scale is too large; where it goes on, the gradient itself is not "
            "finite, or it spans more than float16 can hold: small scales let the other end vanish.",
            "At the end no step has an update any more: training stands still." if standstill else "",
        ]
    )
    bad = steps[left_out > 0]
    span = (int(bad[0]), int(bad[-1])) if bad.size else (int(steps[0]), int(steps[-1]))
    count = int(bad.size) if skipped.exact else None
    return [
        Finding("amp-scale-collapse", severity, "The GradScaler's scale collapses", evidence, mechanism, span, count)
    ]


def _full_rate(context: Context) -> Ints:
    """Steps (K,) at which the learning rate is at least half of its largest; all where it was not recorded."""
    rate = context.run.series(RATE)
    if rate is None or not rate.stats.max:
        return context.run.steps
    steps, values = finite_from(rate, 0)
    return steps[values >= FULL_RATE * rate.stats.max]


def _began_at_zero(context: Context, module: str, series: Series) -> bool:
    """Whether all weights of a module were zero at first: their first updates are as long as they are."""
    weight = context.run.series(f"weights/{module}/norm")
    first = finite_from(series, 0)[1][:1]
    known = finite_from(weight, 0)[1][:1] if weight is not None else np.zeros(0)
    return bool((known.size and known[0] == 0.0) or (series.exact and first.size and first[0] == 1.0))


def _learns(context: Context, module: str, ratios: np.ndarray) -> bool:
    """Whether a module has a gradient: one that is unused is not moved, and rightly so."""
    state = context.run.series(f"grads/{module}/state")
    if state is None:
        return bool(np.median(ratios) > 0)
    known = finite_from(state, 0)[1]
    return bool(known.size and np.median(known) == FINITE_GRADIENT)


def _too_long(context: Context, long: dict[str, float], lengths: list[float], span: tuple[int, int]) -> Finding:
    module = max(long, key=lambda name: long[name])
    series = f"updates/{module}/ratio"
    everywhere = len(long) >= _ALL * len(lengths)
    evidence = [
        Evidence("modules", Quantity(len(long), "modules"), series),
        Evidence(say("median ‖Δw‖ ÷ ‖w‖ of {module}", module=module), Quantity(long[module]), series),
        Evidence("median over all modules", Quantity(float(np.median(lengths))), series),
    ]
    remedy = None
    rate = context.settings.get("optim.lr")
    if everywhere and rate is not None:
        factor = context.thresholds.update_ratio_high / 10 / float(np.median(lengths))
        remedy = {"optim.lr": _one_digit(float(rate) * factor)}
    mechanism = join(
        [
            say("At every step these replace a good part of themselves: {names}.", names=listed(list(long))),
            "What was learnt is gone within a few steps, and the loss sees a different model each time.",
            "As nearly all modules do, it is the learning rate."
            if everywhere
            else "As others do not, it is this module's scale or parameter group: weights that are very small, or a "
            "learning rate of its own.",
        ]
    )
    title = (
        "Updates are too long for the weights"
        if everywhere
        else say("The updates of {module} are too long for its weights", module=module)
    )
    return Finding("update-ratio-off", "warning", title, tuple(evidence), mechanism, span, module=module, remedy=remedy)


def _too_short(context: Context, short: dict[str, float], all_modules: int, span: tuple[int, int]) -> Finding:
    module = min(short, key=lambda name: short[name])
    series = f"updates/{module}/ratio"
    everywhere = len(short) >= _ALL * all_modules
    evidence = (
        Evidence("modules", Quantity(len(short), "modules"), series),
        Evidence(say("median ‖Δw‖ ÷ ‖w‖ of {module}", module=module), Quantity(short[module]), series),
        Evidence("modules that are updated", Quantity(all_modules, "modules"), series),
    )
    mechanism = join(
        [
            say("These have a gradient and stay as they are: {names}.", names=listed(list(short))),
            "At such a pace a weight needs a million steps to change by its own size, and half precision rounds the "
            "change away. The learning rate is too small, as that of a parameter group may be.",
        ]
    )
    title = (
        "Updates are too short to learn anything"
        if everywhere
        else say("The updates of {module} are too short to learn anything", module=module)
    )
    return Finding("update-ratio-off", "warning", title, evidence, mechanism, span, module=module)


def _one_digit(value: float) -> float:
    return float(f"{value:.0e}") if math.isfinite(value) and value > 0 else value
