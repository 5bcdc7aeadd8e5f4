"""A bisection in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bifusion_diag.experiments.bisect.differences import Space, why_harmless
from bifusion_diag.experiments.bisect.plan import Cost, Plan
from bifusion_diag.experiments.bisect.result import Cause, Result, Tried

_STYLE = {"bad": "bold red", "stable": "green", "unresolved": "yellow"}
_LONGEST = 60  # characters of a value


def print_plan(console: Console, space: Space, plan: Plan, oracle: str, steps: int, seeds: int) -> None:
    """What differs, what counts as bad, and what finding out will cost."""
    several = [one for one in space.differences if len(one.changes) > 1]
    settings = sum(len(one.changes) for one in space.differences)
    console.print(Text(f"{settings} settings differ, in {len(space.differences)} pieces that can change on their own."))
    for one in several:
        console.print(Text(f"  only valid together: {one.name}"))
    if space.ignored:
        names = ", ".join(f"{change.key} ({why_harmless(change.key)})" for change in space.ignored)
        console.print(Text(f"  not compared, as the baseline has them: {names}"))
    seeded = f"stable: on each of {seeds} seeds" if seeds > 1 else "one seed"
    console.print(Text(f"A run is bad with {oracle}. Runs of {steps} steps; {seeded}; a bad run ends at once."))
    table = _table("", "to blame", "runs", "time, at most")
    for title, cost in (("best", plan.best), ("typical", plan.typical), ("worst", plan.worst)):
        table.add_row(title, _blamed(cost), str(cost.runs), _minutes(cost.seconds))
    console.print(table)
    console.print(Text(f"Measured on both ends: {plan.step_seconds:.3g} s a step, {plan.run_seconds:.3g} s a run."))


def _blamed(cost: Cost) -> str:
    if cost.causes == 1:
        return "1"
    return f"{cost.causes} together"


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_result(console: Console, result: Result) -> None:
    """The answer and its evidence."""
    console.print()
    console.print(Text(result.sentence, style="bold"))
    for number, cause in enumerate(result.causes, start=1):
        _print_cause(console, cause, number if len(result.causes) > 1 else None)
    if result.rest is not None:
        console.print(Text(f"Smallest set that was bad so far: {', '.join(result.rest)}"))
    cure = result.cure
    if cure is not None:
        options = " ".join(f"--set {text}" for text in cure.assignments)
        least = "nothing smaller cures" if cure.smallest else "none of it can be left out"
        console.print(Text.assemble("Cure of the candidate: ", (options, "bold"), f" ({least})"))
        console.print(_line("with it", cure.tried))
    elif result.causes:
        console.print(Text("No cure was found among the differences: what is left could not be told."))
    console.print(Text(f"{len(result.runs)} runs, {_minutes(result.seconds)}.", style="dim"))


def _print_cause(console: Console, cause: Cause, number: int | None) -> None:
    if number is not None:
        console.print(Text(f"Cause {number}", style="bold"))
    table = _table("setting", "baseline", "candidate", "without it", *(["alone"] if len(cause.elements) > 1 else []))
    for element in cause.elements:
        for place, change in enumerate(element.changes):
            evidence = [element.without] if element.alone is None else [element.without, element.alone]
            cells = [_outcome(one) if not place else Text("") for one in evidence]
            table.add_row(Text(change.key), _value(change.baseline), _value(change.candidate), *cells)
    console.print(table)
    together = cause.together
    seeds = f"bad on {cause.bad_runs} of {together.runs} seed{'s' if together.runs > 1 else ''}"
    console.print(Text(f"On the baseline: {seeds}: {together.why}."))
    if cause.start is not None:
        console.print(Text(f"It starts at {cause.start.text}"))


def _outcome(tried: Tried) -> Text:
    runs = f" ({tried.runs} run{'s' if tried.runs != 1 else ''})" if tried.runs else " (not valid)"
    return Text.assemble((tried.outcome, _STYLE[tried.outcome]), runs)


def _line(title: str, tried: Tried) -> Text:
    return Text.assemble(f"  {title}: ", (tried.words, _STYLE[tried.outcome]))


def _value(value: Any) -> Text:
    text = "none" if value is None else str(value)
    return Text(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…")


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in titles:
        table.add_column(title)
    return table


def print_where(console: Console, folder: Path) -> None:
    """Where everything lies."""
    console.print(Text(f"data: {folder / 'bisect.json'}; records of all runs: {folder / 'runs'}"), soft_wrap=True)
