"""Which modules and which loss terms make up the difference of two runs.

Every quantity is one number a module or term and run (`ATTRIBUTED`). Of several runs a side it is the mean. The share
of a module is its difference, candidate − baseline, ÷ the sum of the absolute differences of all: shares of both signs
add up to at most 1, and a negative one says that the module has less of it in the candidate.

Squared norms add up: those of all modules make that of the whole gradient. So of them, and of losses and counts, a
module or term that only one run has counts in full, as zero in the other; of logarithms and of shares only what both
runs have is compared.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bifusion_diag.diagnosis.instruments import GRADIENT_SHARE, matching
from bifusion_diag.diagnosis.measures import Measures
from bifusion_diag.diagnosis.names import loss_terms, table
from bifusion_diag.diagnosis.origins import gradient_modules
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity, Reading
from bifusion_diag.record.schema import Run, Series

Kind = Literal["module", "term"]
KEPT = 20  # entries of a quantity, the largest first: a model may have thousands of modules

#: What is attributed: key → kind and title, the one that says most first.
ATTRIBUTED: dict[str, tuple[Kind, str]] = {
    "module_bad_steps": ("module", "bad steps that start there"),
    "squared_norm_bad": ("module", "squared gradient norm at the candidate's bad steps, against the baseline's mean"),
    "squared_norm": ("module", "squared gradient norm, mean over the steps"),
    "log_norm": ("module", "logarithm of the median gradient norm"),
    "term_bad_steps": ("term", "bad steps that start there"),
    "loss": ("term", "weighted loss, mean over the steps"),
    "gradient_share": ("term", "share of the gradient, median over the steps"),
}
_ADDS_UP = ("module_bad_steps", "squared_norm_bad", "squared_norm", "term_bad_steps", "loss")
_COUNTS = ("module_bad_steps", "term_bad_steps")
_IN_BASELINE = {"squared_norm_bad": "squared_norm"}  # what of the baseline the candidate's number is set against

Profile = Mapping[str, Mapping[str, float]]  # quantity → module or term → number


@dataclass(frozen=True)
class Attribution:
    """What one module or loss term adds to the difference of two runs.

    Attributes:
        kind: what it is.
        name: of the module or the term.
        baseline: its number in the baseline.
        candidate: and in the candidate.
        share: of the difference, from −1 to 1; see above.
        measure: what was measured, a key of `ATTRIBUTED`.
    """

    kind: Kind
    name: str
    baseline: Reading
    candidate: Reading
    share: float | None
    measure: str = ""

    @property
    def title(self) -> str:
        """What was measured, in words."""
        return ATTRIBUTED[self.measure][1] if self.measure in ATTRIBUTED else ""


def attribute(baseline: Sequence[Profile], candidate: Sequence[Profile]) -> tuple[Attribution, ...]:
    """The difference of two sides' means, by quantity in the order of `ATTRIBUTED`, the largest share first."""
    found: list[Attribution] = []
    for measure, (kind, _) in ATTRIBUTED.items():
        left = _mean([profile.get(_IN_BASELINE.get(measure, measure), {}) for profile in baseline], measure)
        right = _mean([profile.get(measure, {}) for profile in candidate], measure)
        counts = measure in _COUNTS
        if counts and not all(measure in profile for profile in (*baseline, *candidate)):
            continue  # a run whose bad steps are not counted has neither some nor none
        if not right or (not left and not counts):
            continue
        both = [name for name in right if name in left]
        names = list(dict.fromkeys([*right, *left])) if measure in _ADDS_UP else both
        difference = {name: right.get(name, 0.0) - left.get(name, 0.0) for name in names}
        total = sum(map(abs, difference.values()))
        if not total:
            continue
        largest = sorted(names, key=lambda name: -abs(difference[name]))[:KEPT]
        found += [
            Attribution(
                kind,
                name,
                _reading(left, name, zero=counts),
                _reading(right, name, zero=counts),
                difference[name] / total,
                measure,
            )
            for name in largest
            if difference[name]
        ]
    return tuple(found)


def profile_of(run: Run, part: Run, measures: Measures) -> Profile:
    """The numbers of one run.

    Args:
        run: whole, for what a reduced record still states.
        part: the run cut to the steps that are compared.
        measures: over these steps.
    """
    modules = gradient_modules(part) or gradient_modules(run)
    norms = {
        module: series
        for module in modules
        if (series := part.series(f"grads/{module}/param_norm") or run.series(f"grads/{module}/param_norm"))
    }
    starts = Counter(
        (bool(origin.terms), term or origin.module) for origin in measures.origins for term in (origin.terms or (None,))
    )
    counts = {
        measure: {name: float(count) for (of_term, name), count in starts.items() if name and of_term is is_term}
        for measure, is_term in zip(_COUNTS, (False, True), strict=True)
    }
    return {
        **(counts if isinstance(measures.readings.get("bad_steps"), Quantity) else {}),
        "squared_norm": _known({module: _mean_square(series) for module, series in norms.items()}),
        "squared_norm_bad": _at_bad_steps(part, list(norms), measures),
        "log_norm": _known({module: _log(series.stats.p50) for module, series in norms.items()}),
        "loss": _known(
            {
                term: (part.series(name) or run.all_series[name]).stats.mean
                for term, name in loss_terms(run, "weighted").items()
            }
        ),
        "gradient_share": _known(
            {
                term: series.stats.p50
                for term, series in matching(part if part.names("loss_gradients/") else run, GRADIENT_SHARE)
            }
        ),
    }


def _log(value: float | None) -> float | None:
    return math.log(value) if value is not None and value > 0 else None


def _mean_square(series: Series) -> float | None:
    """Mean of the squares of the finite values; a reduced series does not hold them."""
    if not series.exact:
        return None
    finite = series.value[np.isfinite(series.value)]
    return float(np.mean(np.square(finite))) if finite.size else None


def _at_bad_steps(part: Run, modules: Sequence[str], measures: Measures) -> dict[str, float]:
    exact = [
        module
        for module in modules
        if (series := part.series(f"grads/{module}/param_norm")) is not None and series.exact
    ]
    if not exact or not measures.bad:
        return {}
    at = np.asarray(measures.bad, dtype=np.int64)
    squares = np.square(table(part, [f"grads/{module}/param_norm" for module in exact], at))
    squares[~np.isfinite(squares)] = np.nan
    known = np.isfinite(squares).sum(axis=1)
    sums = np.nansum(squares, axis=1)
    return {module: float(total / count) for module, total, count in zip(exact, sums, known, strict=True) if count}


def _known(numbers: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float(value) for name, value in numbers.items() if value is not None and np.isfinite(value)}


def _mean(profiles: Sequence[Mapping[str, float]], measure: str) -> dict[str, float]:
    """Mean over runs; of what adds up, a run that lacks a module has none of it."""
    names = dict.fromkeys(name for profile in profiles for name in profile)
    if measure in _ADDS_UP:
        return {name: sum(profile.get(name, 0.0) for profile in profiles) / len(profiles) for name in names}
    return {name: float(np.mean([profile[name] for profile in profiles if name in profile])) for name in names}


def _reading(numbers: Mapping[str, float], name: str, *, zero: bool) -> Reading:
    """The number of a module or term; of what is counted, one that does not appear has none."""
    if name in numbers or zero:
        return Quantity(numbers.get(name, 0.0))
    return NotMeasured("none in this run")
