"""Sets of differences put to the test by training: every run once, on as many seeds as it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bifusion_diag.config import ConfigError, Settings
from bifusion_diag.experiments.bisect.differences import Space, digest
from bifusion_diag.experiments.bisect.journal import Entry, Journal
from bifusion_diag.experiments.bisect.oracle import Judged, Oracle, Row
from bifusion_diag.experiments.bisect.plan import Budget, Plan, make_plan
from bifusion_diag.experiments.bisect.search import Outcome
from bifusion_diag.experiments.bisect.trial import Trial, run_trial
from bifusion_diag.record import Run

RUNS = "runs"  # folder of their records
PROBE_STEPS = 4
TRACED_WITH = ("grads",)  # what the run that is taken apart measures besides


class BudgetSpentError(Exception):
    """The bisection may take no further run."""


@dataclass(frozen=True)
class Verdict:
    """What a set of differences is.

    Attributes:
        changed: the differences that are as the candidate has them.
        outcome: bad if any of the runs is, stable if all are.
        why: of the run that decides.
        runs: journal entries, one a seed that was run.
    """

    changed: frozenset[str]
    outcome: Outcome
    why: str
    runs: tuple[Entry, ...]


class Laboratory:
    """Trains mixtures of two settings and judges them.

    A set is bad if a run on any seed is, and then the other seeds are not run; it is stable if the runs on all seeds
    are. The seed on which the candidate was bad comes first.

    Args:
        space: of the mixtures.
        oracle: judges runs.
        steps: of a run.
        seeds: of the runs.
        probes: that measure, besides those that the oracle needs.
        folder: where records go.
        journal: of all runs.
        budget: for all runs, those of earlier sessions included.
        tell: is told of every run in a line.
    """

    def __init__(
        self,
        space: Space,
        oracle: Oracle,
        *,
        steps: int,
        seeds: Sequence[int],
        probes: Sequence[str],
        folder: Path,
        journal: Journal,
        budget: Budget,
        tell: Callable[[str], None],
    ) -> None:
        self.space = space
        self.seeds = tuple(seeds)
        self.folder = folder
        self._oracle = oracle
        self._steps = steps
        self._probes = tuple(dict.fromkeys([*oracle.probes, *probes]))
        self._journal = journal
        self._budget = budget
        self._tell = tell
        self._crash: str | None = None  # the error with which the candidate breaks off
        self._known = {self._key(e["run"], e["seed"], e["examined"]): e for e in journal.entries if "run" in e}

    @property
    def entries(self) -> list[Entry]:
        """All runs, in the order in which they were made."""
        return [entry for entry in self._journal.entries if "run" in entry]

    @property
    def seconds(self) -> float:
        """Of all runs together."""
        return float(sum(entry["seconds"] for entry in self.entries))

    def outcome(self, changed: frozenset[str]) -> Outcome:
        """Of a set of differences."""
        return self.judge(changed).outcome

    def judge(self, changed: frozenset[str], *, every_seed: bool = False) -> Verdict:
        """Put a set of differences to the test.

        Args:
            changed: names of differences.
            every_seed: also those that are not needed for the verdict.

        Raises:
            BudgetSpentError: it would take a run too many.
        """
        runs: list[Entry] = []
        for seed in self.seeds:
            try:
                settings = self.space.mixture(changed, steps=self._steps, seed=seed)
            except ConfigError as error:
                return Verdict(changed, "unresolved", str(error), ())
            runs.append(self._run(changed, settings, seed))
            if self._outcome_of(runs[-1]) == "bad" and not every_seed:
                break
        outcomes = [self._outcome_of(entry) for entry in runs]
        outcome = next((one for one in ("bad", "unresolved") if one in outcomes), "stable")
        return Verdict(changed, outcome, runs[outcomes.index(outcome)]["why"], tuple(runs))  # type: ignore[arg-type]

    def bad_runs(self, verdict: Verdict) -> list[Entry]:
        """Those of a verdict."""
        return [entry for entry in verdict.runs if self._outcome_of(entry) == "bad"]

    def fails_like(self, candidate: Verdict) -> Verdict:
        """From here on a run that breaks off with the candidate's error is bad; and the seed on which the candidate is
        bad comes first. Returns the candidate's verdict as it is then."""
        if candidate.outcome == "unresolved":
            self._crash = next((entry["crash"] for entry in candidate.runs if entry["crash"] is not None), None)
        bad = [entry["seed"] for entry in self.bad_runs(candidate)]
        self.seeds = tuple(sorted(self.seeds, key=lambda seed: seed not in bad))
        return self.judge(candidate.changed)

    def trace(self, verdict: Verdict) -> Entry | None:
        """The first bad run of a verdict once more, its bad steps taken apart; None where it was not bad then."""
        entry = self.bad_runs(verdict)[0]
        settings = self.space.mixture(verdict.changed, steps=self._steps, seed=entry["seed"])
        traced = self._run(verdict.changed, settings, entry["seed"], examine=True)
        return traced if self._outcome_of(traced) == "bad" else None

    def estimate(self) -> Plan:
        """Run the first steps of both ends, to tell what all will cost.

        Raises:
            UserError: one of them cannot start.
        """
        stored = next((entry["probe"] for entry in self._journal.entries if "probe" in entry), None)
        if stored is None:
            stored = self._probe()
            self._journal.append({"probe": stored})
        return make_plan(len(self.space.differences), seeds=len(self.seeds), steps=self._steps, **stored)

    def _probe(self) -> dict[str, float]:
        out = self.folder / RUNS / "probe.json"
        found: list[Trial] = []
        for changed in ((), self.space.names):
            settings = self.space.mixture(changed, steps=self._steps, seed=self.seeds[0])
            found.append(run_trial(settings, out, _FirstSteps(), probes=self._probes))
            out.unlink(missing_ok=True)
            if found[-1].refused is not None:
                raise found[-1].refused
        steps = [trial.step_seconds for trial in found if trial.step_seconds is not None]
        usual = max(steps, default=0.0)
        last = found[-1]  # the first one also loads and compiles
        start = last.seconds - last.steps * (last.step_seconds or 0.0)
        return {"step_seconds": usual, "start_seconds": max(start, 0.0)}

    def _run(self, changed: frozenset[str], settings: Settings, seed: int, *, examine: bool = False) -> Entry:
        examine = examine or self._oracle.examines
        name = digest(settings)[:16]
        key = self._key(name, seed, examine)
        if key in self._known:
            return self._known[key]
        if self._budget.spent(self.seconds, len(self.entries)):
            raise BudgetSpentError
        record = Path(RUNS) / f"{name}{'.traced' if examine else ''}.json"
        probes = (*self._probes, *TRACED_WITH) if examine else self._probes
        watch = self._oracle.watch(self._steps)
        trial = run_trial(settings, self.folder / record, watch, probes=probes, examine=examine)
        if trial.refused is not None and changed in (frozenset(), frozenset(self.space.names)):
            raise trial.refused  # an end that cannot run at all is bad input
        entry: dict[str, Any] = {
            "run": name,
            "changed": [one for one in self.space.names if one in changed],
            "seed": seed,
            "examined": examine,
            "outcome": trial.judged.outcome,
            "why": trial.judged.why,
            "steps": trial.steps,
            "seconds": round(trial.seconds, 3),
            "crash": trial.crash,
            "record": str(record) if (self.folder / record).is_file() else None,
        }
        self._journal.append(entry)
        self._known[key] = entry
        self._tell(self._line(entry))
        return entry

    def _line(self, entry: Entry) -> str:
        changed = entry["changed"]
        total = len(self.space.differences)
        what = {0: "the baseline", total: "the candidate"}.get(len(changed), f"{len(changed)} of {total} changed")
        if len(changed) == 1 and total > 1:
            what = f"only {changed[0]} changed"
        if total > 2 and len(changed) == total - 1:
            what = f"all but {next(name for name in self.space.names if name not in changed)} changed"
        taken = ", taken apart" if entry["examined"] and not self._oracle.examines else ""
        took = f"{entry['steps']} steps, {entry['seconds']:.1f} s"
        number = len(self.entries)
        return (
            f"run {number} · {what} · seed {entry['seed']}{taken}: {self._outcome_of(entry)} ({entry['why']}; {took})"
        )

    def _outcome_of(self, entry: Entry) -> Outcome:
        if self._crash is not None and entry["crash"] == self._crash:
            return "bad"
        outcome: Outcome = entry["outcome"]
        return outcome

    @staticmethod
    def _key(name: str, seed: int, examined: bool) -> tuple[str, int, bool]:
        return name, seed, examined


class _FirstSteps:
    """Ends a run after a few steps."""

    def step(self, step: int, row: Row) -> str | None:
        return "enough" if step + 1 >= PROBE_STEPS else None

    def end(self, run: Run) -> Judged:
        return Judged("unresolved", "enough")


def smallest_bad(entries: Iterable[Entry]) -> list[str] | None:
    """The smallest set that was bad so far; None: none was."""
    bad = [list(entry["changed"]) for entry in entries if entry["outcome"] == "bad"]
    return min(bad, key=len) if bad else None
