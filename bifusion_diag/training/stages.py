"""Training stages: which parts of the encoder learn, and when.

``heads_first`` is document 003, section 7. It counts iterations: S0 3k, S1 20k, S2 10k of 33k. S2 may release CLIP's
last blocks (`model.clip.tune`); with CLIP left frozen, which is the default, S2 trains the same parts as S1. 003 names
one learning rate, and S2 has it too.

``three_phase`` is document 000, phase 3: the 3D branch alone with CLIP frozen, CLIP released at a very low learning
rate, the whole network. Its lengths are 001's epochs: 0 to 20, 21 to 60, 61 to 128. "3D alone" is taken at its word:
of the encoder, P1 trains the U-Net and its head; what makes 2D features of CLIP's tokens, and what mixes 2D with 3D,
waits. P2 trains that at the full rate, as it begins with random weights, and CLIP at `optim.clip_lr_scale` of it. P3
has the full rate everywhere: 000 speaks of a low rate in phase 2 alone. With `model.clip.tune` "none", CLIP stays
frozen in P2 and P3 as well.

A stage begins at the same share of the run as in the documents, so that a short run visits every stage. The documents
speak of the encoder alone: pooling and decoder learn throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from bifusion_diag.config import Settings


@dataclass(frozen=True)
class Stage:
    """A span of the run, and what stays frozen in it."""

    name: str
    begin: float  # share of the run, 0 <= begin < 1
    frozen: tuple[str, ...]  # patterns of module names
    description: str
    slow_clip: bool = False  # what learns of CLIP does so at optim.clip_lr_scale of the learning rate


_CLIP = ("encoder.clip",)
_FROM_2D = ("encoder.spatial_head", "encoder.global_head")
_FUSION = ("encoder.film", "encoder.geometry", "encoder.gate")

_HEADS_FIRST = (
    Stage(
        "S0",
        0 / 33,
        (*_CLIP, "encoder.backbone", "encoder.film", "encoder.geometry"),
        "2D and 3D heads, gate frozen at 0.5",
    ),
    Stage("S1", 3 / 33, _CLIP, "and FiLM and the whole 3D branch"),
    Stage("S2", 23 / 33, (), "fine-tuning"),
)
_THREE_PHASE = (
    Stage("P1", 0 / 129, (*_CLIP, *_FROM_2D, *_FUSION), "3D branch alone"),
    Stage("P2", 21 / 129, (), "and the 2D heads and the fusion", slow_clip=True),
    Stage("P3", 61 / 129, (), "the whole network"),
)
_WHOLE_RUN = (Stage("all", 0.0, (), "every part that is not frozen for good"),)

_CLIP_LEARNS = {
    "S2": "and what is tuned of CLIP",
    "P2": "CLIP at a very low learning rate",
    "P3": "CLIP at the full learning rate",
}
_CLIP_FROZEN = {"S2": "CLIP stays frozen: as S1", "P2": "CLIP stays frozen", "P3": "CLIP stays frozen: as P2"}
_WITHOUT_CLIP = {"S0": "3D head", "S2": "fine-tuning: as S1", "P2": "and FiLM", "P3": "the whole network: as P2"}


def stages_of(settings: Settings) -> tuple[Stage, ...]:
    """The stages a run goes through. Their descriptions say what becomes of CLIP in this run, if it has a 2D branch."""
    kind = settings.training.stages
    if kind == "none" or settings.model.fusion == "none":
        return _WHOLE_RUN
    stages = _HEADS_FIRST if kind == "heads_first" else _THREE_PHASE
    if not settings.model.uses_clip:
        return tuple(replace(stage, description=_WITHOUT_CLIP.get(stage.name, stage.description)) for stage in stages)
    of_clip = _CLIP_FROZEN if settings.model.clip.tune == "none" else _CLIP_LEARNS
    return tuple(_with_note(stage, of_clip.get(stage.name)) for stage in stages)


def _with_note(stage: Stage, note: str | None) -> Stage:
    return stage if note is None else replace(stage, description=f"{stage.description}; {note}")


def stage_at(stages: Sequence[Stage], step: int, total_steps: int) -> Stage:
    """The stage that holds at a step. Boundaries are whole steps, and every stage gets one where there are enough."""
    begins = [max(place, round(stage.begin * total_steps)) for place, stage in enumerate(stages)]
    return [stage for stage, begin in zip(stages, begins, strict=True) if step >= begin][-1]


class StageSwitch:
    """Freezes and unfreezes parameters as the stages ask; with a single stage there is nothing to do.

    Only what it froze itself is ever unfrozen: what the model freezes (CLIP for good, the gate for a while) is the
    model's own affair.

    Attributes:
        stage: the one that was entered last.
    """

    def __init__(self, model: nn.Module, stages: Sequence[Stage], total_steps: int) -> None:
        self._model = model
        self._stages = stages
        self._total_steps = total_steps
        self.stage = stages[0]
        self._entered: Stage | None = None
        self._matching: list[nn.Parameter] = []  # what the stage's patterns name
        self._frozen: list[nn.Parameter] = []  # what of it would learn otherwise

    def enter(self, step: int) -> Stage | None:
        """Put the model into the stage of this step. Returns the stage where it begins at this very step, else None:
        a resumed run enters a stage that began earlier.

        Call it at every step, after the model was told its progress: what the model itself releases in the middle of a
        stage stays frozen until the stage ends.
        """
        if len(self._stages) == 1:
            return None
        self.stage = stage_at(self._stages, step, self._total_steps)
        changes = self.stage is not self._entered
        if changes:
            self._entered = self.stage
            for parameter in self._frozen:
                parameter.requires_grad_(True)
            self._frozen = []
            patterns = [f"{name}.*" for name in self.stage.frozen]
            named = self._model.named_parameters()
            self._matching = [p for name, p in named if any(fnmatchcase(name, pattern) for pattern in patterns)]
        for parameter in self._matching:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self._frozen.append(parameter)
        begins = step == 0 or stage_at(self._stages, step - 1, self._total_steps) is not self.stage
        return self.stage if changes and begins else None
