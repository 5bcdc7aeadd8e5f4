"""What would have helped: a bad step and the steps after it, once more from the same state under each of some changes.

All trials are measured with one yardstick, which their changes cannot bend: the loss after the last step by the
original criterion with its original weights, on batches that no trial has seen.
"""

from __future__ import annotations

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bifusion_diag.diagnosis.spikes import FACTOR, MIN_PREVIOUS, SpikeDetector
from bifusion_diag.probes.loss_terms import LossTerms
from bifusion_diag.probes.norms import norms_of
from bifusion_diag.replay.notes import State
from bifusion_diag.replay.step import Training
from bifusion_diag.replay.trials.remedies import Action, Patch

STEPS = 10  # after the bad one
ALIKE = 1.01  # losses whose ratio is less are the same: then the smaller change wins
HELPS = 1.1  # a loss must be so many times smaller to be a help by itself: short trials differ by a few per cent anyway
AS_IT_WAS = "as it was"
NOTHING = Action()


@dataclass(frozen=True)
class Change:
    """What a trial changes.

    Attributes:
        name: as it is shown.
        remedies: ids of :mod:`bifusion_diag.replay.trials.remedies` that it is made of.
        patch: settings that are changed, by dotted key.
        action: what is changed around the update.
        gives_up: what is lost with it.
        code: how a user's loop says it.
        refused: why it is not tried.
    """

    name: str
    remedies: tuple[str, ...] = ()
    patch: Patch = field(default_factory=dict)
    action: Action = NOTHING
    gives_up: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    refused: str = ""

    @property
    def size(self) -> int:
        """How many things it changes."""
        around = sum(value != getattr(NOTHING, name) for name, value in vars(self.action).items())
        return max(len(self.patch), around)

    def __or__(self, other: Change) -> Change:
        """Both at once."""
        return Change(
            f"{self.name} + {other.name}",
            (*self.remedies, *other.remedies),
            {**self.patch, **other.patch},
            self.action | other.action,
            (*self.gives_up, *other.gives_up),
            (*self.code, *other.code),
            "; ".join(f"{part.name}: {part.refused}" for part in (self, other) if part.refused),
        )


class Course(ABC):
    """A training in the state that the bad step began with, and how its loop goes on. Steps are counted from the bad
    one, which is 0.

    Attributes:
        training: what runs.
    """

    training: Training

    @abstractmethod
    def batch(self, ahead: int) -> Any:
        """The batch of a step."""

    @abstractmethod
    def yardstick(self) -> tuple[float | None, dict[str, float]]:
        """The loss and its raw terms after the last step, see the module's docstring; None where it is not finite. It
        may change random numbers and buffers."""

    def enter(self, ahead: int) -> None:  # noqa: B027 - a loop need not do anything
        """Put stages, schedules and learning rates where they are in a step."""

    def run(self, ahead: int, batch: Any) -> LossTerms:
        """Forward and backward."""
        loss = self.training.loss(batch)
        self.training.backward(loss)
        return loss

    def before_update(self, ahead: int) -> None:  # noqa: B027
        """What the loop does between backward and update, such as clipping."""


@dataclass(frozen=True)
class TrialStep:
    """One step of a trial.

    Attributes:
        loss: what was differentiated; None: it raised.
        terms: raw loss terms.
        grad_norm: before any clipping, in float64: NaN or infinite where a gradient is.
        updated: the optimiser's step was done.
        spike: the norm is a spike.
        seconds: CPU time, of the batch's loading nothing.
    """

    loss: float | None
    terms: dict[str, float]
    grad_norm: float
    updated: bool
    spike: bool
    seconds: float

    @property
    def finite(self) -> bool:
        """Loss and gradients are."""
        return self.loss is not None and math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class Trial:
    """How it went under a change.

    Attributes:
        change: what was tried.
        steps: the bad step, then those after it; fewer where one raised.
        loss: by the yardstick, after the last step; None: not finite, or not reached.
        terms: of that loss, raw.
        bad_state: weights and buffers that are NaN or infinite at the end.
        cost: CPU time of a step, as a multiple of that of a step as it was.
        error: that a step raised.
        refused: why it was not tried.
        same: every step went as it had gone, bit for bit.
    """

    change: Change
    steps: tuple[TrialStep, ...] = ()
    loss: float | None = None
    terms: dict[str, float] = field(default_factory=dict)
    bad_state: tuple[str, ...] = ()
    cost: float | None = None
    error: str = ""
    refused: str = ""
    same: bool = False

    @property
    def nonfinite(self) -> int:
        """Steps whose loss or gradient is not finite, and one more where weights or buffers are not at the end."""
        return sum(not step.finite for step in self.steps) + bool(self.bad_state)

    @property
    def spikes(self) -> int:
        """Steps whose gradient norm is a spike."""
        return sum(step.spike for step in self.steps)

    @property
    def rank(self) -> tuple[float, ...]:
        """Smaller is better: no error, nothing that is not finite, no spike, a smaller loss."""
        return (
            bool(self.refused),
            bool(self.error),
            self.nonfinite,
            self.spikes,
            math.inf if self.loss is None else self.loss,
        )


def follow(course: Course, change: Change, steps: int = STEPS, previous: Sequence[float] = ()) -> Trial:
    """Run the bad step and so many steps after it.

    Args:
        course: in the state that the bad step began with. It is used up.
        change: the course has its settings already; its action is done here.
        steps: after the bad one.
        previous: gradient norms of the steps before the bad one, by which spikes are judged. With fewer than
            :data:`~bifusion_diag.diagnosis.spikes.MIN_PREVIOUS`, a spike is 8 × the median of the trial's other norms.
    """
    training, action = course.training, change.action
    done: list[TrialStep] = []
    error = ""
    if action.freeze_batchnorm:
        for module in training.model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    for ahead in range(steps + 1):
        try:
            course.enter(ahead)
            done.append(_step(course, action, ahead, course.batch(ahead)))
        except Exception as raised:
            error = f"step {ahead} after the incident: {type(raised).__name__}: {raised}"
            break
    marked = [replace(step, spike=spike) for step, spike in zip(done, _spikes(done, previous), strict=True)]
    bad_state = tuple(name for name, value in _state(training.model) if not _finite(value))
    loss: float | None = None
    terms: dict[str, float] = {}
    if not (error or bad_state):
        try:
            loss, terms = course.yardstick()
        except Exception as raised:
            error = f"the yardstick: {type(raised).__name__}: {raised}"
    return Trial(change, tuple(marked), loss, terms, bad_state, error=error)


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """The best first: nothing that is not finite, then no spike, then the loss after the last step; where that differs
    by less than 1 %, the smaller change."""
    result: list[Trial] = []
    group: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: trial.rank):
        best = group[0] if group else trial
        if trial.rank[:-1] != best.rank[:-1] or trial.rank[-1] > best.rank[-1] * ALIKE:
            result += sorted(group, key=lambda trial: trial.change.size)
            group = []
        group.append(trial)
    return result + sorted(group, key=lambda trial: trial.change.size)


def compared(trials: Sequence[Trial]) -> list[Trial]:
    """The same trials beside the first one, which is the step as it was: what they cost, and whether they differ."""
    base, plain = _seconds(trials[0]), _numbers(trials[0])
    return [
        replace(
            trial,
            cost=_seconds(trial) / base if base and trial.steps else None,
            same=place > 0 and bool(trial.steps) and _numbers(trial) == plain,
        )
        for place, trial in enumerate(trials)
    ]


def try_all(
    start: Callable[[Change], Course | str],
    changes: Sequence[Change],
    *,
    steps: int = STEPS,
    previous: Sequence[float] = (),
    combine: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Trial]:
    """Try every change, and the step as it was.

    Args:
        start: a course in the state that the bad step began with, under a change; or why it does not apply.
        changes: to try.
        steps: after the bad one.
        previous: gradient norms before it, see :func:`follow`.
        combine: try the best two together as well, where both are better than nothing.
        progress: told the name of each trial before it begins.

    Returns:
        As :func:`ranked`; those that were refused last.
    """

    def tried(change: Change) -> Trial:
        if change.refused:
            return Trial(change, refused=change.refused)
        progress(change.name)
        course = start(change)
        return Trial(change, refused=course) if isinstance(course, str) else follow(course, change, steps, previous)

    as_it_was = tried(Change(AS_IT_WAS))
    trials = [as_it_was, *map(tried, changes)]
    if combine:
        better = helpful(ranked(trials), as_it_was)
        pair = next(((one, two) for two in better[1:] for one in better[:1] if _differ(one, two)), None)
        if pair is not None:
            trials.append(tried(pair[0].change | pair[1].change))
    return ranked(compared(trials))


def helpful(trials: Sequence[Trial], as_it_was: Trial) -> list[Trial]:
    """Of ranked trials those that are better than nothing, the best first."""
    better = []
    for trial in trials:
        mine, plain = trial.rank, as_it_was.rank
        if mine[:-1] < plain[:-1] or (mine[:-1] == plain[:-1] and mine[-1] * HELPS < plain[-1]):
            better.append(trial)
    return better


def _step(course: Course, action: Action, ahead: int, batch: Any) -> TrialStep:
    training = course.training
    parameters = list(training.model.parameters())
    for parameter in parameters:
        parameter.grad = None
    buffers = State(training.model) if action.skip else None
    if ahead == 0:
        for optimizer in training.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * action.rate
    began = time.process_time()
    loss = course.run(ahead, batch)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = math.hypot(*map(float, norms_of(gradients)))
    assert loss.total is not None
    total = float(loss.total.detach())
    terms = {name: float(value.detach()) for name, value in loss.terms.items()}
    if buffers is not None and (ahead == 0 or not (math.isfinite(total) and math.isfinite(norm))):
        buffers.restore_buffers(training.model)
        return TrialStep(total, terms, norm, False, False, time.process_time() - began)
    if action.zero_bad:
        for gradient in gradients:
            torch.nan_to_num_(gradient, 0.0, 0.0, 0.0)
    if action.clip is not None and gradients:
        if action.exact:
            exact = math.hypot(*map(float, norms_of(gradients)))
            torch._foreach_mul_(gradients, min(1.0, action.clip / (exact + 1e-6)))
        else:
            nn.utils.clip_grad_norm_(parameters, action.clip)
    course.before_update(ahead)
    for optimizer in training.optimizers:
        optimizer.step()
    return TrialStep(total, terms, norm, True, False, time.process_time() - began)


def _spikes(steps: Sequence[TrialStep], previous: Sequence[float]) -> list[bool]:
    norms = [step.grad_norm for step in steps]
    if len(previous) >= MIN_PREVIOUS:
        detector = SpikeDetector(previous)
        return [detector.update(norm) for norm in norms]
    spikes = []
    for place, norm in enumerate(norms):
        others = [other for at, other in enumerate(norms) if at != place and math.isfinite(other) and other > 0]
        spikes.append(bool(others) and math.isfinite(norm) and norm > FACTOR * statistics.median(others))
    return spikes


def _seconds(trial: Trial) -> float:
    return statistics.median(step.seconds for step in trial.steps) if trial.steps else 0.0


def _numbers(trial: Trial) -> str:
    """All that was measured but the time, as text, in which NaN is NaN."""
    return repr([(step.loss, step.terms, step.grad_norm, step.updated) for step in trial.steps])


def _differ(one: Trial, other: Trial) -> bool:
    """Together they are more than each alone."""
    both = one.change | other.change
    return all((both.patch, both.action) != (trial.change.patch, trial.change.action) for trial in (one, other))


def _state(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(value.isfinite().all())
