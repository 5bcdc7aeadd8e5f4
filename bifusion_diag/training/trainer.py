"""The training loop, and what it records."""

from __future__ import annotations

import shlex
import shutil
import time
import warnings
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor

from bifusion_diag.config import Settings, settings_from_dict
from bifusion_diag.data import BatchLoader
from bifusion_diag.diagnosis import measure_record, measures_to_dict
from bifusion_diag.diagnosis.validation import measured_against
from bifusion_diag.errors import UserError
from bifusion_diag.model.build import build_model
from bifusion_diag.model.checkpoints import load_weights
from bifusion_diag.probes import Monitor, probe_preset
from bifusion_diag.probes.base import Schedule
from bifusion_diag.probes.gate import GateProbe
from bifusion_diag.probes.losses import LossesProbe
from bifusion_diag.probes.ranks import agree, own_rank, world_size
from bifusion_diag.record import (
    RecordReader,
    Run,
    RunHeader,
    RunWriter,
    TensorBoardSink,
    check_output,
    collect_environment,
    incident_folder,
    load_run,
)
from bifusion_diag.record.schema import FINGERPRINT
from bifusion_diag.replay.recorder import BadStepError, FlightRecorder
from bifusion_diag.training.checkpoint import (
    Checkpoint,
    checkpoint_folder,
    latest_checkpoint,
    restore_checkpoint,
    save_checkpoint,
)
from bifusion_diag.training.determinism import choose_device, make_deterministic, not_deterministic, torch_environment
from bifusion_diag.training.distributed import Replica, explained, process_group, seed_rank
from bifusion_diag.training.evaluation import Evaluator, training_source, validation_source
from bifusion_diag.training.faults import Faults
from bifusion_diag.training.fingerprint import weights_digest
from bifusion_diag.training.optim import build_optimizer, clip_gradient, learning_rate, set_learning_rate
from bifusion_diag.training.progress import ProgressDisplay
from bifusion_diag.training.scene import SceneSnapshots
from bifusion_diag.training.signals import StopRequest, stop_on_signals
from bifusion_diag.training.stages import StageSwitch, stages_of

ALWAYS = ("losses",)  # no run without its losses
UNITS = {"train/step_seconds": "s", "train/data_seconds": "s", "eval/seconds": "s"}


def start_training(
    settings: Settings, out: Path, *, probes: Sequence[str] = (), command: Sequence[str] = (), console: Console
) -> Run:
    """Train a new run and record it. Under torchrun, every process of the run calls it with the same arguments.

    Args:
        settings: of the run.
        out: the run.json to write; the record, TensorBoard events and checkpoints lie beside it.
        probes: names of probes; ``losses`` is always on.
        command: the command line, for the record.
        console: where progress is shown.

    Returns:
        The record, status "completed" or "interrupted"; of a rank other than 0, its own part of it.

    Raises:
        UserError: bad input, before anything is trained or written; or another process of the run has ended.
    """
    with process_group(settings.training.device):
        return Trainer(settings, out, probes, command, console).run()


def resume_training(out: Path, *, console: Console) -> Run:
    """Go on with the interrupted run recorded at ``out``, from its latest checkpoint.

    Raises:
        UserError: there is no checkpoint, or it does not fit.
    """
    checkpoint = latest_checkpoint(checkpoint_folder(out))
    info = checkpoint.info
    settings = settings_from_dict(info["settings"], str(checkpoint.folder))
    # A run that was killed after its last checkpoint has no run.json yet: it is closed.
    if checkpoint.step >= settings.training.steps and out.is_file():
        done = f"all {settings.training.steps} steps of {out} are done"
        raise UserError(f"nothing to resume: {done}. Start a longer run with --steps.")
    with process_group(settings.training.device):
        if (ranks := info.get("ranks", 1)) != world_size():
            raise UserError(
                f"{out} was trained by {ranks} processes, this is a run of {world_size()}. Resume it with "
                f"torchrun --nproc-per-node {ranks} -m bifusion_diag train --resume --out {out}"
                if ranks > 1
                else f"{out} was trained by one process, not by {world_size()}: resume it without torchrun"
            )
        return Trainer(settings, out, info["probes"], info["command"], console, checkpoint).run()


@dataclass(frozen=True)
class Again:
    """A part of a recorded run that is trained once more, into a record of its own and without checkpoints.

    Attributes:
        end: steps done when it ends.
        watched_from: the step from which on probes measure; the losses are always measured.
        digests: after so many steps the weights are digested.
        origin: for the record's provenance.
    """

    end: int
    watched_from: int
    digests: Set[int]
    origin: dict[str, Any]


class Trainer:
    """One run from its settings to its record.

    A step, in order::

        the stage freezes what must not learn      event "stage" when it changes
        the model is evaluated                     every so many steps; it leaves no trace in the training
        the batch of this step is loaded           a pure function of seed and step
        with monitor.step(batch):                  the probes measure
            forward, loss, backward                of several processes, gradients are averaged
            the gradient is clipped                its norm before clipping is kept
            the optimiser steps                    the flight recorder judges before it, and takes a bad step apart:
                                                   events "non-finite", "spike" and others; all processes agree
        after the last step, the model is evaluated

    Of several processes (torchrun), each has a batch of its own and records what it sees of it. Rank 0 alone evaluates,
    shows progress and writes run.json, TensorBoard events and checkpoints.
    """

    def __init__(
        self,
        settings: Settings,
        out: Path,
        probes: Sequence[str],
        command: Sequence[str],
        console: Console,
        checkpoint: Checkpoint | None = None,
        again: Again | None = None,
    ) -> None:
        training = settings.training
        self.again = again
        self.end = training.steps if again is None else again.end  # steps done when the run is complete
        probes = list(dict.fromkeys([*ALWAYS, *probes]))
        labels = {"semantic": (0, settings.model.decoder.semantic_classes - 1)}
        instruments = probe_preset("bifusion", probes, labels=labels)
        if again is not None:
            for probe in instruments:
                if not isinstance(probe, LossesProbe):
                    probe.every = _not_before(again.watched_from, probe.every)
        self.settings = settings
        self.out = check_output(out)
        self.console = console if own_rank() == 0 else Console(quiet=True)
        self.device = choose_device(training.device)
        make_deterministic(training.seed, training.threads)
        source = training_source(settings)
        self.evaluator = Evaluator(settings, validation_source(settings)) if settings.evaluation.every else None
        part: dict[str, int] = {"rank": own_rank(), "ranks": world_size()}
        self.loader = BatchLoader(source, settings.data, batch_size=training.batch_size, seed=training.seed, **part)
        self.model = build_model(settings).to(self.device).train()
        initial = self._initial_weights(checkpoint)
        seed_rank(training.seed)
        self.replica = Replica(self.model)
        self.optimizer = build_optimizer(self.model, settings.optim)
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        self.frozen = frozenset(name for name, p in self.model.named_parameters() if id(p) not in held)  # for good
        self.faults = Faults(training.inject, self.model, self.optimizer, batch_size=training.batch_size)
        for late in (one for one in self.faults.injections if one.step >= training.steps):
            last = training.steps - 1
            raise UserError(f"--inject {late.fault.name}@{late.step}: the run has steps 0 to {last}; give one of them")
        self.stages = StageSwitch(self.model, stages_of(settings), training.steps)
        self.recorder = self._make_recorder()
        self.stop = StopRequest()
        self.first_step = 0
        self.begun = False  # the first step, when its state was saved
        if checkpoint is not None:
            restore_checkpoint(checkpoint, self.model, self.optimizer, self.frozen)
            self.first_step = checkpoint.step
            self.begun = checkpoint.info.get("begun", False)
            self.faults.before_step(self.first_step - (not self.begun), begun=True)  # what has been left out since
            if "recorder" in checkpoint.info:  # those of earlier versions hold none
                self.recorder.load_state_dict(checkpoint.info["recorder"])
        validation = {} if self.evaluator is None else {"validation": self.evaluator.provenance()}
        self.against = measured_against(validation.get("validation", {}))
        header = RunHeader(
            name=out.stem,
            command=shlex.join(["bifusion-diag", *command]),
            preset=settings.preset,
            settings=settings.model_dump(mode="json"),
            environment=collect_environment() | torch_environment(self.device),
            provenance={
                **self.model.provenance(),
                **({} if initial is None else {"initial_weights": initial}),
                "labels": source.describe()["labels"],
                "data": source.describe(),
                "scenes_per_epoch": self.loader.scenes_per_epoch,
                "flight_recorder": settings.incidents.policy,
                **({"injected_faults": self.faults.provenance()} if training.inject else {}),
                **validation,
                **({} if again is None else {"replay": again.origin}),
            },
            parameters={name: size._asdict() for name, size in self.model.part_sizes().items()},
            probes=probes,
            steps_planned=training.steps,
            units=UNITS,
        )
        self.info = {
            "settings": header.settings,
            "probes": probes,
            "command": list(command),
            "initial_weights": initial,
            "ranks": world_size(),
        }
        tensorboard = TensorBoardSink(out.with_name(f"{out.stem}.tensorboard")) if own_rank() == 0 else None
        resume_at = None if checkpoint is None or again is not None else checkpoint.step
        self.resumed = resume_at is not None
        if not self.resumed and own_rank() == 0:
            # Of an earlier run of this name; first, so that no kill leaves them beside the record of this run.
            shutil.rmtree(checkpoint_folder(out), ignore_errors=True)
            shutil.rmtree(incident_folder(out), ignore_errors=True)
        self.writer = RunWriter(out, header, resume_at=resume_at, tensorboard=tensorboard, **part)
        self.monitor = Monitor(self.model, self.optimizer, instruments, writer=self.writer, recorder=self.recorder)
        self.snapshots: SceneSnapshots | None = None
        if again is None and own_rank() == 0 and any(isinstance(probe, GateProbe) for probe in instruments):
            validation_scenes = None if self.evaluator is None else self.evaluator.source
            self.snapshots = SceneSnapshots(settings, self.model, self.device, self.writer, source, validation_scenes)

    def _make_recorder(self) -> FlightRecorder:
        incidents = self.settings.incidents
        return FlightRecorder(
            lambda batch: self.model(batch).loss,
            on_incident=incidents.policy,
            capsules=incidents.capsules,
            capsule_limit=incidents.capsule_limit,
            rules=incidents.rules,
            keep_every=incidents.keep_every,
            settings=self.settings.model_dump(mode="json"),
            rebuilt=self.frozen,
        )

    def _initial_weights(self, checkpoint: Checkpoint | None) -> dict[str, Any] | None:
        """Load `model.init_from` and say what that was. A resumed run has its own weights, and only remembers."""
        if checkpoint is not None:
            remembered: dict[str, Any] | None = checkpoint.info.get("initial_weights")
            return remembered
        if self.settings.model.init_from is None:
            return None
        report = load_weights(self.model, Path(self.settings.model.init_from))
        self.console.print(f"initial weights: {report.summary()}", markup=False, highlight=False, soft_wrap=True)
        return report.provenance()

    def run(self) -> Run:
        """Train until the last step or a signal, and close the record either way."""
        training = self.settings.training
        done = self.first_step
        bad: BadStepError | None = None
        with self.writer, explained(), stop_on_signals(shared=world_size() > 1) as self.stop:
            title = f"{self.settings.preset} ({self.settings.scale})"
            if not self.resumed:
                self._fingerprint(done)
                if caveat := not_deterministic(
                    self.model.provenance()["sparse_engine"], self.writer.header.environment
                ):
                    self.writer.event(None, "note", caveat)
            with ProgressDisplay(self.console, title, self.end, done) as display, self.monitor:
                while done < self.end and not self.stop.requested and bad is None:
                    self._enter(done, display)
                    measured = self._evaluated(done, display) if self._evaluates_before(done) else {}
                    if self.stop.requested:
                        break
                    if self.snapshots is not None:
                        self.snapshots.before(done)
                    try:
                        self._step(done, display)
                    except BadStepError as error:
                        bad = error
                        if not error.updated:
                            break
                    done += 1
                    if done == training.steps:
                        measured = self._evaluated(done, display)
                    for name, value in measured.items():
                        self.monitor.log(name, value)
                    self.monitor.end_step()
                    self._fingerprint(done)
                    if training.checkpoint_every and done % training.checkpoint_every == 0 and done < training.steps:
                        self._save(done)
            if self.snapshots is not None:
                self.snapshots.end(done)
            if self.stop.requested:
                last = done - 1 if done else None
                where = f" on {_name_of(self.stop.ranks)}" if self.stop.ranks else ""
                message = f"{self.stop.signal_name}{where} after {done} of {self.end} steps"
                self.writer.event(last, "signal", message)
            if bad is not None:
                self.writer.event(bad.incident.step, "stop", str(bad))
            if done > self.first_step or not done:  # else it is the checkpoint that the run was resumed from
                self._save(done, begun=bad is not None and not bad.updated)
            measures = measures_to_dict(measure_record(RecordReader(self.writer.folder)))
            self.writer.finish("interrupted" if done < self.end else "completed", measures=measures)
        if bad is not None and self.again is None:  # a replay has ended where the run did
            raise bad
        # A full disk leaves no run.json.
        return load_run(self.out if own_rank() == 0 and self.out.is_file() else self.writer.folder)

    def _enter(self, step: int, display: ProgressDisplay) -> None:
        """Put the model into the stage and the schedules of this step."""
        self.model.set_progress(step, self.settings.training.steps)
        stage = self.stages.enter(step)
        if stage is not None:
            self.recorder.announce(f"stage {stage.name}")
            self.writer.event(step, "stage", f"stage {stage.name}: {stage.description}", name=stage.name)
            display.note(f"step {step}: stage {stage.name} ({stage.description})")
        for message in self.faults.beginning(step):
            self.writer.event(step, "inject", message)
            display.note(f"step {step}: {message}")

    def _step(self, step: int, display: ProgressDisplay) -> None:
        began = time.perf_counter()
        batch = self.faults.batch(step, self.loader.batch(step)).to(self.device)
        loaded = time.perf_counter()
        rate = learning_rate(self.settings.optim, step, self.settings.training.steps)
        clip_scale = self.settings.optim.clip_lr_scale if self.stages.stage.slow_clip else 1.0
        rates = set_learning_rate(self.optimizer, rate, clip_scale=clip_scale)
        self.faults.before_step(step, begun=self.begun and step == self.first_step)
        known = len(self.recorder.incidents)
        try:
            with self.faults.context(step), self.monitor.step(batch, step=step):
                loss = self.replica.loss(batch)
                loss.total.backward()
                self.faults.after_backward(step)
                clipped = clip_gradient(self.model.parameters(), self.settings.optim.clip_grad)
                local_norm = self.replica.local_norm(clipped.norm)
                logs: dict[str, float | Tensor] = {
                    "train/grad_norm": clipped.norm,
                    "train/clip_coefficient": clipped.coefficient,
                    **({"train/local_grad_norm": local_norm} if world_size() > 1 else {}),
                    **rates,
                    "train/data_seconds": loaded - began,
                }
                for name, value in logs.items():
                    self.monitor.log(name, value)
                self.faults.before_update(step)
                self.optimizer.step()
        finally:
            for incident in self.recorder.incidents[known:]:
                display.incident(f"step {step}: {incident.message}")
        self.model.zero_grad(set_to_none=True)  # also of what a fault has taken out of the optimiser
        self.monitor.log("train/step_seconds", time.perf_counter() - began)
        verdict = agree([self.stop.received])
        self.stop.agree(verdict.flags[0], verdict.ranks[0])
        display.step(step + 1, *torch.stack([loss.total.detach(), clipped.norm]).tolist())

    def _evaluates_before(self, step: int) -> bool:
        """Whether the weights that a step begins with are evaluated, and recorded at that step.

        Not those of the last step: the evaluation after it is recorded there.
        """
        every, last = self.settings.evaluation.every, self.settings.training.steps - 1
        return every > 0 and step % every == 0 and step < last

    def _evaluated(self, done: int, display: ProgressDisplay) -> dict[str, float]:
        """The metrics of the weights after so many steps; none without an evaluator, or once a signal has come. Of
        several processes rank 0 evaluates, and the others wait for it."""
        if self.evaluator is None:
            return {}
        metrics: dict[str, float] = {}
        if own_rank() == 0:
            metrics = self.evaluator.evaluate(self.model, self.device, lambda: bool(self.stop.received))
        # What a signal has cut short is measured by the run that resumes: no rank goes on to the step.
        verdict = agree([self.stop.received])
        self.stop.agree(verdict.flags[0], verdict.ranks[0])
        if metrics:
            shown = {"mIoU": "eval/miou", "AP50": "eval/ap50"}
            numbers = [f"{word} {metrics[name]:.4f}" for word, name in shown.items() if name in metrics]
            words = f"{' · '.join(numbers)} {self.against}".rstrip() if numbers else "nothing is labelled"
            display.note(f"evaluated after {done} steps: {words}")
        return metrics

    def _weights(self) -> str:
        """A digest of what learns in some stage."""
        return weights_digest(p for group in self.optimizer.param_groups for p in group["params"])

    def _fingerprint(self, done: int) -> None:
        """Record a digest of the weights after so many steps where one is due, for a replay to be held to."""
        every = self.settings.training.fingerprint_every
        if done in self.again.digests if self.again is not None else every and done % every == 0:
            message = f"weights after {done} steps"
            self.writer.event(done - 1 if done else None, FINGERPRINT, message, done=done, weights=self._weights())

    def _save(self, done: int, *, begun: bool = False) -> None:
        """Write a checkpoint; ``begun``: from within the next step, into whose state its faults were put already."""
        if self.again is not None:
            return
        self.monitor.flush()
        info = {**self.info, "recorder": self.recorder.state_dict(), "weights": self._weights(), "begun": begun}
        try:
            keep = self.settings.training.keep_checkpoints
            folder = checkpoint_folder(self.out)
            save_checkpoint(folder, done, self.model, self.optimizer, info, keep=keep, frozen=self.frozen)
        except (OSError, SafetensorError) as error:  # a full disk ends no training
            message = f"no checkpoint after {done} steps: {error}"
            self.writer.event(done - 1 if done else None, "checkpoint", message)
            warnings.warn(f"{message}. The run goes on without it.", RuntimeWarning, stacklevel=2)


def _not_before(first: int, due: Schedule) -> Schedule:
    """Due at the same steps, but at none before the first."""
    return lambda step: step >= first and due(step)


def _name_of(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
