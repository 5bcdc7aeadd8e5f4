"""Which samples of a batch a bad step comes from: each is run alone, and the step without the suspects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bifusion_diag.replay.incident import SampleShare
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Training

Split = Callable[[Any], Sequence[Any]]  # batch → one batch a sample, such as the step function takes
Names = Callable[[Any], Sequence[str]]  # batch → what each sample is called


@dataclass(frozen=True)
class SampleFinding:
    """What running the samples apart has shown.

    Attributes:
        shares: the guilty ones, the strongest first; empty: all alike, or it could not be told.
        rows: one a sample, JSON: "sample", "name", "notes", "loss", "terms", "gradient" (norm), "input_absmax",
            "input_bad", "error".
        reason: why none is guilty, in words; "" where one is.
        passes: how often the step, or a part of it, was run.
    """

    shares: tuple[SampleShare, ...] = ()
    rows: tuple[dict[str, Any], ...] = field(default=())
    reason: str = ""
    passes: int = 0


def sample_shares(
    training: Training,
    notes: StepNotes,
    kind: str,
    *,
    contrast: StepNotes | None = None,
    split: Split | None = None,
    names: Names | None = None,
    terms: Sequence[str] = (),
) -> SampleFinding:
    """Find the samples that a bad step comes from. Never raises what the step raises.

    Args:
        training: what runs, with the weights as they are now.
        notes: of the bad step.
        kind: of the incident.
        contrast: notes of the last healthy step: its batch shows what samples are like at these weights.
        split: None: see :func:`bifusion_diag.replay.batches.cut`.
        names: None: found in the batch.
        terms: that are guilty, as far as it is known.
    """
    return SampleFinding(reason="not looked at yet")
