"""The table of measures: one reading a run, and ratios to the baseline's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from bifusion_diag.diagnosis.assess import RunAssessment
from bifusion_diag.diagnosis.comparing.pair import RunComparison
from bifusion_diag.diagnosis.definitions import DEFINITIONS, definition_of, member_of
from bifusion_diag.diagnosis.quantity import NotMeasured, Reading
from bifusion_diag.reports.budget import Budget
from bifusion_diag.reports.language import listed, tr


@dataclass(frozen=True)
class MeasureRow:
    """One line of the table of measures: one reading a run, one ratio to the baseline's a candidate.

    `definition` is "" where it is that of the line above.
    """

    title: str
    readings: tuple[Reading, ...]
    ratios: tuple[float | None, ...]
    definition: str


@dataclass(frozen=True)
class MeasureGroup:
    """Measures of one kind."""

    title: str
    rows: list[MeasureRow]


def compared_measures(comparisons: Sequence[RunComparison], budget: Budget) -> tuple[list[MeasureGroup], int]:
    """The baseline's reading, every candidate's, and the ratios, by measure; and how many lines were left out."""
    tables = [{pair.key: pair for pair in comparison.measures} for comparison in comparisons]
    gap = NotMeasured("was not recorded")
    rows = []
    for key in dict.fromkeys(key for table in tables for key in table):
        pairs = [table.get(key) for table in tables]
        before = next(pair.baseline for pair in pairs if pair is not None)
        readings = (before, *(gap if pair is None else pair.candidate for pair in pairs))
        ratios = tuple(None if pair is None else pair.ratio for pair in pairs)
        rows.append((key, MeasureRow(_title(key), readings, ratios, tr(definition_of(key).text))))
    return _groups(rows[: budget.measures]), max(0, len(rows) - budget.measures)


def run_measures(assessment: RunAssessment, budget: Budget) -> tuple[list[MeasureGroup], int]:
    """The readings of one run, and how many lines were left out."""
    rows = [
        (key, MeasureRow(_title(key), (reading,), (), tr(definition_of(key).text)))
        for key, reading in assessment.measures.readings.items()
    ]
    return _groups(rows[: budget.measures]), max(0, len(rows) - budget.measures)


def _title(key: str) -> str:
    member = member_of(key)
    title = tr(definition_of(key).title)
    return title if member in ("", "*") else listed((title, member), ", ")


def _groups(rows: Iterable[tuple[str, MeasureRow]]) -> list[MeasureGroup]:
    """By group, in the order of the definitions."""
    groups = {definition.group: MeasureGroup(tr(definition.group), []) for definition in DEFINITIONS}
    for key, row in rows:
        groups[definition_of(key).group].rows.append(row)
    for group in groups.values():
        said = [row.definition for row in group.rows]
        group.rows[:] = [
            replace(row, definition="") if place and said[place - 1] == row.definition else row
            for place, row in enumerate(group.rows)
        ]
    return [group for group in groups.values() if group.rows]
