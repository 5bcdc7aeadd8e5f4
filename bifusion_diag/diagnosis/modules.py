"""Gradients by module: one row a module, one run or two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bifusion_diag.diagnosis.origins import gradient_modules
from bifusion_diag.record.schema import Run

STATES = ("frozen", "no gradient", "zero", "finite", "non-finite")  # by code in grads/<module>/state


@dataclass(frozen=True)
class ModuleGradient:
    """The parameter-gradient norm of one module in one run.

    Attributes:
        module: dotted name.
        part: the part of the model that it belongs to.
        state: what holds at most steps, one of `STATES`.
        median: of the finite norms, None where there is none.
        maximum: likewise.
        nonfinite: steps with a non-finite gradient.
        update_ratio: median over steps of ‖Δw‖ ÷ ‖w‖, None where it was not measured.
    """

    module: str
    part: str
    state: str
    median: float | None
    maximum: float | None
    nonfinite: int
    update_ratio: float | None = None


@dataclass(frozen=True)
class ModulePair:
    """The same module in two runs; `ratio` is candidate ÷ baseline of the median norms."""

    module: str
    baseline: ModuleGradient
    candidate: ModuleGradient
    ratio: float | None


def module_gradients(run: Run) -> tuple[ModuleGradient, ...]:
    """All modules with recorded gradients, in execution order."""
    parts = {module.name: module.part for module in run.modules}
    rows = []
    for module in gradient_modules(run):
        state = run.all_series[f"grads/{module}/state"]
        norm = run.series(f"grads/{module}/param_norm")
        ratio = run.series(f"updates/{module}/ratio")
        codes = np.rint(state.value[np.isfinite(state.value)]).astype(int)  # of a reduced series: bucket means
        usual = STATES[int(np.bincount(codes).argmax())] if codes.size else "not measured"
        rows.append(
            ModuleGradient(
                module,
                parts.get(module, module.split(".")[0]),
                usual,
                None if norm is None else norm.stats.p50,
                None if norm is None else norm.stats.max,
                0 if norm is None else norm.stats.nonfinite,
                None if ratio is None else ratio.stats.p50,
            )
        )
    return tuple(rows)


def pair_modules(baseline: Sequence[ModuleGradient], candidate: Sequence[ModuleGradient]) -> tuple[ModulePair, ...]:
    """The modules that both runs have, worst first.

    That is by non-finite steps of the candidate, then by the distance of the ratio from 1.
    """
    left = {row.module: row for row in baseline}
    pairs = []
    for row in candidate:
        if row.module in left:
            other = left[row.module]
            ratio = row.median / other.median if row.median is not None and other.median else None
            pairs.append(ModulePair(row.module, other, row, ratio))
    return tuple(sorted(pairs, key=_badness))


def _badness(pair: ModulePair) -> tuple[int, float]:
    distance = abs(np.log(pair.ratio)) if pair.ratio else 0.0
    return -pair.candidate.nonfinite, -float(distance)
