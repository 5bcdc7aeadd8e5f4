"""Findings as the page shows them: with their course, their incident, and the command that replays them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from bifusion_diag.diagnosis.assess import RunAssessment
from bifusion_diag.diagnosis.comparing.parting import Parting
from bifusion_diag.diagnosis.findings import Finding, Unmeasured
from bifusion_diag.diagnosis.phrase import join
from bifusion_diag.diagnosis.verdict import Verdict
from bifusion_diag.record.schema import Run
from bifusion_diag.reports.incidents import IncidentGroup
from bifusion_diag.reports.sparkline import Spark, draw_spark

TOP = 3  # findings that the first screen names
LEAD = 2  # parts of a mechanism that are read at once
COMMAND = 4000  # characters
REPLAYED = 10  # steps that a command replays at most


@dataclass(frozen=True)
class ShownFinding:
    """A finding and what the page adds.

    Attributes:
        finding: as diagnosis found it.
        spark: the course of its first number, None where there is none.
        anchor: its id in the page.
        incident: the id of the incident that it is of, "" where there is none.
        command: what replays it, "" where the record does not tell how.
        folded: it is closed at first: it is not among those that the first screen names, and no error.
    """

    finding: Finding
    spark: Spark | None
    anchor: str
    incident: str
    command: str
    folded: bool = False

    @property
    def lead(self) -> str:
        """The first sentences of the mechanism."""
        return join(_parts(self.finding)[:LEAD])

    @property
    def rest(self) -> str:
        """What else it says; may be ""."""
        return join(_parts(self.finding)[LEAD:])


def _parts(finding: Finding) -> tuple[str, ...]:
    """The mechanism's sentences as the rule put them together."""
    return tuple(getattr(finding.mechanism, "parts", (finding.mechanism,)))


@dataclass(frozen=True)
class Judged:
    """The verdict on one run, or one side, and what supports it."""

    name: str
    verdict: Verdict
    partings: tuple[Parting, ...]
    first_loss_difference: int | None
    findings: list[ShownFinding]
    unmeasured: tuple[Unmeasured, ...]

    @property
    def top(self) -> list[ShownFinding]:
        """Those that the first screen names."""
        return self.findings[:TOP]

    @property
    def patch(self) -> str:
        """The remedy as a part of a config file."""
        return patch_of(self.verdict.remedy)


def shown_findings(
    run: Run, assessment: RunAssessment, place: int, incidents: IncidentGroup | None, source: str
) -> list[ShownFinding]:
    """The findings of a run.

    Args:
        run: the run.
        assessment: of it.
        place: of the run in the page.
        incidents: of the run as the page shows them, None where it has none.
        source: where the record is, as a command names it; "" where that is not known.
    """
    shown = []
    for number, finding in enumerate(assessment.findings):
        steps = finding.steps
        article = None
        if incidents is not None and steps is not None:
            inside = [one for one in incidents.articles if steps[0] <= one.step <= steps[1]]
            article = next((one for one in inside if one.step == steps[0]), next(iter(inside), None))
        of_step = article is not None and (article.step == (steps or (-1,))[0] or finding.rule.startswith("incident"))
        command = article.command if article is not None and of_step else ""
        shown.append(
            ShownFinding(
                finding,
                draw_spark(run, finding),
                f"finding-{place}-{number}",
                article.anchor if article is not None else "",
                command or _replay_command(run, steps, source),
                number >= TOP and finding.severity != "error",
            )
        )
    return shown


def _replay_command(run: Run, steps: tuple[int, int] | None, source: str) -> str:
    """What re-executes the steps of a run that ``bifusion-diag train`` recorded; "" for other runs."""
    source = source or _out(run.header.command)
    if steps is None or not source or not run.header.preset or "model" not in run.settings:
        return ""
    end = min(steps[1] + 1, steps[0] + REPLAYED)
    return f"bifusion-diag replay {shlex.quote(source)} --steps {steps[0]}:{end} --probe grads"


def _out(command: str) -> str:
    """The record that a training command names; "" where it names none, or is no command that a person would type."""
    if len(command) > COMMAND:
        return ""
    try:
        words = shlex.split(command)
    except ValueError:  # a quote that is not closed
        return ""
    if "bifusion-diag" not in command or "--out" not in words[:-1]:
        return ""
    return words[words.index("--out") + 1]


def patch_of(remedy: Mapping[str, Any] | None) -> str:
    """Dotted settings as the YAML of a config file."""
    tree: dict[str, Any] = {}
    for key, value in (remedy or {}).items():
        *parents, last = key.split(".")
        at = tree
        for parent in parents:
            child = at.setdefault(parent, {})
            if not isinstance(child, dict):
                child = at[parent] = {}
            at = child
        at[last] = value
    return yaml.safe_dump(_plain(tree), allow_unicode=True, sort_keys=False).strip() if tree else ""


def _plain(value: Any) -> Any:
    """What YAML can write; anything else as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
