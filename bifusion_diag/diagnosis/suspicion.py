"""Settings that differ between two runs, ranked by how likely each is to be why one is less stable."""

from __future__ import annotations

from dataclasses import dataclass

from bifusion_diag.diagnosis.phrase import Phrase


@dataclass(frozen=True)
class Suspect:
    """One setting that differs.

    Attributes:
        key: dotted.
        baseline: its value there, as text.
        candidate: likewise.
        score: 0 to 1: how much speaks against it; only its order means something.
        reason: in a sentence.
    """

    key: str
    baseline: str
    candidate: str
    score: float
    reason: Phrase
