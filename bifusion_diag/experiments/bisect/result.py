"""What a bisection has found, as plain data: terminal, JSON and tests read the same."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from bifusion_diag.experiments.bisect.differences import Change, Space
from bifusion_diag.experiments.bisect.journal import Entry
from bifusion_diag.experiments.bisect.plan import Plan
from bifusion_diag.experiments.bisect.search import Outcome

Status = Literal["found", "baseline is bad", "candidate is not bad", "not told", "budget spent"]


@dataclass(frozen=True)
class Tried:
    """A set of differences and what it is."""

    changed: tuple[str, ...]
    outcome: Outcome
    why: str
    runs: int
    records: tuple[str, ...]

    @property
    def words(self) -> str:
        """The outcome with its evidence."""
        if not self.runs:
            return f"not valid ({self.why})"
        return f"{self.outcome} ({self.runs} run{'s' if self.runs > 1 else ''}: {self.why})"


@dataclass(frozen=True)
class Start:
    """Where the first bad step of a run begins, as the flight recorder has found it.

    Attributes:
        step: its number.
        module: where; None: in none, or unknown.
        terms: loss terms that it comes from.
        mechanism: its id.
        text: all of it in words.
    """

    step: int
    module: str | None
    terms: tuple[str, ...]
    mechanism: str
    text: str


@dataclass(frozen=True)
class Element:
    """One difference of a cause.

    Attributes:
        name: of the difference.
        changes: its settings.
        without: the cause without it.
        alone: it alone on the baseline; None: it is all of the cause.
    """

    name: str
    changes: tuple[Change, ...]
    without: Tried
    alone: Tried | None


@dataclass(frozen=True)
class Cause:
    """Differences that make the baseline unstable, none of which can be left out.

    Attributes:
        elements: the differences.
        together: all of them on the baseline, on every seed.
        bad_runs: of these runs.
        interaction: in a sentence.
        start: where the first bad step begins; None: the record does not tell.
    """

    elements: tuple[Element, ...]
    together: Tried
    bad_runs: int
    interaction: str
    start: Start | None


@dataclass(frozen=True)
class Cure:
    """Differences that make the candidate stable when they are set back.

    Attributes:
        changes: the settings.
        assignments: of the candidate, as --set takes them.
        tried: the candidate with them, on every seed.
        smallest: nothing smaller cures, if more of the differences never make a bad set stable.
    """

    changes: tuple[Change, ...]
    assignments: tuple[str, ...]
    tried: Tried
    smallest: bool


@dataclass(frozen=True)
class Result:
    """All of it.

    Attributes:
        status: how it ended.
        sentence: the answer.
        baseline: the baseline's verdict; None: not tried yet.
        candidate: likewise.
        causes: the first one of the whole candidate, further ones of what is left when that is set back.
        cure: None: none was found.
        rest: where the budget was spent, the smallest set that was bad so far.
        runs: all of them.
        seconds: that they took.
    """

    status: Status
    sentence: str
    baseline: Tried | None = None
    candidate: Tried | None = None
    causes: tuple[Cause, ...] = ()
    cure: Cure | None = None
    rest: tuple[str, ...] | None = None
    runs: tuple[Entry, ...] = ()
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """0: the culprits are known."""
        return 0 if self.status == "found" else 1


def assignment(key: str, value: Any) -> str:
    """``key=value`` as --set reads it, quoted for a shell."""
    text = value if isinstance(value, str) and yaml.safe_load(value) == value else json.dumps(value)
    return shlex.quote(f"{key}={text}")


def interaction_of(elements: Iterable[Element]) -> str:
    """How the differences of a cause act together, in a sentence."""
    found = list(elements)
    if len(found) == 1:
        return f"{found[0].name} alone makes it unstable."
    names = [element.name for element in found]
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    alone = [element.name for element in found if element.alone is None or element.alone.outcome != "stable"]
    needed = [element.name for element in found if element.without.outcome == "unresolved"]
    said = f"{listed} fail only together"
    if not alone and not needed:
        return f"{said}: each alone is stable, and so are the others without it."
    untold = list(dict.fromkeys([*alone, *needed]))
    return f"{said}; of {', '.join(untold)} alone or left out it could not be told, as such a run is not valid or ends."


def document(space: Space, head: dict[str, Any], plan: Plan | None, result: Result) -> dict[str, Any]:
    """All of it for bisect.json, strict JSON."""
    from bifusion_diag.diagnosis import to_plain

    return {
        "kind": "bifusion-diag bisect",
        "schema_version": "1.0",
        **head,
        "differences": [
            {"name": one.name, "changes": to_plain(one.changes), "needs": sorted(one.needs)}
            for one in space.differences
        ],
        "ignored": to_plain(space.ignored),
        "plan": to_plain(plan),
        "result": to_plain(result),
    }
