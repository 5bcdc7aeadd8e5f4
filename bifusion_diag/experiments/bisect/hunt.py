"""From two settings to the culprits among their differences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bifusion_diag.diagnosis import Measures, assess_run, measure
from bifusion_diag.diagnosis.incidents import RecordedIncident, incidents_of
from bifusion_diag.experiments.bisect.laboratory import BudgetSpentError, Laboratory, Verdict, smallest_bad
from bifusion_diag.experiments.bisect.result import (
    Cause,
    Cure,
    Element,
    Result,
    Start,
    Status,
    Tried,
    assignment,
    interaction_of,
)
from bifusion_diag.experiments.bisect.search import Found, Items, search
from bifusion_diag.record import RecordError, load_run


def hunt(laboratory: Laboratory) -> Result:
    """Judge both ends, search, and bring the evidence.

    Raises:
        UserError: an end cannot start.
        KeyboardInterrupt: a signal came; all runs so far are in the journal.
    """
    space = laboratory.space
    everything = frozenset(space.names)
    baseline = candidate = None
    try:
        baseline = laboratory.judge(frozenset())
        if baseline.outcome != "stable":
            status: Status = "baseline is bad" if baseline.outcome == "bad" else "not told"
            said = "is itself bad" if baseline.outcome == "bad" else "cannot be judged"
            sentence = f"The baseline {said} ({baseline.why}): there is nothing stable to search from."
            return _ended(laboratory, status, sentence, baseline, None)
        candidate = laboratory.fails_like(laboratory.judge(everything))
        if candidate.outcome != "bad":
            status = "candidate is not bad" if candidate.outcome == "stable" else "not told"
            seeds = len(laboratory.seeds)
            told = f"is not bad on {seeds} seed{'s' if seeds > 1 else ''}" if candidate.outcome == "stable" else ""
            sentence = f"The candidate {told or 'cannot be judged'} ({candidate.why}): there is nothing to search for."
            return _ended(laboratory, status, f"{sentence} More --steps or --seeds may show it.", baseline, candidate)
        found = search(space.names, laboratory.outcome, space.needs)
        causes = tuple(_cause(laboratory, items) for items in found.causes)
        cure = _cure(laboratory, found)
    except BudgetSpentError:
        rest = smallest_bad(laboratory.entries)
        sentence = "The budget is spent before the search has ended."
        if rest is not None:
            sentence += f" {len(rest)} of {len(everything)} differences are under suspicion still."
        sentence += " The same command with a larger --budget goes on."
        return _ended(laboratory, "budget spent", sentence, baseline, candidate, rest)
    sentence = " ".join(cause.interaction for cause in causes)
    return Result(
        "found",
        sentence,
        _tried(laboratory, baseline),
        _tried(laboratory, candidate),
        causes,
        cure,
        None,
        tuple(laboratory.entries),
        laboratory.seconds,
    )


def _ended(
    laboratory: Laboratory,
    status: Status,
    sentence: str,
    baseline: Verdict | None,
    candidate: Verdict | None,
    rest: Iterable[str] | None = None,
) -> Result:
    return Result(
        status,
        sentence,
        None if baseline is None else _tried(laboratory, baseline),
        None if candidate is None else _tried(laboratory, candidate),
        rest=None if rest is None else tuple(rest),
        runs=tuple(laboratory.entries),
        seconds=laboratory.seconds,
    )


def _tried(laboratory: Laboratory, verdict: Verdict) -> Tried:
    changed = tuple(name for name in laboratory.space.names if name in verdict.changed)
    records = tuple(entry["record"] for entry in verdict.runs if entry["record"] is not None)
    return Tried(changed, verdict.outcome, verdict.why, len(verdict.runs), records)


def _cause(laboratory: Laboratory, items: Items) -> Cause:
    """The evidence on one cause."""
    whole = frozenset(items)
    elements = []
    for item in items:
        without = _tried(laboratory, laboratory.judge(whole - {item}))
        alone = _tried(laboratory, laboratory.judge(frozenset({item}))) if len(items) > 1 else None
        elements.append(Element(item, laboratory.space.named(item).changes, without, alone))
    together = laboratory.judge(whole, every_seed=True)
    bad = len(laboratory.bad_runs(together))
    start = _start(laboratory, together)
    return Cause(tuple(elements), _tried(laboratory, together), bad, interaction_of(elements), start)


def _start(laboratory: Laboratory, verdict: Verdict) -> Start | None:
    """Where the first bad step begins: by the incident, or else by the worst finding."""
    entry = laboratory.trace(verdict)
    if entry is None or entry["record"] is None:
        return None
    try:
        run = load_run(laboratory.folder / entry["record"])
    except RecordError:
        return None
    measures = measure(run) if len(run.steps) else Measures({})
    first = telling(incidents_of(run), measures.bad)
    if first is not None:
        text = f"step {first.step}: {first.heading}. {first.explanation or first.message}"
        return Start(first.step, first.module, first.terms, first.mechanism, text)
    if not len(run.steps):
        return None
    findings = [finding for finding in assess_run(run).findings if finding.severity != "note"]
    if not findings:
        return None
    worst = findings[0]
    step = worst.steps[0] if worst.steps else int(run.steps[-1])
    return Start(step, worst.module, () if worst.term is None else (worst.term,), worst.rule, str(worst.title))


def telling(incidents: Sequence[RecordedIncident], bad: Sequence[int]) -> RecordedIncident | None:
    """The incident that tells where a run became bad: the first one of a bad step, as a batch with odd values that does
    no harm is an incident too; else the first one; None: there is none."""
    of_bad = [incident for incident in incidents if incident.step in bad]
    return next(iter([*of_bad, *incidents]), None)


def _cure(laboratory: Laboratory, found: Found) -> Cure | None:
    if found.cure is None:
        return None
    space = laboratory.space
    verdict = laboratory.judge(frozenset(space.names).difference(found.cure), every_seed=True)
    changes = tuple(change for name in found.cure for change in space.named(name).changes)
    assignments = tuple(assignment(change.key, change.baseline) for change in changes)
    return Cure(changes, assignments, _tried(laboratory, verdict), found.smallest)
