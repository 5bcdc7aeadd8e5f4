"""What differed between two runs: settings, data, weights, labels, parameters, versions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bifusion_diag.record.schema import Run

ABSENT = "—"


@dataclass(frozen=True)
class SettingRow:
    """One setting of both runs, as text."""

    key: str
    baseline: str
    candidate: str

    @property
    def differs(self) -> bool:
        """Whether the two runs have different values."""
        return self.baseline != self.candidate


@dataclass(frozen=True)
class SettingGroup:
    """Settings of one kind, differences first."""

    title: str
    rows: tuple[SettingRow, ...]


def diff_settings(baseline: Run, candidate: Run) -> tuple[SettingGroup, ...]:
    """Settings, provenance, parameters and environment of both runs side by side, differences first in each group."""
    sources = (
        ("Settings", baseline.settings, candidate.settings),
        ("Data and weights", baseline.provenance, candidate.provenance),
        ("Parameters", baseline.parameters, candidate.parameters),
        ("Environment", baseline.environment, candidate.environment),
    )
    groups = (SettingGroup(title, _rows(flatten(left), flatten(right))) for title, left, right in sources)
    return tuple(group for group in groups if group.rows)


def _rows(left: Mapping[str, str], right: Mapping[str, str]) -> tuple[SettingRow, ...]:
    keys = [*left, *(key for key in right if key not in left)]
    rows = [SettingRow(key, left.get(key, ABSENT), right.get(key, ABSENT)) for key in keys]
    return tuple(sorted(rows, key=lambda row: not row.differs))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys and text."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = _text(value)
    return flat


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_text(item) for item in value) + "]"
    return str(value)
