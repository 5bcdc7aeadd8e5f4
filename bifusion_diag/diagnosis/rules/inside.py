"""Rules of what goes on inside the model: weights, activations and gradients by module."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from bifusion_diag.diagnosis.findings import Context, Evidence, Finding
from bifusion_diag.diagnosis.instruments import matching
from bifusion_diag.diagnosis.names import NORM
from bifusion_diag.diagnosis.phrase import join, say
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity, Reading
from bifusion_diag.diagnosis.rules.drift import exploding_growth, rising
from bifusion_diag.diagnosis.rules.series import (
    by_module,
    finite_from,
    innermost,
    listed,
    middle_step,
    settled_step,
    usual,
)
from bifusion_diag.record.schema import Series

NO_GRADS = "the gradients of modules were not measured (probe grads)"
NO_OUTPUTS = "the outputs of modules were not measured (probe activations)"
MODULES = 4  # with a gradient, that a comparison between modules needs
DEPTH = 6  # modules in a row that tell a growth through depth from one odd module
RANK_CORRELATION = -0.8  # between the order of execution and the gradient, below which it grows through depth
#: Activations that are exactly zero for negative inputs, by the end of their class name; those that leak are none.
_ZEROING, _LEAKING = ("ReLU", "ReLU6", "Threshold"), ("LeakyReLU", "PReLU", "RReLU")


def nonfinite_weight(context: Context) -> list[Finding] | NotMeasured:
    """A weight, or a running statistic of BatchNorm, is NaN or infinite."""
    norms, counts = by_module(context, "weights", "norm"), by_module(context, "weights", "nonfinite")
    running = by_module(context, "weights", "running_nonfinite")
    if not norms and not running:
        return NotMeasured("the weights were not measured (probe weights)")
    weights = {
        module: bad
        for module, norm in norms.items()
        if (bad := _Bad.of(norm, norm.nonfinite > 0)) or (bad := _Bad.above_zero(counts.get(module)))
    }
    since = min((bad.first for bad in weights.values()), default=None)
    buffers = {
        module: bad
        for module, series in running.items()
        if (bad := _Bad.above_zero(series)) and (since is None or bad.first < since)  # NaN weights take these along
    }
    found = []
    if weights:
        where = f"weights/{_first(weights)}/norm"
        title = "Weights are NaN or infinite, measured first in {module}"
        stays = (
            "A NaN weight stays NaN: every update starts from the weight itself. Only an earlier checkpoint, or one of "
            "the last step at which all weights were finite, goes on from here."
        )
        found.append(_bad_state(context, weights, title, where, stays))
    if buffers:
        where = f"weights/{_first(buffers)}/running_nonfinite"
        title = "Running statistics are NaN or infinite, measured first in {module}"
        stays = (
            "A running mean is moved towards each batch's by a share of the difference, so that NaN stays. Training "
            "goes on as before, since it uses the batch's own statistics; every evaluation, and a frozen BatchNorm, "
            "gives NaN. It entered in a forward pass: skipping the update does not help, reset_running_stats() does."
        )
        found.append(_bad_state(context, buffers, title, where, stays))
    return found


def vanishing_gradients(context: Context) -> list[Finding] | NotMeasured:
    """Modules whose gradient is next to nothing, beside the others' and beside their own weights."""
    scales = _scales(context)
    if isinstance(scales, NotMeasured):
        return scales
    if _grows_through_depth(context, scales):
        return []  # seen from the other end: see exploding-module
    tiny = _tiny(context, scales)
    if not tiny:
        return []
    worst = min(tiny, key=lambda one: one.rms)
    series = f"grads/{worst.module}/param_norm"
    evidence = [
        Evidence("modules", Quantity(len(tiny), "modules"), series),
        Evidence(say("gradient a weight in {module}", module=worst.module), Quantity(worst.rms), series),
        Evidence("the upper quartile of all modules", Quantity(_upper(scales)), NORM),
    ]
    if worst.relative is not None:
        evidence.append(Evidence("its gradient ÷ its weights", Quantity(worst.relative), series))
    names = [one.module for one in tiny]
    mechanism = join(
        [
            say("These modules take part in the loss and learn next to nothing from it: {names}.", names=listed(names)),
            "Between them and the loss something multiplies by less than one, again and again: saturated activations, "
            "weights that are too small, a gate that is nearly shut, a temperature. Adam hides it, for it divides by "
            "the gradient's size: what it then follows is mostly rounding noise.",
        ]
    )
    title = (
        say("The gradient of {module} vanishes", module=worst.module)
        if len(tiny) == 1
        else say("The gradient of {n} modules vanishes", n=len(tiny))
    )
    span = middle_step(context.run), int(context.run.steps[-1])
    return [Finding("vanishing-gradients", "warning", title, tuple(evidence), mechanism, span, module=worst.module)]


def exploding_module(context: Context) -> list[Finding] | NotMeasured:
    """One module's gradient outgrows the others', gradients grow from layer to layer, or outputs grow out of range."""
    scales, outputs = _scales(context), by_module(context, "activations", "max")
    if isinstance(scales, NotMeasured) and not outputs:
        return scales
    found = [] if isinstance(scales, NotMeasured) else [*exploding_growth(context), *_through_depth(context, scales)]
    return [*found, *_growing_outputs(context, outputs)]


def dead_units(context: Context) -> list[Finding] | NotMeasured:
    """ReLU-like modules that give nothing but zeros."""
    kinds = {info.name: info.type for info in context.run.modules}
    shares = {
        module: series
        for module, series in by_module(context, "activations", "zeros").items()
        if kinds.get(module, "").endswith(_ZEROING) and not kinds[module].endswith(_LEAKING)
    }
    if not shares:
        return NotMeasured("no output of a ReLU was measured (probe activations)")
    begin, least = middle_step(context.run), context.thresholds.dead_share
    dead: dict[str, float] = {}
    judged = False
    for module, series in shares.items():
        values = finite_from(series, begin)[1]
        if int(series.rows[series.steps >= begin].sum()) < context.thresholds.min_steps // 2 or not values.size:
            continue
        judged = True
        if float(values.min()) >= least:  # at every step: a batch that lights them up shows that they live
            dead[module] = float(values.min())
    if not judged:
        needed = context.thresholds.min_steps // 2
        return NotMeasured(say("fewer than {needed} steps of the second half are measured", needed=needed))
    if not dead:
        return []
    module = next(iter(dead))
    series_name = f"activations/{module}/zeros"
    evidence = (
        Evidence("modules", Quantity(len(dead), "modules"), series_name),
        Evidence(say("smallest share of zeros of {module}", module=module), Quantity(dead[module]), series_name),
    )
    mechanism = join(
        [
            say("In the second half of the run these give zeros at every step: {names}.", names=listed(list(dead))),
            "A unit whose input is negative for every sample has no gradient, and no later batch wakes it: what lies "
            "before it learns nothing through it. One update that was too long, or a bias far below zero, does this.",
        ]
    )
    title = say("The units of {module} are dead", module=module)
    span = begin, int(context.run.steps[-1])
    return [Finding("dead-units", "warning", title, evidence, mechanism, span, module=module)]


class _Bad(NamedTuple):
    """When a module was seen non-finite."""

    first: int
    last_good: int | None  # the last step before it at which it was seen finite
    recovered: int | None  # the first step after the last bad one at which it is finite again

    @classmethod
    def of(cls, series: Series, bad: np.ndarray) -> _Bad | None:
        if not bad.any():
            return None
        seen = series.rows > series.missing
        first, last = int(np.argmax(bad)), int(len(bad) - 1 - np.argmax(bad[::-1]))
        before, after = np.flatnonzero(seen[:first]), np.flatnonzero(seen[last + 1 :])
        return cls(
            int(series.steps[first]),
            int(series.last[before[-1]]) if before.size else None,
            int(series.steps[last + 1 + after[0]]) if after.size else None,
        )

    @classmethod
    def above_zero(cls, series: Series | None) -> _Bad | None:
        return None if series is None else cls.of(series, series.max > 0)


def _first(bad: dict[str, _Bad]) -> str:
    """The module that was bad first; of several, the first in execution order."""
    return min(bad, key=lambda module: bad[module].first)


def _bad_state(context: Context, bad: dict[str, _Bad], title: str, series: str, stays: str) -> Finding:
    module = _first(bad)
    first = bad[module]
    # Modules take turns: of those that may have been it in between, none is named.
    others = [name for name, one in bad.items() if name != module and (one.last_good or 0) < first.first]
    recovered = [one.recovered for one in bad.values()]
    last_good: Reading = (
        Quantity(first.last_good, "step") if first.last_good is not None else NotMeasured("none was measured before")
    )
    evidence = (
        Evidence("modules", Quantity(len(bad), "modules"), series),
        Evidence("first measured so", Quantity(first.first, "step"), series),
        Evidence("last measured finite", last_good, series),
    )
    back = [step for step in recovered if step is not None]
    end = int(context.run.steps[-1])
    if len(back) == len(recovered):
        end = max(back)
        words = say("All are finite again at step {step}: they were set anew, or loaded.", step=end)
    elif back:
        words = say("{n} of {all} modules are finite again later.", n=len(back), all=len(bad))
    else:
        words = say("None of {all} is finite again in this record.", all=len(bad))
    return Finding(
        "nonfinite-weight",
        "error",
        say(title, module=module),
        evidence,
        join(
            [
                stays,
                words,
                say("Modules are measured in turns: {n} others may have been first.", n=len(others)) if others else "",
            ]
        ),
        (first.first, max(end, first.first)),
        module=None if others else module,
        remedy=_skips(context, first),
    )


def _skips(context: Context, bad: _Bad) -> dict[str, str] | None:
    """Leaving bad updates out, where the recorder only recorded them and the gradient was non-finite just before."""
    norm = context.run.series(NORM)
    if context.settings.get("incidents.policy") != "record" or norm is None:
        return None
    wrong = norm.steps[norm.nonfinite > 0]
    before = (wrong <= bad.first) & (wrong >= (bad.last_good or 0))
    return {"incidents.policy": "skip"} if before.any() else None


class _Scale(NamedTuple):
    """How large a module's gradient usually is in the second half of a run."""

    module: str
    rms: float  # of a weight
    relative: float | None  # ‖g‖ ÷ ‖w‖; None where the weights were not measured


def _scales(context: Context) -> list[_Scale] | NotMeasured:
    """Of every module that has a gradient, in execution order."""
    norms = by_module(context, "grads", "param_norm")
    if not norms:
        return NotMeasured(NO_GRADS)
    begin, least = middle_step(context.run), context.thresholds.min_steps // 2
    size = {info.name: max(info.trainable, 1) for info in context.run.modules}
    weights = dict(matching(context.run, r"weights/(.+)/norm"))
    found = []
    for module, series in norms.items():
        norm = usual(series, begin, min(least, max(len(series.steps) // 4, 1)))
        if norm is None or norm == 0.0:
            continue  # frozen, unused, or cut off: a term that is switched off leaves zeros
        weight = usual(weights.get(module), 0)
        relative = None if weight is None else norm / weight if weight > 0 else math.inf
        found.append(_Scale(module, norm / math.sqrt(size.get(module, 1)), relative))
    if len(context.run.steps) < context.thresholds.min_steps:
        return NotMeasured(
            say("{n} steps; {needed} are needed", n=len(context.run.steps), needed=context.thresholds.min_steps)
        )
    if len(found) < MODULES:
        return NotMeasured(say("{n} modules have a gradient; {needed} are needed", n=len(found), needed=MODULES))
    return found


def _upper(scales: list[_Scale]) -> float:
    return float(np.quantile([one.rms for one in scales], 0.75))


def _tiny(context: Context, scales: list[_Scale]) -> list[_Scale]:
    """Those whose gradient is next to nothing, smallest share first in execution order."""
    limit = context.thresholds.vanishing_share
    known = [one.relative for one in scales if one.relative is not None and math.isfinite(one.relative)]
    beside_weights = float(np.quantile(known, 0.75)) if known else 0.0
    return [
        one
        for one in scales
        if one.rms < limit * _upper(scales) and (one.relative is None or one.relative < limit * beside_weights)
    ]


def _grows_through_depth(context: Context, scales: list[_Scale]) -> bool:
    """Whether gradients grow from each layer to the one before it, over many layers and by a large factor.

    Seen from the loss: the last modules in execution order have the smallest ones.
    """
    if len(scales) < DEPTH or not _tiny(context, scales):
        return False
    from scipy import stats  # as in diagnosis.trend

    sizes = np.log([one.rms for one in scales])
    return float(stats.spearmanr(np.arange(len(sizes)), sizes).statistic) < RANK_CORRELATION


def _through_depth(context: Context, scales: list[_Scale]) -> list[Finding]:
    if not _grows_through_depth(context, scales):
        return []
    largest, smallest = max(scales, key=lambda one: one.rms), min(scales, key=lambda one: one.rms)
    series = f"grads/{largest.module}/param_norm"
    evidence = (
        Evidence(say("gradient a weight in {module}", module=largest.module), Quantity(largest.rms), series),
        Evidence(
            say("gradient a weight in {module}", module=smallest.module),
            Quantity(smallest.rms),
            f"grads/{smallest.module}/param_norm",
        ),
        Evidence(
            "factor a module, on average", Quantity((largest.rms / smallest.rms) ** (1 / (len(scales) - 1))), NORM
        ),
    )
    mechanism = (
        "On its way back from the loss the gradient is multiplied by more than one at nearly every module. Weights "
        "that were drawn too large, or residual branches that add up without a normalisation, do this from the first "
        "step on."
    )
    title = say("The gradient grows through the layers, up to {module}", module=largest.module)
    span = middle_step(context.run), int(context.run.steps[-1])
    return [Finding("exploding-module", "warning", title, evidence, mechanism, span, module=largest.module)]


def _growing_outputs(context: Context, outputs: dict[str, Series]) -> list[Finding]:
    """The innermost module, first in execution order, whose outputs have grown beyond what half precision likes."""
    begin, limit = settled_step(context.run), context.thresholds.activation_absmax
    late = middle_step(context.run)
    grown: dict[str, tuple[float, float]] = {}
    for module, high in outputs.items():
        for name in (f"activations/{module}/max", f"activations/{module}/min"):
            series = high if name.endswith("max") else context.run.series(name)
            if series is None or max(abs(series.stats.max or 0.0), abs(series.stats.min or 0.0)) < limit:
                continue
            size = _magnitude(series)
            _, trend = rising(size, begin, context.thresholds.exploding_factor)
            level = usual(size, late)
            if trend is not None and level is not None and math.exp(trend.levels[-1]) >= limit:
                grown[module] = math.exp(trend.change), math.exp(trend.levels[-1])
    if not grown:
        return []
    module = innermost(list(grown))[0]
    factor, level = grown[module]
    series_name = f"activations/{module}/max"
    evidence = (
        Evidence("growth of its largest output, by the trend's line", Quantity(factor, "×"), series_name),
        Evidence("largest output in the last sixteenth, median", Quantity(level), series_name),
        Evidence("modules with such outputs", Quantity(len(grown), "modules"), series_name),
    )
    mechanism = (
        "Of these modules it is the first to run, leaving out those that only contain another. Outputs that keep "
        "growing end beyond 65,504, the largest number of float16, and saturate what follows. A weight decay that is "
        "missing, or a residual stream without a normalisation, lets them."
    )
    title = say("The outputs of {module} keep growing", module=module)
    span = begin, int(context.run.steps[-1])
    return [Finding("exploding-module", "warning", title, evidence, mechanism, span, module=module)]


def _magnitude(series: Series) -> Series:
    """The series without its sign."""
    gone = series.missing >= series.rows
    return Series.from_values(series.name, series.steps, np.abs(series.value), gone, stats=series.stats)
