"""What a bisection will cost, before it starts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bifusion_diag.errors import UserError
from bifusion_diag.experiments.bisect.search import Outcome, search

_BUDGET = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(runs?|m|min|minutes?|h|hours?)\s*")
SIMULATED = 24  # places of a cause that are tried; of more differences, evenly spread


@dataclass(frozen=True)
class Cost:
    """Of one way that the search may go.

    Attributes:
        causes: so many settings are to blame.
        runs: how many runs that takes, the two ends included.
        seconds: at most, as if no bad run ended early.
    """

    causes: int
    runs: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The expected cost.

    Attributes:
        best: one setting is to blame, and lies where it is found soonest.
        typical: two settings, that fail together; the mean over where they lie.
        worst: every setting is needed.
        run_seconds: of a run of full length.
        step_seconds: of a step.
    """

    best: Cost
    typical: Cost
    worst: Cost
    run_seconds: float
    step_seconds: float


def make_plan(differences: int, *, seeds: int, steps: int, step_seconds: float, start_seconds: float) -> Plan:
    """Go through the search with known culprits, and count the runs.

    Args:
        differences: how many.
        seeds: runs that a set of settings needs to count as stable; a bad one needs one.
        steps: of a run.
        step_seconds: of a step.
        start_seconds: of building the model and the scenes.
    """
    run_seconds = start_seconds + steps * step_seconds

    def cost(causes: int, counted: Iterable[tuple[int, int]]) -> list[Cost]:
        runs = [seeds * stable + bad + (seeds - 1) + 1 for stable, bad in counted]  # the cause on every seed; its trace
        return [Cost(causes, n, n * run_seconds) for n in runs]

    spread = sorted({round(i * (differences - 1) / max(SIMULATED - 1, 1)) for i in range(SIMULATED)})
    one = cost(1, (_count(differences, [place]) for place in spread))
    pairs = [[a, b] for a in spread for b in spread if a < b][:: max(1, len(spread) // 4)] or [[0]]
    two = cost(min(2, differences), (_count(differences, pair) for pair in pairs))
    mean = round(sum(c.runs for c in two) / len(two))
    worst = cost(differences, [_count(differences, range(differences))])[0]
    typical = Cost(min(2, differences), mean, mean * run_seconds)
    return Plan(min(one, key=lambda c: c.runs), typical, worst, run_seconds, step_seconds)


def _count(differences: int, culprits: Sequence[int]) -> tuple[int, int]:
    """Different sets that the search asks for, with culprits that fail together: stable and bad ones."""
    known: dict[frozenset[str], Outcome] = {}
    guilty = frozenset(f"{place:06d}" for place in culprits)

    def test(chosen: frozenset[str]) -> Outcome:
        return known.setdefault(chosen, "bad" if guilty <= chosen else "stable")

    search([f"{place:06d}" for place in range(differences)], test, {})
    bad = sum(outcome == "bad" for outcome in known.values())
    return len(known) - bad, bad


@dataclass(frozen=True)
class Budget:
    """What a bisection may take: minutes or runs; None: no limit."""

    seconds: float | None = None
    runs: int | None = None

    def spent(self, seconds: float, runs: int) -> bool:
        """Whether it has taken all of it."""
        return (self.seconds is not None and seconds >= self.seconds) or (self.runs is not None and runs >= self.runs)


def read_budget(text: str | None) -> Budget:
    """From what the user writes: "30min", "2h", "40runs".

    Raises:
        UserError: it is none of these.
    """
    if text is None:
        return Budget()
    found = _BUDGET.fullmatch(text)
    if found is None or not float(found[1]):
        raise UserError(f"--budget {text!r} cannot be read. Write minutes or runs: '30min', '2h' or '40runs'.")
    if found[2].startswith("run"):
        return Budget(runs=int(float(found[1])))
    return Budget(seconds=float(found[1]) * (3600 if found[2].startswith("h") else 60))
