"""The measures of stability, computed from a run record (definitions in :mod:`bifusion_diag.diagnosis.definitions`).

A record of a long run is reduced. What a reduced series still states exactly (counts, extremes, percentiles of the
whole run) is used; the rest is taken from the measures that were stored at full resolution when the run ended, and is
"not measured" where there are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.diagnosis.definitions import DEFINITIONS, is_defined
from bifusion_diag.diagnosis.instruments import instrument_measures, total
from bifusion_diag.diagnosis.names import AP50, CLIP_PLACES, COEFFICIENT, MIOU, NORM, TOTAL, is_exact, loss_terms
from bifusion_diag.diagnosis.origins import Origin, origin_from_dict, origin_to_dict, trace_origins
from bifusion_diag.diagnosis.phrase import say
from bifusion_diag.diagnosis.quantity import (
    NotMeasured,
    Quantity,
    Reading,
    number,
    reading_from_dict,
    reading_to_dict,
)
from bifusion_diag.diagnosis.spikes import MIN_PREVIOUS, find_spikes
from bifusion_diag.diagnosis.validation import evaluated_at
from bifusion_diag.record.schema import Run, Series

LISTED_STEPS = 1000  # step lists keep at most so many; the counts are always complete
LISTED_LAST = 10  # of a longer list its last steps, so many: did the run recover? The others are its first

SINGLE_STEPS = ("bad_steps", "nonfinite_steps", "spikes", "spike_rate")  # measures that depend on single steps

_REDUCED = "the record is reduced and holds no measures at full resolution"


@dataclass(frozen=True)
class Measures:
    """Every measure of a run.

    Attributes:
        readings: by key, in the order of the definitions.
        nonfinite: the non-finite steps; of more than `LISTED_STEPS` the first ones and the last `LISTED_LAST`.
        spikes: the spikes, likewise.
        origins: where each of these steps starts; empty where that could not be traced.
        smoothing: steps whose mean a recorded value is; 1 where every value is of one step.
    """

    readings: Mapping[str, Reading]
    nonfinite: tuple[int, ...] = ()
    spikes: tuple[int, ...] = ()
    origins: tuple[Origin, ...] = ()
    smoothing: int = 1

    @property
    def bad(self) -> tuple[int, ...]:
        """All listed bad steps."""
        return tuple(sorted({*self.nonfinite, *self.spikes}))

    def number(self, key: str) -> float | None:
        """The number of a measure, None where it was not measured or there is none."""
        return number(self.readings.get(key))


def measures_to_dict(measures: Measures) -> dict[str, Any]:
    """Measures as strict JSON, as they are stored in run.json."""
    return {
        "readings": {key: reading_to_dict(reading) for key, reading in measures.readings.items()},
        "nonfinite": list(measures.nonfinite),
        "spikes": list(measures.spikes),
        "origins": [origin_to_dict(origin) for origin in measures.origins],
    }


def measures_from_dict(stored: Mapping[str, Any]) -> Measures:
    """The inverse of :func:`measures_to_dict`."""
    readings = {str(key): reading_from_dict(reading) for key, reading in stored["readings"].items()}
    origins = tuple(map(origin_from_dict, stored["origins"]))
    return Measures(readings, tuple(map(int, stored["nonfinite"])), tuple(map(int, stored["spikes"])), origins)


def measure(run: Run) -> Measures:
    """Measure a run: from its series where these are exact, else as measured when the run ended."""
    if not is_exact(run) and "readings" in run.measures:
        stored = measures_from_dict(run.measures)
        known = {key: reading for key, reading in stored.readings.items() if is_defined(key)}
        return replace(stored, readings=_in_order(known | instrument_measures(run)), smoothing=smoothing_of(run))
    nonfinite = nonfinite_steps(run)
    spikes, judged, spike_gap = _spike_steps(run)
    readings: dict[str, Reading] = {"steps": Quantity(len(run.steps), "steps")}
    readings |= _bad_steps(run, nonfinite, spikes, judged, spike_gap)
    readings |= _gradient_norm(run) | _clipping(run) | _loss_share(run) | instrument_measures(run)
    readings |= _clip(run) | _projection(run) | _gate(run) | _validation(run)
    window = smoothing_of(run)
    if window > 1:
        readings |= _without_single_steps(readings, window)
    listed = _listed(nonfinite), _listed(spikes if window == 1 else spikes[:0])
    return Measures(_in_order(readings), *listed, trace_origins(run, *listed), window)


def smoothing_of(run: Run) -> int:
    """Of how many steps a recorded value is the mean: 1, unless the run was imported from a log that smooths."""
    imported = run.provenance.get("imported")
    window = imported.get("smoothing") if isinstance(imported, Mapping) else None
    return window if isinstance(window, int) and window > 1 else 1


def _without_single_steps(readings: Mapping[str, Reading], window: int) -> dict[str, Reading]:
    """What depends on single steps cannot be told from means of several."""
    gap = NotMeasured(say("smoothed over {window}: one bad step shows as {window}", window=window))
    return {key: gap for key in SINGLE_STEPS if isinstance(readings.get(key), Quantity)}


def nonfinite_steps(run: Run) -> NDArray[np.int64]:
    """Steps (K,) with a non-finite total loss, raw loss term or gradient norm.

    Of reduced series, the first steps of the buckets.
    """
    names = [TOTAL, NORM, *loss_terms(run).values()]
    steps = [series.steps[series.nonfinite > 0] for name in names if (series := run.series(name)) is not None]
    return np.unique(np.concatenate(steps)) if steps else np.zeros(0, np.int64)


def _listed(steps: NDArray[np.int64]) -> tuple[int, ...]:
    if steps.size > LISTED_STEPS:
        steps = np.concatenate([steps[: LISTED_STEPS - LISTED_LAST], steps[-LISTED_LAST:]])
    return tuple(steps.tolist())


def _in_order(readings: dict[str, Reading]) -> dict[str, Reading]:
    """Sort by the order of the definitions; members of a family in the order in which they were recorded."""
    rank = {definition.key: place for place, definition in enumerate(DEFINITIONS)}

    def place(key: str) -> tuple[int, ...]:
        if key in rank:
            return (rank[key],)
        first, _, rest = key.partition("/")
        if first == "clip":
            where, statistic = rest.split("/", 1)
            return rank["clip/*/min"], CLIP_PLACES.index(where), rank[f"clip/*/{statistic}"]
        return (rank[f"{first}/*"],)

    return dict(sorted(readings.items(), key=lambda item: place(item[0])))


def _spike_steps(run: Run) -> tuple[NDArray[np.int64], int, NotMeasured | None]:
    """Steps that are spikes, how many steps could be judged, and why there are none."""
    nothing = np.zeros(0, np.int64)
    norm = run.series(NORM)
    if norm is None:
        return nothing, 0, NotMeasured(say("{name} was not recorded", name=NORM))
    if not norm.exact:
        return nothing, 0, NotMeasured(_REDUCED)
    found = find_spikes(norm.value)
    judged = int(found.judged.sum())
    reason = None if judged else NotMeasured(say("needs more than {count} finite gradient norms", count=MIN_PREVIOUS))
    return norm.steps[found.is_spike], judged, reason


def _bad_steps(
    run: Run, nonfinite: NDArray[np.int64], spikes: NDArray[np.int64], judged: int, spike_gap: NotMeasured | None
) -> dict[str, Reading]:
    if run.series(TOTAL) is None and run.series(NORM) is None:
        gap = NotMeasured(say("neither {loss} nor {norm} was recorded", loss=TOTAL, norm=NORM))
        return dict.fromkeys(("bad_steps", "nonfinite_steps", "first_nonfinite_step", "spikes", "spike_rate"), gap)
    first = int(nonfinite[0]) if nonfinite.size else None
    readings: dict[str, Reading] = {"first_nonfinite_step": Quantity(first, "step")}
    exact = is_exact(run, "loss/") and is_exact(run, NORM)
    readings["nonfinite_steps"] = Quantity(nonfinite.size, "steps") if exact else NotMeasured(_REDUCED)
    readings["bad_steps"] = Quantity(np.union1d(nonfinite, spikes).size, "steps") if exact else NotMeasured(_REDUCED)
    readings["spikes"] = spike_gap or Quantity(spikes.size, "steps")
    readings["spike_rate"] = spike_gap or Quantity(spikes.size / judged)
    return readings


def _gradient_norm(run: Run) -> dict[str, Reading]:
    norm = run.series(NORM)
    names = ("p50", "p95", "p99", "max")
    if norm is None or norm.stats.p50 is None:
        gap = NotMeasured(say("{name} was not recorded", name=NORM) if norm is None else "no gradient norm is finite")
        return {**{f"grad_norm/{name}": gap for name in names}, "grad_cv": gap}
    readings: dict[str, Reading] = {f"grad_norm/{name}": Quantity(getattr(norm.stats, name)) for name in names}
    readings["grad_cv"] = NotMeasured(_REDUCED)
    if norm.exact:
        finite = norm.value[np.isfinite(norm.value)]
        middle = float(np.median(finite))
        spread = float(np.median(np.abs(finite - middle)))
        readings["grad_cv"] = Quantity(spread / middle) if middle > 0 else NotMeasured("the median norm is zero")
    return readings


def _clipping(run: Run) -> dict[str, Reading]:
    coefficient = run.series(COEFFICIENT)
    if coefficient is None or not coefficient.exact:
        gap = NotMeasured(say("{name} was not recorded", name=COEFFICIENT) if coefficient is None else _REDUCED)
        return {"clipped_share": gap, "shrink_factor": gap}
    known = coefficient.value[np.isfinite(coefficient.value)]
    if not known.size:
        gap = NotMeasured("no clip coefficient is finite")
        return {"clipped_share": gap, "shrink_factor": gap}
    clipped = known[known < 1]
    shrink: Reading = Quantity(float(clipped.mean())) if clipped.size else NotMeasured("no step was clipped")
    return {"clipped_share": Quantity(clipped.size / known.size), "shrink_factor": shrink}


def _loss_share(run: Run) -> dict[str, Reading]:
    terms = {term: run.all_series[name] for term, name in loss_terms(run, "weighted").items()}
    if not terms:
        return {"loss_share/*": NotMeasured("the losses were not recorded by term")}
    if not all(series.exact for series in terms.values()):
        return {f"loss_share/{term}": NotMeasured(_REDUCED) for term in terms}
    share = loss_shares(terms)
    if not np.isfinite(share).any():
        return {f"loss_share/{term}": NotMeasured("no step has only finite terms") for term in terms}
    return {f"loss_share/{term}": Quantity(float(np.nanmean(row))) for term, row in zip(terms, share, strict=True)}


def loss_shares(terms: Mapping[str, Series]) -> NDArray[np.float64]:
    """Share of every term in the total of their absolute values (T, K); NaN at steps with a non-finite term.

    Args:
        terms: weighted terms on the same K steps; a term that is missing at a step has no share there.
    """
    size = np.stack([np.where(series.missing > 0, 0.0, np.abs(series.value)) for series in terms.values()])
    total = size.sum(axis=0)
    total[~np.isfinite(total) | (total == 0)] = np.nan
    return size / total


def _clip(run: Run) -> dict[str, Reading]:
    readings: dict[str, Reading] = {}
    for where in CLIP_PLACES:
        prefix = f"clip/{where}/"
        if not run.names(prefix):
            continue
        for statistic in ("min", "max", "absmax"):
            series = run.series(prefix + statistic)
            readings[prefix + statistic] = _extreme(series, largest=statistic != "min")
        readings[prefix + "p99.9"] = _median(run.series(prefix + "p99.9"))
        readings[prefix + "share_gt_10"] = _mean(run.series(prefix + "share_gt_10"))
        readings[prefix + "norm_mean"] = _median(run.series(prefix + "norm_mean"))
        readings[prefix + "nonfinite"] = _total(run.series(prefix + "nonfinite"))
    if not readings:
        return {"clip/ratio_2d_3d": NotMeasured("no CLIP features were recorded")}
    readings["clip/ratio_2d_3d"] = _median(run.series("clip/ratio_2d_3d"))
    return readings


def _projection(run: Run) -> dict[str, Reading]:
    names = ("points", "nan", "inf", "behind", "outside", "occluded", "valid")
    if not run.names("projection/"):
        return {"projection/valid_share": NotMeasured("no projection was recorded")}
    readings = {f"projection/{name}": _total(run.series(f"projection/{name}")) for name in names}
    share = run.series("projection/valid_share")
    return {
        **readings,
        "projection/valid_share": _mean(share),
        "projection/valid_share_min": _extreme(share, largest=False),
    }


def _gate(run: Run) -> dict[str, Reading]:
    if not run.names("gate/"):
        return {"gate/mean": NotMeasured("no gate was recorded")}
    return {f"gate/{name}": _mean(run.series(f"gate/{name}")) for name in ("mean", "share_lt_0.05", "share_gt_0.95")}


def _validation(run: Run) -> dict[str, Reading]:
    if not run.names("eval/"):
        return {MIOU: NotMeasured("the run was not evaluated; train with --evaluate-every")}
    readings: dict[str, Reading] = {}
    for name in (MIOU, "eval/ap", AP50, "eval/ap25", "eval/alignment", "eval/uniformity"):
        readings[name] = _last(run.series(name))
    for name in (MIOU, AP50):
        readings[f"{name}_best"] = _extreme(run.series(name), largest=True)
    return readings


def _last(series: Series | None) -> Reading:
    values = evaluated_at(series)[1]
    if series is None or not values.size:
        return NotMeasured("was not recorded" if series is None else "no value is finite")
    return Quantity(float(values[-1]), series.unit) if series.exact else NotMeasured(_REDUCED)


def _from_stats(series: Series | None, name: str) -> Reading:
    value = None if series is None else getattr(series.stats, name)
    if series is None or value is None:
        return NotMeasured("was not recorded" if series is None else "no value is finite")
    return Quantity(float(value), series.unit)


def _median(series: Series | None) -> Reading:
    return _from_stats(series, "p50")


def _mean(series: Series | None) -> Reading:
    return _from_stats(series, "mean")


def _extreme(series: Series | None, *, largest: bool) -> Reading:
    return _from_stats(series, "max" if largest else "min")


def _total(series: Series | None) -> Reading:
    """Sum over steps."""
    value = None if series is None else total(series.stats)
    if series is None or value is None:
        return NotMeasured("was not recorded" if series is None else "no value is finite")
    return Quantity(value, series.unit)
