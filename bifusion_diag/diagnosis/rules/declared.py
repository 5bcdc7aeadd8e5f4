"""What a run's settings declare, as the rules of the fusion ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bifusion_diag.diagnosis.findings import Context
from bifusion_diag.diagnosis.measures import Measures
from bifusion_diag.record.schema import Run, Series

ALIGN = "losses.clip_align"


def declared(settings: Mapping[str, Any], key: str) -> Any:
    """A setting by its dotted key, None where there is none."""
    value: Any = settings
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def declared_number(settings: Mapping[str, Any], key: str) -> float | None:
    """A setting that is a number, None where it is anything else."""
    value = declared(settings, key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def term_weight(run: Run, term: str) -> float | None:
    """The median of a term's weight over the steps, as measured: weighted ÷ raw; None where it is not known or 0."""
    raw, weighted = run.series(f"loss/{term}/raw"), run.series(f"loss/{term}/weighted")
    if raw is None or weighted is None or len(raw.value) != len(weighted.value):
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = weighted.value / raw.value
    ratio = ratio[np.isfinite(ratio)]
    return float(np.median(ratio)) if ratio.size else None


def late(series: Series | None, share: float = 0.25) -> float | None:
    """The median of the finite values of the last part of a run; None where there is none."""
    if series is None or not len(series.value):
        return None
    values = series.value[-max(int(len(series.value) * share), 1) :]
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else None


def early(series: Series | None) -> float | None:
    """The first finite value; None where there is none."""
    values = np.zeros(0) if series is None else series.value[np.isfinite(series.value)]
    return float(values[0]) if values.size else None


def usual(series: Series | None) -> float | None:
    """The median of a series; None where nothing is finite."""
    return None if series is None else series.stats.p50


def alpha_where_seen(context: Context, mean: float | None, valid_share: float | None) -> float | None:
    """The mean α of the points that have a view, from the mean over all points: the others have α fixed by a setting.
    None where the settings do not tell at what, or no point has a view."""
    fixed = declared_number(context.run.settings, "model.gate.invalid_alpha")
    if declared(context.run.settings, "model.fusion") == "simple":
        fixed = 0.0
    if fixed is None or mean is None or not valid_share:
        return None
    return (mean - (1 - valid_share) * fixed) / valid_share


def gradient_share(measures: Measures, term: str) -> float | None:
    """The median share of a term in the gradient on shared weights, None where it was not measured."""
    return measures.number(f"gradient_share/{term}")
