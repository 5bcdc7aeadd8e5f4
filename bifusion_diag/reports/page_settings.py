"""Settings of all runs side by side, and those that a comparison suspects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bifusion_diag.diagnosis.settings_diff import ABSENT, flatten
from bifusion_diag.record.schema import Run
from bifusion_diag.reports.budget import Budget, cut
from bifusion_diag.reports.language import tr


@dataclass(frozen=True)
class SettingLine:
    """One setting; one text a run."""

    key: str
    texts: tuple[str, ...]

    @property
    def differs(self) -> bool:
        """Whether the runs differ in it."""
        return len(set(self.texts)) > 1


@dataclass(frozen=True)
class SettingTable:
    """Settings of one kind."""

    title: str
    rows: list[SettingLine]
    left_out: int = 0

    @property
    def differing(self) -> list[SettingLine]:
        """The lines that differ."""
        return [row for row in self.rows if row.differs]

    @property
    def equal(self) -> list[SettingLine]:
        """The lines that do not differ."""
        return [row for row in self.rows if not row.differs]


def setting_tables(runs: Sequence[Run], budget: Budget) -> list[SettingTable]:
    """Settings of all runs side by side, differences first in each table."""
    tables = []
    for title, sources in (
        (tr("Settings"), [run.settings for run in runs]),
        (tr("Data and weights"), [run.provenance for run in runs]),
        (tr("Parameters"), [run.parameters for run in runs]),
        (tr("Environment"), [run.environment for run in runs]),
    ):
        flat = [flatten(source) for source in sources]
        keys = dict.fromkeys(key for one in flat for key in one)
        rows = [SettingLine(key, tuple(one.get(key, ABSENT) for one in flat)) for key in keys]
        rows.sort(key=lambda row: not row.differs)  # before they are cut: what differs at its end differs
        shown = [_cut(row, budget.length) for row in rows[: budget.settings]]
        if shown:
            tables.append(SettingTable(title, shown, len(rows) - len(shown)))
    return tables


def _cut(row: SettingLine, length: int) -> SettingLine:
    """A line of bounded length; texts that differ stay different."""
    texts = [cut(text, length) for text in row.texts]
    if row.differs and len(set(texts)) == 1:
        at = _first_difference(row.texts)
        texts = [cut(f"…{text[max(0, at - 20) :]}", length) for text in row.texts]
    return SettingLine(cut(row.key, length), tuple(texts))


def _first_difference(texts: Sequence[str]) -> int:
    return next(place for place in range(max(map(len, texts))) if len({text[place : place + 1] for text in texts}) > 1)
