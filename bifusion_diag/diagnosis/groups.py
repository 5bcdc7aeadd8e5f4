"""Two sides of one or more runs each, compared: what their means differ by, and what a test over the runs says."""

from __future__ import annotations

from dataclasses import dataclass

from bifusion_diag.diagnosis.attribution import Attribution
from bifusion_diag.diagnosis.compare import RunAssessment, RunComparison
from bifusion_diag.diagnosis.phrase import Phrase
from bifusion_diag.diagnosis.quantity import Reading
from bifusion_diag.diagnosis.suspicion import Suspect
from bifusion_diag.diagnosis.verdict import Verdict


@dataclass(frozen=True)
class Side:
    """Runs that differ in their seed alone, or that the user put together.

    Attributes:
        name: of the side.
        runs: assessed over the steps that all runs of both sides have; at least one.
        seeds: of the runs, "—" where a run states none.
        why: why these runs were put together.
    """

    name: str
    runs: tuple[RunAssessment, ...]
    seeds: tuple[str, ...]
    why: Phrase


@dataclass(frozen=True)
class Interval:
    """Where a difference lies.

    Attributes:
        low: lower end.
        high: upper end.
        level: of confidence, such as 0.95.
        how: how it was found.
    """

    low: float
    high: float
    level: float
    how: Phrase


@dataclass(frozen=True)
class Tested:
    """One measure of both sides.

    Attributes:
        measure: its key.
        title: in words.
        baseline: mean over the runs of the side that have it.
        candidate: likewise.
        difference: candidate − baseline.
        interval: of the difference; None where there are too few runs.
        p: of the permutation test over runs, two-sided; None where too few runs were there for any.
        statement: what was tested, with how many runs.
        p_adjusted: `p` after Holm's correction for all measures that were tested.
    """

    measure: str
    title: str
    baseline: Reading
    candidate: Reading
    difference: Reading
    interval: Interval | None
    p: float | None
    statement: Phrase
    p_adjusted: float | None = None


@dataclass(frozen=True)
class GroupComparison:
    """A candidate side against the baseline side.

    Attributes:
        baseline: side.
        candidate: side.
        verdict: on the candidate side against the baseline side.
        pairs: one comparison a run of the candidate side, each with a run of the baseline side.
        tested: the measures, in the order of the definitions.
        attribution: modules and terms, the largest share first; of several runs a side, of the means.
        suspects: settings that differ between the sides, the most suspect first.
        statement: what was tested and what was not, exactly.
    """

    baseline: Side
    candidate: Side
    verdict: Verdict
    pairs: tuple[RunComparison, ...]
    tested: tuple[Tested, ...]
    attribution: tuple[Attribution, ...]
    suspects: tuple[Suspect, ...]
    statement: Phrase
