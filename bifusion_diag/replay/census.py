"""What is extreme in a step's forward: tiny norms that are divided by, large logits, means over nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Training

#: What is looked for, with what the value is.
SIGHTS: dict[str, str] = {
    "masked row": "softmax rows of which every entry is −∞",
    "empty mean": "means over no element",
    "tiny norm": "smallest norm that a vector was divided by",
    "batch norm rows": "fewest values a channel that BatchNorm took its statistics of, in train mode",
    "batch norm variance": "smallest variance of a channel of BatchNorm in train mode",
    "denominator": "smallest absolute value that was divided by",
    "log": "smallest argument of a logarithm",
    "sqrt": "smallest argument of a square root",
    "exp": "largest argument of an exponential",
    "logits": "largest absolute value that entered a softmax, a sigmoid or a cross-entropy",
    "power": "smallest base of a power with a negative or fractional exponent",
}


@dataclass(frozen=True)
class Sight:
    """The most extreme that was seen of one kind.

    Attributes:
        what: of :data:`SIGHTS`.
        value: the number.
        module: in whose forward; None: in none.
        source: "file.py:123: the line's text".
        detail: what else is worth saying, such as how many.
    """

    what: str
    value: float
    module: str | None
    source: str | None
    detail: str = ""

    @property
    def text(self) -> str:
        """Value and place in words."""
        place = " in ".join(filter(None, (f"{self.value:.4g}", self.module)))
        return "; ".join(filter(None, (place, self.detail, self.source)))


def take_census(training: Training, notes: StepNotes) -> dict[str, Sight]:
    """Run the step's forward and loss once and note the extremes, by their kind, the most suspicious first. Never
    raises what the step raises."""
    return {}


def evidence(census: dict[str, Sight]) -> dict[str, Any]:
    """As an incident's evidence holds it."""
    return {SIGHTS[what]: sight.text for what, sight in census.items()}
