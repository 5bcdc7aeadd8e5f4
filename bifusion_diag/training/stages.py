"""Training stages of document 003 (section 7): which parts of the encoder learn, and when.

The documents count iterations (S0 3k, S1 20k, S2 10k of 33k); here a stage begins at the same share of the run, so that
a short run visits every stage. They speak of the encoder alone: pooling and decoder learn throughout. With CLIP left
frozen, which is the default, S2 trains the same parts as S1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from bifusion_diag.config import Settings


@dataclass(frozen=True)
class Stage:
    """A span of the run and what stays frozen in it."""

    name: str
    begin: float  # share of the run, 0 <= begin < 1
    frozen: tuple[str, ...]  # patterns of module names
    description: str


_FUSED_STAGES = (
    Stage(
        "S0", 0 / 33, ("encoder.backbone", "encoder.film", "encoder.geometry"), "2D and 3D heads, gate frozen at 0.5"
    ),
    Stage("S1", 3 / 33, (), "and FiLM and the whole 3D branch"),
    Stage("S2", 23 / 33, (), "fine-tuning"),
)
_WHOLE_RUN = (Stage("all", 0.0, (), "every part that is not frozen for good"),)


def stages_of(settings: Settings) -> tuple[Stage, ...]:
    """The stages a run goes through."""
    staged = settings.training.stages != "none" and settings.model.fusion != "none"
    return _FUSED_STAGES if staged else _WHOLE_RUN


def stage_at(stages: Sequence[Stage], step: int, total_steps: int) -> Stage:
    """The stage that holds at a step. Boundaries are whole steps, and every stage gets one where there are enough."""
    begins = [max(place, round(stage.begin * total_steps)) for place, stage in enumerate(stages)]
    return [stage for stage, begin in zip(stages, begins, strict=True) if step >= begin][-1]


class StageSwitch:
    """Freezes and unfreezes parameters as the stages ask; with a single stage there is nothing to do.

    Only what it froze itself is ever unfrozen: what the model freezes (CLIP for good, the gate for a while) is the
    model's own affair.
    """

    def __init__(self, model: nn.Module, stages: Sequence[Stage], total_steps: int) -> None:
        self._model = model
        self._stages = stages
        self._total_steps = total_steps
        self._current: Stage | None = None
        self._frozen: list[nn.Parameter] = []

    def enter(self, step: int) -> Stage | None:
        """Put the model into the stage of this step. Returns the stage where it begins at this very step, else None:
        a resumed run enters a stage that began earlier."""
        stage = stage_at(self._stages, step, self._total_steps)
        if stage is self._current or len(self._stages) == 1:
            return None
        begins = step == 0 or stage_at(self._stages, step - 1, self._total_steps) is not stage
        self._current = stage
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        patterns = [f"{name}.*" for name in stage.frozen]
        self._frozen = [
            parameter
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad and any(fnmatchcase(name, pattern) for pattern in patterns)
        ]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        return stage if begins else None
