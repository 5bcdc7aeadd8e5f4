"""How training goes on from the step of a capsule, under a change: that of our own runs, and that of users' code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bifusion_diag.config import Settings, settings_from_dict
from bifusion_diag.config.settings import DataSettings
from bifusion_diag.data import Batch, BatchLoader
from bifusion_diag.errors import UserError
from bifusion_diag.experiments.rebuild import Parts, parts_of, settings_of
from bifusion_diag.model.losses import Criterion
from bifusion_diag.model.segmenter import Segmenter
from bifusion_diag.probes.loss_terms import LossTerms
from bifusion_diag.replay.capsules.capsule import Capsule, restore_capsule
from bifusion_diag.replay.examine.batches import cut
from bifusion_diag.replay.notes import copy_batch
from bifusion_diag.replay.step import Training
from bifusion_diag.replay.trials.what_if import Change, Course
from bifusion_diag.training.evaluation import training_source
from bifusion_diag.training.optim import clip_gradient, learning_rate, set_learning_rate

JUDGED = 3  # batches of the yardstick, the first ones after the last step
_SEED = 0  # of what the yardstick draws
_OF_THE_STATE = ("training.seed", "training.threads", "training.device", "model.init_from")


class RunCourse(Course):
    """One of our own runs, from the step of a capsule on."""

    def __init__(self, run: OwnRun, settings: Settings, built: Parts) -> None:
        self.whole, self.settings = run, settings
        self.model, optimizer, self.stages, self.faults = built
        fresh = _attributes(self.model)
        capsule = replace(
            run.capsule
        )  # which has tensors of its own, as training changes those of an optimiser's state
        self.training, _ = restore_capsule(capsule, Training(self.model, self._loss, (optimizer,)))
        # The capsule's attributes of modules are those of its own settings: what the change makes of them counts.
        modules = dict(self.model.named_modules())
        for (module, name), value in fresh.items():
            if run.attributes.get((module, name)) != value:
                setattr(modules[module], name, value)
        if settings.optim.weight_decay != run.settings.optim.weight_decay:
            for group in self.training.optimizers[0].param_groups:
                group["weight_decay"] = settings.optim.weight_decay

    def _loss(self, batch: Batch) -> Any:
        return self.model(batch).loss

    def enter(self, ahead: int) -> None:
        """The stage, the schedules and the rates of the step, as the trainer has them."""
        step, total = self.whole.capsule.step + ahead, self.settings.training.steps
        self.model.set_progress(step, total)
        self.stages.enter(step)
        scale = self.settings.optim.clip_lr_scale if self.stages.stage.slow_clip else 1.0
        rate = learning_rate(self.settings.optim, step, total)
        set_learning_rate(self.training.optimizers[0], rate, clip_scale=scale)
        if ahead:  # the state that the capsule holds has those of its own step
            self.faults.before_step(step)

    def batch(self, ahead: int) -> Batch:
        """That which the run has in the step."""
        batch = self.whole.batch(self.settings, ahead).to(self.whole.device)
        return self.faults.batch(self.whole.capsule.step + ahead, batch) if ahead else batch

    def run(self, ahead: int, batch: Batch) -> LossTerms:
        """Forward and backward, with the faults that the run has on purpose."""
        step = self.whole.capsule.step + ahead
        with self.faults.context(step):
            loss = super().run(ahead, batch)
        self.faults.after_backward(step)
        return loss

    def before_update(self, ahead: int) -> None:
        """Clip as the trainer does."""
        clip_gradient(self.model.parameters(), self.settings.optim.clip_grad)
        self.faults.before_update(self.whole.capsule.step + ahead)

    def yardstick(self) -> tuple[float | None, dict[str, float]]:
        """The original criterion on what the changed model predicts."""
        return self.whole.judge(self.model)


class OwnRun:
    """The run that a capsule is of, to be continued under changed settings.

    Args:
        capsule: of ``bifusion-diag train``.
        steps: of a trial, after the bad one.

    Attributes:
        note: what the trials cannot do as the run does; "" = nothing.

    Raises:
        UserError: its settings do not fit this version.
    """

    def __init__(self, capsule: Capsule, steps: int) -> None:
        self.capsule, self.steps = capsule, steps
        self.settings = settings_of(capsule)
        model = parts_of(capsule, self.settings).model
        self.device = next(model.parameters()).device
        self.attributes = _attributes(model)
        self._layout = _layout(model)
        self.guilty = {sample.name for sample in capsule.incident.samples if sample.name is not None}
        self._own: Batch = capsule.batch()
        self._servers: dict[DataSettings, Callable[[int], Batch]] = {}  # of changed settings
        notes = []
        if (ranks := capsule.content.get("ranks", 1)) > 1:
            notes.append(f"of {ranks} processes, this one's batches and gradients alone")
        try:
            self._served = _server(self.settings, capsule)
            found = self._served(0).names
            if found != self._own.names:
                raise UserError(f"step {capsule.step} has the scenes {found} now, not {self._own.names}")
        except UserError as error:
            self._served = lambda ahead: self._own
            notes.append(f"the data of the run is not there ({error}): the capsule's batch is used in every step")
        if capsule.after_update:
            notes.append("the capsule holds the weights after the bad update: every trial begins with them")
        self.note = "; ".join(notes)
        self._criterion = self._original_criterion()

    def start(self, change: Change) -> Course | str:
        """A course under changed settings, or why they do not apply.

        Raises:
            UserError: a value that the setting cannot have.
        """
        if fixed := [key for key in change.patch if key in _OF_THE_STATE]:
            return f"{fixed[0]} has no part in a step that begins with the capsule's state"
        settings = patched(self.settings, change.patch)
        times = settings.training.batch_size / self.settings.training.batch_size
        if times != int(times):
            return f"the capsule's batch can be made a multiple of itself, and {times:.3g} is none"
        try:
            built = parts_of(self.capsule, settings)
            if different := _layout(built.model).items() ^ self._layout.items():
                return f"the weights do not fit: {min(name for name, _ in different)} is not the same"
            course = RunCourse(self, settings, built)
            course.batch(0)
        except UserError as error:
            return str(error)
        return course

    def batch(self, settings: Settings, ahead: int) -> Batch:
        """What the run serves in a step under these settings, on the CPU.

        Scenes that they exclude are taken out of the batch; where none is left, it is the batch that they give in this
        step. A larger batch is filled with batches of steps that no trial comes to.
        """
        times = settings.training.batch_size // self.settings.training.batch_size
        apart = self.steps + 1 + JUDGED
        excluded = set(settings.data.exclude) - set(self.settings.data.exclude)
        parts = [self._part(settings, ahead + apart * part, excluded) for part in range(times)]
        return parts[0] if times == 1 else joined(parts)

    def _part(self, settings: Settings, ahead: int, excluded: set[str]) -> Batch:
        data = settings.data.model_copy(update={"exclude": self.settings.data.exclude})
        if data != self.settings.data:
            batch = self._server_of(data)(ahead)
        else:
            batch = self._served(ahead) if ahead else self._own
        rest = without(batch, excluded)
        if rest is None:
            rest = self._server_of(settings.data)(ahead)
        return rest

    def _server_of(self, data: DataSettings) -> Callable[[int], Batch]:
        if data not in self._servers:
            self._servers[data] = _server(self.settings.model_copy(update={"data": data}), self.capsule)
        return self._servers[data]

    def judge(self, model: Segmenter) -> tuple[float | None, dict[str, float]]:
        """The loss by the original criterion, and its raw terms: means over batches that come after the trials."""
        totals: list[float] = []
        terms: dict[str, float] = {}
        torch.manual_seed(_SEED)  # the same queries for every trial
        with torch.no_grad():
            for batch in self._judged():
                loss = self._criterion(model.predictions(batch.to(self.device)), batch.to(self.device))
                totals.append(float(loss.total))
                for name, value in loss.terms.items():
                    terms[name] = terms.get(name, 0.0) + float(value) / JUDGED
        mean = sum(totals) / len(totals)
        return (mean if math.isfinite(mean) else None), terms

    def _judged(self) -> list[Batch]:
        """Batches after the trials' last step, without the scenes that the incident comes from."""
        batches = [self._served(self.steps + 1 + place) for place in range(JUDGED)]
        return [without(batch, self.guilty) or batch for batch in batches]

    def _original_criterion(self) -> Criterion:
        """With one exception: where the original takes the mean over an empty match, which is NaN for good weights too,
        the match counts as 0."""
        losses, decoder = self.settings.losses, self.settings.model.decoder
        instance = losses.instance.model_copy(update={"empty_match": "zero"})
        whole = losses.model_copy(update={"instance": instance})
        criterion = Criterion(whole, decoder, fused=self.settings.model.uses_clip)
        criterion.set_progress(self.capsule.step + self.steps, self.settings.training.steps)
        return criterion.to(self.device)


class UserCourse(Course):
    """A user's training, from the step of a capsule on; the learning rates stay as they are.

    Args:
        training: as the user's code builds it.
        capsule: of the step.
        steps: of the trial, after the bad one.
        batches: of a step by its number; None: the capsule's batch in every step.
        drop: samples that are left out of the capsule's batch.
        changes: what is done to the training before it begins; each may return another one.
    """

    def __init__(
        self,
        training: Training,
        capsule: Capsule,
        steps: int,
        batches: Callable[[int], Any] | None,
        drop: Sequence[int],
        changes: Sequence[Callable[[Training], Training | None]] = (),
    ) -> None:
        training, notes = restore_capsule(replace(capsule), training)  # a copy: as in RunCourse
        for change in changes:
            training = change(training) or training
        self.training = training
        self._whole = notes.batch()
        self._own = self._whole if not drop else leave_out(self._whole, drop)
        self._batches, self._capsule, self._steps = batches, capsule, steps

    def batch(self, ahead: int) -> Any:
        """That of the step, or the capsule's once more."""
        if ahead == 0 or self._batches is None:
            return copy_batch(self._own)
        return self._batches(self._capsule.step + ahead)

    def yardstick(self) -> tuple[float | None, dict[str, float]]:
        """The user's own loss: on the capsule's batch without the samples that the incident comes from or, where the
        user gives batches, on those after the last step."""
        if self._batches is None:
            guilty = [sample.index for sample in self._capsule.incident.samples]
            try:
                judged = [leave_out(self._whole, guilty) if guilty else copy_batch(self._whole)]
            except UserError:  # it holds nothing else
                judged = [copy_batch(self._whole)]
        else:
            judged = [self._batches(self._capsule.step + self._steps + 1 + place) for place in range(JUDGED)]
        torch.manual_seed(_SEED)
        totals: list[float] = []
        terms: dict[str, float] = {}
        for batch in judged:
            loss = self.training.loss(batch)
            assert loss.total is not None
            totals.append(float(loss.total.detach()))
            for name, value in loss.terms.items():
                terms[name] = terms.get(name, 0.0) + float(value.detach()) / len(judged)
        mean = sum(totals) / len(totals)
        return (mean if math.isfinite(mean) else None), terms


def patched(settings: Settings, patch: Mapping[str, Any]) -> Settings:
    """The settings with other values at dotted keys.

    Raises:
        ConfigError: unknown keys, or values that they cannot have.
    """
    values = settings.model_dump()
    for key, value in patch.items():
        *parents, leaf = key.split(".")
        node = values
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return settings_from_dict(values, ", ".join(f"{key}={value}" for key, value in patch.items()))


def without(batch: Batch, names: Iterable[str]) -> Batch | None:
    """The batch without the scenes of these names; None where none is left."""
    gone = set(names)
    kept = [index for index, name in enumerate(batch.names) if name not in gone]
    if len(kept) == len(batch.names):
        return batch
    return batch.select(kept) if kept else None


def leave_out(batch: Any, samples: Sequence[int]) -> Any:
    """Any batch without these samples.

    Raises:
        UserError: nothing tells its samples apart, or none is left.
    """
    parts = cut(batch)
    kept = [index for index in range(parts.size) if index not in samples]
    if not kept:
        raise UserError("no other sample is in the batch")
    return parts.pick(kept)


def joined(batches: Sequence[Batch]) -> Batch:
    """The scenes of all batches in one."""
    scenes = points = 0
    values: dict[str, list[Any]] = {field.name: [] for field in fields(Batch)}
    for batch in batches:
        for name, parts in values.items():
            value = getattr(batch, name)
            offset = {"scene_index": scenes, "superpoint": points}.get(name)
            parts.append(value if offset is None else value + offset)
        scenes, points = scenes + batch.batch_size, points + sum(batch.superpoint_counts)
    together: dict[str, Any] = {
        name: torch.cat(parts) if isinstance(parts[0], Tensor) else tuple(entry for part in parts for entry in part)
        for name, parts in values.items()
    }
    return Batch(**together)


def _server(settings: Settings, capsule: Capsule) -> Callable[[int], Batch]:
    """The batch of a step counted from the capsule's, each loaded once."""
    training = settings.training
    part = {"rank": int(capsule.content.get("rank", 0)), "ranks": int(capsule.content.get("ranks", 1))}
    source = training_source(settings)
    loader = BatchLoader(source, settings.data, batch_size=training.batch_size, seed=training.seed, **part)
    return cache(lambda ahead: loader.batch(capsule.step + ahead))


def _layout(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What decides whether weights and an optimiser's state fit."""
    parameters = {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
    return parameters | {name: (tuple(b.shape), b.dtype) for name, b in model.named_buffers()}


def _attributes(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Numbers, words and flags that modules hold."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, type(None))) and name != "training"
    }
