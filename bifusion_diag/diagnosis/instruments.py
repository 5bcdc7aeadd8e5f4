"""Measures that sum up many series (of modules, terms, fields) by what their statistics state exactly, however much
the record is reduced."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import NamedTuple

from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity, Reading
from bifusion_diag.record.schema import Run, Series, SeriesStats


class Summary(NamedTuple):
    """One number of all series whose whole name matches a pattern."""

    key: str
    pattern: str
    one: Callable[[SeriesStats], float | None]  # of a series; None: it has none
    all: Callable[[Iterable[float]], float]
    unit: str = ""
    gap: str = ""  # why there is none; "": then the measure is left out


def total(stats: SeriesStats) -> float | None:
    """Sum over steps of a count, from the exact mean and number of its finite values."""
    return None if stats.mean is None else float(round(stats.mean * (stats.count - stats.nonfinite)))


def ever(stats: SeriesStats) -> float:
    """Whether a count is above zero at any step: 0 or 1."""
    return float((stats.max or 0.0) > 0)


def bad(stats: SeriesStats) -> float:
    """Whether a value is NaN or infinite at any step: 0 or 1."""
    return float(stats.nonfinite > 0)


def _p50(stats: SeriesStats) -> float | None:
    return stats.p50


def _max(stats: SeriesStats) -> float | None:
    return stats.max


def _min(stats: SeriesStats) -> float | None:
    return stats.min


def _mean(stats: SeriesStats) -> float | None:
    return stats.mean


UPDATE_RATIO = r"updates/(.+)/ratio"
GRADIENT_SHARE = r"loss_gradients/([^/]+)/share"
GRADIENT_COSINE = r"loss_gradients/cosine/(.+)"
_NO_UPDATES = "no probe in this record measures ‖Δw‖ ÷ ‖w‖ (probe updates)"
_NO_TERMS = "needs the gradient of every term (probe loss_gradients)"
_NO_TIMES = "no probe in this record times the steps (probe throughput)"

SUMMARIES: tuple[Summary, ...] = (
    Summary("update_ratio/p50", UPDATE_RATIO, _p50, median, gap=_NO_UPDATES),
    Summary("update_ratio/max", UPDATE_RATIO, _max, max, gap=_NO_UPDATES),
    Summary("updates/skipped", r"updates/(skipped)", total, sum, "steps"),
    Summary("gradient_conflict", r"loss_gradients/(conflict)", _p50, median),
    Summary("activations/nonfinite", r"activations/(.+)/nonfinite", ever, sum, "modules"),
    Summary("weights/nonfinite", r"weights/(.+)/norm", bad, sum, "modules"),
    Summary("normalize/smallest", r"normalize/(.+)/smallest", _min, min),
    Summary("attention/masked_rows", r"attention/(.+)/masked_rows", total, sum, "rows"),
    Summary("attention/max_logit", r"attention/(.+)/max_logit", _max, max),
    Summary("matching/empty", r"matching/(empty)", total, sum, "scenes"),
    Summary("matching/unmatched", r"matching/(unmatched)", total, sum, "objects"),
    Summary("matching/queries_min", r"matching/(queries_min)", _min, min, "queries"),
    Summary("data/nonfinite", r"data/(.+)/nonfinite", total, sum, "values"),
    Summary("data/out_of_range", r"data/(.+)/out_of_range", total, sum, "labels"),
    Summary("data/ignored_share", r"data/(.+)/ignored_share", _mean, max),
    Summary("data/fewest_rows", r"data/(.+)/fewest_rows", _min, min, "rows"),
    Summary("throughput/step_seconds", r"throughput/(step)_seconds", _p50, max, "s", _NO_TIMES),
    Summary("throughput/data_seconds", r"throughput/(data)_seconds", _p50, max, "s"),
    Summary("throughput/forward_seconds", r"throughput/(forward)_seconds", _p50, max, "s"),
    Summary("throughput/backward_seconds", r"throughput/(backward)_seconds", _p50, max, "s"),
    Summary("throughput/update_seconds", r"throughput/(update)_seconds", _p50, max, "s"),
    Summary("throughput/peak_resident_mib", r"throughput/(peak_resident)_mib", _max, max, "MiB"),
    Summary("throughput/device_peak_mib", r"throughput/(device_peak)_mib", _max, max, "MiB"),
)
FAMILIES = (("gradient_share", GRADIENT_SHARE, _NO_TERMS), ("gradient_cosine", GRADIENT_COSINE, _NO_TERMS))


def instrument_measures(run: Run) -> dict[str, Reading]:
    """The summaries of a run, and of every family its members' medians over steps."""
    readings: dict[str, Reading] = {}
    for summary in SUMMARIES:
        found = [summary.one(series.stats) for _, series in matching(run, summary.pattern)]
        known = [value for value in found if value is not None]
        if known:
            readings[summary.key] = Quantity(float(summary.all(known)), summary.unit)
        elif summary.gap:
            readings[summary.key] = NotMeasured(summary.gap)
    for family, pattern, gap in FAMILIES:
        members = {name: series.stats.p50 for name, series in matching(run, pattern)}
        measured = {name: value for name, value in members.items() if value is not None}
        readings |= {f"{family}/{name}": Quantity(value) for name, value in measured.items()}
        if not measured:
            readings[f"{family}/*"] = NotMeasured(gap)
    return readings


def matching(run: Run, pattern: str) -> Iterator[tuple[str, Series]]:
    """The series whose whole name matches, each with what the pattern's group found."""
    compiled = re.compile(pattern)
    for name in run.names(pattern.split("/", 1)[0] + "/"):
        if found := compiled.fullmatch(name):
            yield found[1], run.all_series[name]
