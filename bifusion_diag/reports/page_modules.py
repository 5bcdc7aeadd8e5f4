"""The table of modules: gradients of one run, or of two side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bifusion_diag.diagnosis.modules import ModuleGradient, ModulePair
from bifusion_diag.reports.budget import Budget
from bifusion_diag.reports.language import tr
from bifusion_diag.reports.numbers import ratio_text, text


@dataclass(frozen=True)
class Cell:
    """A number as text, and as what it is sorted by; None sorts last."""

    shown: str
    value: float | None


@dataclass(frozen=True)
class ModuleRow:
    """One module: its numbers, and its state in words."""

    module: str
    cells: list[Cell]
    state: str


@dataclass(frozen=True)
class ModuleTable:
    """Gradients by module. `head` names the module, the numbers and the state."""

    title: str
    head: tuple[str, ...]
    rows: list[ModuleRow]
    left_out: int


def pair_table(pairs: Sequence[ModulePair], baseline: str, candidate: str, budget: Budget) -> ModuleTable:
    """The modules that both runs have, worst first."""
    head = (
        tr("module"),
        baseline,
        candidate,
        tr("ratio"),
        tr("largest"),
        tr("non-finite steps"),
        tr("update ratio"),
        tr("state in {name}", name=candidate),
    )
    title = tr(
        "Median gradient norm of the modules of both {baseline} and {candidate}, non-finite first, then by ratio; "
        "the last four columns are of {candidate}",
        baseline=baseline,
        candidate=candidate,
    )
    rows = [
        ModuleRow(
            pair.module,
            [
                _norm(pair.baseline.median),
                _norm(pair.candidate.median),
                Cell(ratio_text(pair.ratio), pair.ratio),
                *_rest(pair.candidate),
            ],
            tr(pair.candidate.state),
        )
        for pair in pairs[: budget.modules]
    ]
    return ModuleTable(title, head, rows, len(pairs) - len(rows))


def run_table(modules: Sequence[ModuleGradient], budget: Budget) -> ModuleTable:
    """The modules of a run in execution order; those without a gradient would fill the first rows and come last."""
    ordered = sorted(modules, key=lambda row: row.median is None)
    rows = [ModuleRow(row.module, [_norm(row.median), *_rest(row)], tr(row.state)) for row in ordered[: budget.modules]]
    head = (tr("module"), tr("median"), tr("largest"), tr("non-finite steps"), tr("update ratio"), tr("state"))
    title = tr("Gradient norm by module, in execution order; those without a gradient last")
    return ModuleTable(title, head, rows, len(modules) - len(rows))


def _rest(row: ModuleGradient) -> list[Cell]:
    bad = Cell(text(row.nonfinite, whole=True), float(row.nonfinite))
    return [_norm(row.maximum), bad, _norm(row.update_ratio)]


def _norm(value: float | None) -> Cell:
    return Cell("–" if value is None else text(value), value)
