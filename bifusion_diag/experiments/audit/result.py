"""What an audit found, as plain data: numbers, tables and findings by section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bifusion_diag.diagnosis.findings import SEVERITIES, Evidence, Finding, Severity
from bifusion_diag.diagnosis.plain import to_plain
from bifusion_diag.diagnosis.quantity import Quantity, Reading

Cell = str | float | int | None


@dataclass(frozen=True)
class Number:
    """One measured number.

    Attributes:
        key: stable, section/name.
        title: what it is.
        reading: the number, or why there is none.
        meaning: what it says about the run, "" where the title says it all.
    """

    key: str
    title: str
    reading: Reading
    meaning: str = ""

    def evidence(self) -> Evidence:
        """For a finding."""
        return Evidence(self.title, self.reading, self.key)


@dataclass(frozen=True)
class Table:
    """Numbers that are read side by side; None where there is nothing to say."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    shown: bool = True  # in the terminal, where there is room


@dataclass(frozen=True)
class Section:
    """What one check measured.

    Attributes:
        id: of the check.
        title: of the check.
        not_measured: why it could not be done, None where it was.
    """

    id: str
    title: str
    numbers: tuple[Number, ...] = ()
    tables: tuple[Table, ...] = ()
    findings: tuple[Finding, ...] = ()
    not_measured: str | None = None


@dataclass(frozen=True)
class Audit:
    """The whole audit.

    Attributes:
        preset: and `scale`: what was audited.
        settings: all of them.
        batch: names of the scenes that the numbers are of.
        provenance: of weights, engine, labels and data.
        sections: one a check.
        seconds: how long it took.
    """

    preset: str
    scale: str
    settings: Mapping[str, Any]
    batch: tuple[str, ...]
    provenance: Mapping[str, Any]
    sections: tuple[Section, ...]
    seconds: float

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All of them, the worst first."""
        found = [finding for section in self.sections for finding in section.findings]
        return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))

    def count(self, severity: Severity) -> int:
        """How many findings are that bad."""
        return sum(finding.severity == severity for finding in self.findings)

    def section(self, name: str) -> Section:
        """The section of that id; KeyError where there is none."""
        return {section.id: section for section in self.sections}[name]

    def number(self, key: str) -> Reading:
        """A number by its key; KeyError where there is none."""
        return {number.key: number.reading for section in self.sections for number in section.numbers}[key]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as strict JSON."""
        plain: dict[str, Any] = to_plain(self)
        counts = {severity: self.count(severity) for severity in SEVERITIES}
        return plain | {"counts": counts, "findings": to_plain(self.findings)}


@dataclass
class Draft:
    """A section that is being written."""

    id: str
    title: str
    numbers: list[Number] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def number(self, name: str, title: str, value: Reading | float, unit: str = "", meaning: str = "") -> Number:
        """Note a number; `name` is its key within the section."""
        reading = Quantity(float(value), unit) if isinstance(value, int | float) else value
        noted = Number(f"{self.id}/{name}", title, reading, meaning)
        self.numbers.append(noted)
        return noted

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, shown: bool = True) -> None:
        """Note a table."""
        self.tables.append(Table(title, tuple(columns), tuple(tuple(row) for row in rows), shown))

    def report(
        self,
        rule: str,
        severity: Severity,
        title: str,
        mechanism: str,
        *evidence: Number,
        remedy: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        """Note a finding; `more` are further fields of it."""
        shown = tuple(number.evidence() for number in evidence)
        self.findings.append(Finding(rule, severity, title, shown, mechanism, remedy=remedy, **more))

    def done(self) -> Section:
        """The section."""
        return Section(self.id, self.title, tuple(self.numbers), tuple(self.tables), tuple(self.findings))
