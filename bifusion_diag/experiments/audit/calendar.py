"""The run as it will go: at which steps the stage, the gate or the weights of the losses change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bifusion_diag.config import Settings
from bifusion_diag.model.losses.schedule import group_weights
from bifusion_diag.training.optim import learning_rate
from bifusion_diag.training.stages import Stage, stage_at, stages_of


@dataclass(frozen=True)
class Phase:
    """Steps in which nothing changes but the learning rate.

    Attributes:
        begin: first step.
        end: the step after the last one.
        stage: which parts learn.
        gate_held: α is the constant ½.
        weights: of the groups of losses.
        rates: learning rate in the first and in the last step.
    """

    begin: int
    end: int
    stage: Stage
    gate_held: bool
    weights: Mapping[str, float]
    rates: tuple[float, float]


def phases_of(settings: Settings, gate_is_early: Callable[[int], bool] = lambda step: False) -> tuple[Phase, ...]:
    """The phases of a run, in their order.

    Args:
        settings: of the run.
        gate_is_early: whether the gate is held at a step.
    """
    steps = settings.training.steps
    stages = stages_of(settings)

    def state(step: int) -> tuple[Stage, bool, tuple[tuple[str, float], ...]]:
        weights = group_weights(settings.losses, step, steps)
        return stage_at(stages, step, steps), gate_is_early(step), tuple(weights.items())

    begins = [0, *_changes(state, 0, steps - 1)]
    found = []
    for begin, end in zip(begins, [*begins[1:], steps], strict=True):
        stage, held, weights = state(begin)
        rates = tuple(learning_rate(settings.optim, step, steps) for step in (begin, end - 1))
        found.append(Phase(begin, end, stage, held, dict(weights), (rates[0], rates[1])))
    return tuple(found)


def _changes(state: Callable[[int], object], first: int, last: int) -> list[int]:
    """The steps in (first, last] at which the state is another one than before. No state comes back once it has gone,
    so that a stretch with the same state at both ends has no change."""
    if first >= last or state(first) == state(last):
        return []
    if last == first + 1:
        return [last]
    middle = (first + last) // 2
    return [*_changes(state, first, middle), *_changes(state, middle, last)]
