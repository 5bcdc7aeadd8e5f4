"""Rules of slow movements: of the gradient norm, of one module against the others."""

from __future__ import annotations

import math

import numpy as np

from bifusion_diag.diagnosis.findings import Context, Evidence, Finding
from bifusion_diag.diagnosis.names import NORM
from bifusion_diag.diagnosis.phrase import join, say
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity
from bifusion_diag.diagnosis.rules.series import by_module, finite_from, settled_step
from bifusion_diag.diagnosis.trend import MIN_VALUES, Trend, block_levels, trend_of
from bifusion_diag.record.schema import Ints, Series

CHANCE = 0.001  # p below which a rise is taken as one
FEW = "{n} finite norms after the beginning; {needed} are needed"


def drifting_gradients(context: Context) -> list[Finding] | NotMeasured:
    """The gradient norm grows steadily after the warm-up."""
    norm = context.run.series(NORM)
    if norm is None:
        return NotMeasured(say("{series} was not recorded", series=NORM))
    begin = settled_step(context.run)
    steps, trend = rising(norm, begin, context.thresholds.drift_factor)
    if steps.size < MIN_VALUES:
        return NotMeasured(say(FEW, n=int(steps.size), needed=MIN_VALUES))
    if trend is None:
        return []
    factor = math.exp(trend.change)
    evidence = [
        Evidence("growth from the first to the last sixteenth, by the trend's line", Quantity(factor, "×"), NORM),
        Evidence("median norm in the first sixteenth", Quantity(math.exp(trend.levels[0])), NORM),
        Evidence("median norm in the last sixteenth", Quantity(math.exp(trend.levels[-1])), NORM),
        Evidence("chance of such a rise without a trend (Mann–Kendall)", Quantity(trend.p), NORM),
    ]
    module, growth = _fastest(context, begin)
    told = []
    if module is not None:
        evidence.append(Evidence(say("growth in {module}", module=module), growth, f"grads/{module}/param_norm"))
        told.append(say("Of the modules that make up most of the norm, {module} grows most.", module=module))
    mechanism = join(
        [
            "Norms fall or stay level while a healthy run settles. A steady rise over many steps is no bad batch: "
            "weights or activations that grow, a learning rate beyond the edge of stability, or a term that keeps "
            "gaining weight.",
            *told,
        ]
    )
    title = "The gradient norm drifts upwards"
    span = int(steps[0]), int(steps[-1])
    return [Finding("drifting-gradients", "warning", title, tuple(evidence), mechanism, span, module=module)]


def exploding_growth(context: Context) -> list[Finding]:
    """Modules whose gradient has grown out of proportion to that of all others, and now is most of it."""
    begin = settled_step(context.run)
    norms = by_module(context, "grads", "param_norm")
    found = []
    squares = _squares(norms, begin)
    if len(squares) < 2:
        return []
    total = np.sum(list(squares.values()), axis=0)
    for module, own in squares.items():
        share = own / np.where(total > 0, total, np.inf)
        others = np.sqrt(np.maximum(total - own, 0.0))
        factor = _ratio(np.sqrt(own))
        if share[-1] < context.thresholds.exploding_share or factor < 3 * max(_ratio(others), 1.0):
            continue
        steps, trend = rising(norms[module], begin, context.thresholds.exploding_factor)
        if trend is None:
            continue
        series = f"grads/{module}/param_norm"
        evidence = (
            Evidence("growth of its gradient norm, by the trend's line", Quantity(math.exp(trend.change), "×"), series),
            Evidence("growth of all others' together", Quantity(_ratio(others), "×"), NORM),
            Evidence("share of the squared norm in the first sixteenth", Quantity(float(share[0])), series),
            Evidence("share in the last sixteenth", Quantity(float(share[-1])), series),
        )
        title = say("The gradient of {module} outgrows all others", module=module)
        mechanism = (
            "What one module adds now decides the length of the whole gradient: clipping by the whole norm takes from "
            "all other modules what this one has gained."
        )
        span = int(steps[0]), int(steps[-1])
        found.append(Finding("exploding-module", "warning", title, evidence, mechanism, span, module=module))
    return found


def rising(series: Series, begin: int, least: float) -> tuple[Ints, Trend | None]:
    """The trend of a positive series' logarithm where it rises by at least a factor, and not by chance.

    Returns:
        The steps that were judged, and the trend; None where there is no such rise.
    """
    steps, values = finite_from(series, begin)
    positive = values > 0
    steps, values = steps[positive], values[positive]
    if steps.size < MIN_VALUES or _ratio(block_levels(values)) < least / 2:  # the tests are dear
        return steps, None
    trend = trend_of(np.log(values))
    stays = trend.levels[-4:].mean() - trend.levels[:4].mean() > math.log(least) / 2  # the last quarter is up, too
    return steps, trend if trend.change >= math.log(least) and trend.p < CHANCE and stays else None


def _ratio(levels: np.ndarray) -> float:
    """The last quarter's level ÷ the first's."""
    quarter = max(1, len(levels) // 4)
    first, last = float(np.median(levels[:quarter])), float(np.median(levels[-quarter:]))
    return last / first if first > 0 else math.inf if last > 0 else 1.0


def _squares(norms: dict[str, Series], begin: int) -> dict[str, np.ndarray]:
    """Squares of the levels (BLOCKS,) of every module that has enough of them."""
    found = {}
    for module, series in norms.items():
        values = finite_from(series, begin)[1]
        if values.size >= MIN_VALUES:
            found[module] = block_levels(values) ** 2
    return found


def _fastest(context: Context, begin: int) -> tuple[str | None, Quantity]:
    """Of the modules with at least a tenth of the squared norm at the end, the one whose norm has grown most."""
    squares = _squares(by_module(context, "grads", "param_norm"), begin)
    total = sum(float(own[-1]) for own in squares.values())
    growth = {module: _ratio(np.sqrt(own)) for module, own in squares.items() if total > 0 and own[-1] >= 0.1 * total}
    known = {module: value for module, value in growth.items() if math.isfinite(value)}
    if not known:
        return None, Quantity(None)
    module = max(known, key=lambda name: known[name])
    return module, Quantity(known[module], "×")
