"""Which modules and which loss terms make up the difference of two runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bifusion_diag.diagnosis.quantity import Reading


@dataclass(frozen=True)
class Attribution:
    """What one module or loss term adds to the difference of two runs.

    Attributes:
        kind: what it is.
        name: of the module or the term.
        baseline: its number in the baseline, as `measure` says.
        candidate: and in the candidate.
        share: of the difference of all, 1 for all of it; None where it cannot be told.
        measure: what was measured, a key of :data:`~bifusion_diag.diagnosis.attribution.ATTRIBUTED`.
    """

    kind: Literal["module", "term"]
    name: str
    baseline: Reading
    candidate: Reading
    share: float | None
    measure: str = ""


#: What is attributed, in words.
ATTRIBUTED: dict[str, str] = {
    "squared_norm": "squared gradient norm, mean over the steps",
    "squared_norm_bad": "squared gradient norm, mean over the candidate's bad steps",
    "log_norm": "logarithm of the gradient norm, median over the steps",
    "loss": "weighted loss, mean over the steps",
    "gradient_share": "share of the gradient, median over the steps",
}
