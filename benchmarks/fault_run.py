"""Runs one case of the benchmark of faults under the flight recorder, and says what it made of it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.fault_cases import CASES, Case, Job
from bifusion_diag.config import Settings, load_settings
from bifusion_diag.probes import Monitor
from bifusion_diag.record import load_run
from bifusion_diag.replay.incident import Incident
from bifusion_diag.replay.recorder import FlightRecorder
from bifusion_diag.training.checkpoint import checkpoint_folder, latest_checkpoint
from bifusion_diag.training.faults import Fault
from bifusion_diag.training.trainer import Trainer

WITHIN = 10  # steps within which a silent fault is to be found


@dataclass(frozen=True)
class Truth:
    """What is to be found of a case.

    Attributes:
        name: of the case, "workload/fault".
        place: in which part of training; "healthy": nothing is to be found.
        kinds: an incident of one of these is right.
        at: step of the fault.
        silent: nothing becomes NaN or infinite.
        modules: one of these, or a module inside it, is to blame; empty: not judged.
        term: to blame; None: not judged.
        samples: one of these is to blame; empty: none is.
        rank: to blame; None: a single process.
    """

    name: str
    place: str
    kinds: tuple[str, ...]
    at: int
    silent: bool
    modules: tuple[str, ...] = ()
    term: str | None = None
    samples: tuple[int, ...] = ()
    rank: int | None = None


@dataclass
class Outcome:
    """What was found of a case; None: not judged."""

    truth: Truth
    step: int | None = None  # of the first incident from the fault on
    kind: str = ""
    message: str = ""
    detected: bool | None = None  # in time
    kind_right: bool | None = None
    module: str | None = None
    module_right: bool | None = None
    terms: tuple[str, ...] = ()
    term_right: bool | None = None
    samples: tuple[int, ...] = ()
    sample_right: bool | None = None  # of a case in which no sample is to blame: none was named
    mechanism: str = ""
    reproduced: bool | None = None  # in place
    difference: str = ""
    capsule: str | None = None
    record: str | None = None  # of the run
    note: str = ""  # why there is no capsule
    replayed: bool | None = None  # in a new process
    ratio: float | None = None  # diagnosis in step times
    false_alarms: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    seconds: float = 0.0


def judge(truth: Truth, incidents: Sequence[Incident], step_seconds: float) -> Outcome:
    """Compare the incidents of a run with the truth."""
    outcome = Outcome(truth)
    healthy = truth.place == "healthy"
    early = [i for i in incidents if healthy or i.step < truth.at]
    outcome.false_alarms = [f"step {i.step}: {i.message}" for i in early]
    if healthy:
        return outcome
    found = next((incident for incident in incidents if incident.step >= truth.at), None)
    if found is None:
        outcome.detected = False
        return outcome
    outcome.step, outcome.kind, outcome.message = found.step, found.kind, found.message
    outcome.detected = found.step - truth.at <= (WITHIN if truth.silent else 0)
    outcome.kind_right = any(trigger.kind in truth.kinds for trigger in found.triggers)
    cause = found.cause
    outcome.module = None if cause is None else cause.module
    if truth.modules:
        blamed = outcome.module or ""
        outcome.module_right = outcome.module is not None and any(
            blamed == name or (name and blamed.startswith(f"{name}.")) for name in truth.modules
        )
    outcome.terms = found.terms
    if truth.term is not None:
        outcome.term_right = found.terms[:1] == (truth.term,)
    outcome.samples = tuple(sample.index for sample in found.samples)
    if truth.samples:
        outcome.sample_right = bool(outcome.samples) and outcome.samples[0] in truth.samples
    elif truth.rank is None:
        outcome.sample_right = not outcome.samples
    if truth.rank is not None:
        outcome.module_right = found.rank == truth.rank
    outcome.mechanism = found.mechanism
    outcome.reproduced, outcome.difference = found.reproduction.identical, found.reproduction.difference
    outcome.capsule, outcome.note = found.capsule, found.capsule_note
    if found.seconds and step_seconds:
        outcome.ratio = found.seconds / step_seconds
    return outcome


# --- users' models ----------------------------------------------------------------------------------------------------


def truth_of(case: Case) -> Truth:
    """What is to be found of a case on a user's model."""
    return Truth(case.name, case.place, case.kinds, case.at, case.silent, case.modules, case.term, case.samples)


def run_case(case: Case, folder: Path) -> Outcome:
    """Train a user's model with a fault in it until it is found, or to the end."""
    began = time.perf_counter()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    job = Job(case)
    scaler = None if case.scaler is None else torch.amp.GradScaler("cpu", init_scale=case.scaler)
    recorder = job.recorder = FlightRecorder(_step(job), settings={"case": case.name}, capsules=3)
    seconds: list[float] = []
    out = folder / case.name.replace("/", "-")
    with (
        warnings.catch_warnings(record=True) as warned,
        Monitor(job.model, job.optimizer, [], out=out, scaler=scaler, recorder=recorder) as monitor,
    ):
        warnings.simplefilter("always")
        for step in range(case.steps):
            job.model.iteration = step
            case.before(job)
            batch = _batch(job, step)
            start = time.perf_counter()
            try:
                _train(job, monitor, batch, scaler)
            except (IndexError, RuntimeError):  # a fault that stops a user's loop
                if "exception" not in case.kinds:
                    raise
                break
            seconds.append(time.perf_counter() - start)
            job.optimizer.zero_grad()
            case.after(job)
            if case.place != "healthy" and any(i.step >= case.at for i in recorder.incidents):
                break
    outcome = judge(truth_of(case), recorder.incidents, statistics.median(seconds))
    outcome.warned = [str(w.message) for w in warned if not _is_incident(str(w.message))]
    outcome.record = str(out)
    outcome.seconds = time.perf_counter() - began
    return outcome


def _batch(job: Job, step: int) -> Any:
    micro = job.case.micro
    found = [job.case.edit(job, job.batch(step * micro + place)) for place in range(micro)]
    return found if micro > 1 else found[0]


def _step(job: Job) -> Any:
    """The step as a function, as the loop runs it."""
    case = job.case
    if case.micro > 1:
        return lambda batches: sum(_total(job.loss(batch)) / case.micro for batch in batches)
    if case.scaler is not None:

        def with_autocast(batch: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return job.loss(batch)

        return with_autocast
    return lambda batch: job.loss(batch)


def _total(loss: Any) -> Tensor:
    if isinstance(loss, tuple):
        return loss[0]
    total: Tensor = loss.total if hasattr(loss, "total") else sum(loss.values())
    return total


def _train(job: Job, monitor: Monitor, batch: Any, scaler: torch.amp.GradScaler | None) -> None:
    """One step of a user's loop."""
    case, parameters = job.case, list(job.model.parameters())
    with monitor.step(batch):
        for part in batch if case.micro > 1 else [batch]:
            with torch.autocast("cpu", torch.bfloat16, enabled=scaler is not None):
                loss = job.loss(part)
            total = _total(loss) / case.micro
            if job.task.told:
                monitor.losses(loss[1], total=total)
            (total if scaler is None else scaler.scale(total)).backward()
        case.after_backward(job)
        if scaler is not None:
            scaler.unscale_(job.optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, job.task.clip)
        case.before_update(job)
        if scaler is None:
            job.optimizer.step()
        else:
            scaler.step(job.optimizer)
            scaler.update()


def _is_incident(message: str) -> bool:
    return message.startswith("step ") and "probe" not in message


def build(settings: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The entry for ``bifusion-diag replay CAPSULE --entry benchmarks.fault_run:build``."""
    job = Job(CASES[settings["case"]])
    return job.model, _step(job), job.optimizer


# --- bifusion ---------------------------------------------------------------------------------------------------------

PREFIX, AT, END = 24, 26, 37  # steps that all cases share, the fault's step, where a case ends
STEPS = 120  # that the schedules are of: the stage S1 begins at step 11, the losses' weights change at step 36
RANKS_STEPS = 44  # of a run of two processes: its stages and weights change at steps 13 and 31
CONTROL_STEPS = 48  # of a whole run through all stages
SAMPLE = 2

#: Where faults strike that have a choice, so that not all strike at one place.
PLACES = {
    "nan-output": "encoder.film",
    "inf-output": "decoder.query_norm",
    "scale-output": "decoder.superpoint_mask",
    "log-zero": "encoder.backbone.block6",
    "exp-overflow": "encoder.spatial_head",
    "masked-softmax": "decoder.layers.0.self_attention",
    "zero-output": "encoder.head3d",
    "sqrt-zero": "pool.position",
    "nan-gradient": "decoder.layers.2",
    "scale-gradient": "encoder.backbone.block5",
    "zero-gradient": "encoder.head3d",
    "detach": "encoder.head3d",
    "nan-term": "instance_mask",
    "scale-term": "clip_align",
    "flip-term": "semantic",
    "zero-lr": "encoder.gate",
    "nan-moment": "decoder.heads",
    "zero-second-moment": "encoder.film",
    "not-in-optimizer": "encoder.spatial_head",
    "frozen": "pool",
    "scale-weights": "encoder.backbone.block2",
    "nan-weight": "decoder.key_projection",
    "nan-grad-element": "encoder.geometry",
    "inf-grad-element": "decoder.semantic_head",
    "huge-gradient": "encoder.head3d",
    "lost-gradient": "decoder.layers.1",
}
#: What else is right: modules that learn only through the faulty place.
BEFORE = {"encoder.head3d": ("encoder.backbone",)}


def settings_of(preset: str = "bifusion", inject: Sequence[str] = (), steps: int = STEPS) -> Settings:
    """A run small enough to repeat for every fault."""
    values = {
        "training.steps": steps,
        "training.batch_size": 4,
        "training.threads": 1,
        "training.device": "cpu",
        "data.scenes": 8,
        "data.max_points": 600,
        "data.image_height": 60,
        "data.image_width": 80,
        "training.inject": list(inject),
    }
    return load_settings(preset, scale="small", values=values)


def bifusion_truth(fault: Fault) -> Truth:
    """What is to be found of a fault in our own model."""
    where = PLACES.get(fault.name, fault.default)
    # clipping spreads one NaN over all gradients: whose was the first cannot be seen when the optimiser steps
    judged = fault.where == "module" and fault.name != "nan-grad-element"
    modules = (where, *BEFORE.get(where, ())) if judged else ()
    term = where if fault.where == "term" else ("clip_align" if fault.point == "criterion" else None)
    samples: tuple[int, ...] = (SAMPLE,) if fault.where == "sample" else ()
    if fault.name == "swapped-images":
        samples = (SAMPLE, SAMPLE + 1)
    rank = 1 if fault.where == "rank" else None
    return Truth(
        f"bifusion/{fault.name}", fault.place, fault.kinds, AT, fault.silent, modules, term, samples, rank
    )  # fmt: skip


def spec_of(fault: Fault, at: int = AT) -> str:
    """``NAME@STEP:WHERE`` of a case."""
    where = str(SAMPLE) if fault.where == "sample" else PLACES.get(fault.name, fault.default)
    return f"{fault.name}@{at}" + (f":{where}" if where else "")


class Cut(Trainer):
    """A run that ends soon after its fault was found."""

    last = END
    until_found = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.step_seconds: list[float] = []

    def _step(self, step: int, display: Any) -> None:
        began = time.perf_counter()
        super()._step(step, display)
        self.step_seconds.append(time.perf_counter() - began)
        found = self.until_found and any(incident.step >= AT for incident in self.recorder.incidents)
        if step + 1 >= self.last or found:
            self.stop.received = 15  # as a signal would


class Prefix(Cut):
    """The steps that all cases have in common."""

    last = PREFIX


class Whole(Cut):
    """A whole run."""

    last = CONTROL_STEPS
    until_found = False


def _trained(kind: type[Cut], settings: Settings, out: Path, checkpoint: Any = None) -> tuple[Cut, list[str]]:
    quiet = Console(file=io.StringIO())
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer = kind(settings, out, [], [], quiet, checkpoint)
        trainer.run()
    return trainer, [str(w.message) for w in warned]


def make_prefix(folder: Path) -> Path:
    """Train what all cases begin with; returns the run's path."""
    out = folder / "prefix" / "run.json"
    _trained(Prefix, settings_of(), out)
    return out


def run_bifusion(fault: Fault, prefix: Path, folder: Path) -> Outcome:
    """Go on from the prefix with a fault, by `bifusion-diag train`'s own trainer."""
    began = time.perf_counter()
    home = folder / f"bifusion-{fault.name}"
    shutil.copytree(prefix.parent, home)
    out = home / prefix.name
    checkpoint = latest_checkpoint(checkpoint_folder(out))
    trainer, warned = _trained(Cut, settings_of(inject=[spec_of(fault)]), out, checkpoint)
    # A copied record begins with the prefix's own incidents: the recorder knows those of this run alone.
    outcome = judge(bifusion_truth(fault), trainer.recorder.incidents, statistics.median(trainer.step_seconds[:2]))
    outcome.warned = warned
    outcome.record = str(out)
    outcome.seconds = time.perf_counter() - began
    return outcome


def run_control(preset: str, folder: Path) -> Outcome:
    """A whole healthy run: from scratch, through its stages and schedules."""
    began = time.perf_counter()
    out = folder / f"control-{preset}" / "run.json"
    trainer, warned = _trained(Whole, settings_of(preset, steps=CONTROL_STEPS), out)
    truth = Truth(f"bifusion/{preset}-from-scratch", "healthy", (), 0, False)
    outcome = judge(truth, trainer.recorder.incidents, statistics.median(trainer.step_seconds))
    outcome.warned = warned
    outcome.record = str(out)
    outcome.seconds = time.perf_counter() - began
    return outcome


def run_ranks(fault: Fault, folder: Path) -> Outcome:
    """Two processes that torchrun starts, with a fault in one."""
    began = time.perf_counter()
    out = folder / f"ranks-{fault.name}" / "run.json"
    out.parent.mkdir(parents=True)
    config = out.with_name("config.yaml")
    settings = settings_of(inject=[spec_of(fault)])
    values = settings.model_dump(mode="json")
    values["training"]["steps"] = RANKS_STEPS
    config.write_text(json.dumps(values))  # JSON is YAML
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "bifusion_diag", "train", "--config", str(config.absolute()), "--out", str(out.absolute())]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.run(command, env=environment, cwd=out.parent, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{fault.name}: torchrun failed:\n{process.stderr[-3000:]}")
    run = load_run(out)
    stored = [event.data.get("incident") for event in run.events]
    incidents = [Incident.from_dict(found) for found in stored if found]
    series = run.series("train/step_seconds")
    step_seconds = 0.0 if series is None else float(np.median(series.value))
    outcome = judge(bifusion_truth(fault), incidents, step_seconds)
    outcome.record = str(out)
    outcome.seconds = time.perf_counter() - began
    return outcome


# --- replays ----------------------------------------------------------------------------------------------------------


def replays(capsules: Sequence[str]) -> dict[str, Any]:
    """Replay capsules in one new process: {folder: {"identical": ..., "difference": ...}}."""
    if not capsules:
        return {}
    command = [sys.executable, "-m", "benchmarks.fault_run", *(str(Path(folder).absolute()) for folder in capsules)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    home = Path(__file__).parents[1]
    process = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"replay failed:\n{process.stderr[-3000:]}")
    found = json.loads(process.stdout.splitlines()[-1])
    return {folder: found[str(Path(folder).absolute())] for folder in capsules}


def _replay(folder: str) -> dict[str, Any]:
    from bifusion_diag.experiments.rebuild import is_own, rebuild
    from bifusion_diag.replay.capsules.capsule import read_capsule
    from bifusion_diag.replay.capsules.execute import replay_capsule
    from bifusion_diag.replay.step import Training

    capsule = read_capsule(folder)
    if is_own(capsule.settings):
        training = rebuild(capsule)
    else:
        model, step, optimizer = build(capsule.settings)
        training = Training(model, step, (optimizer,))
    found = replay_capsule(capsule, training)
    return {"identical": found.identical, "difference": found.difference, "reasons": list(found.reasons)}


def main(capsules: Sequence[str]) -> None:
    """Replay every capsule, print one JSON object."""
    results: dict[str, Any] = {}
    with contextlib.redirect_stdout(sys.stderr):
        for folder in capsules:
            try:
                results[folder] = _replay(folder)
            except Exception as error:
                results[folder] = {"identical": False, "difference": f"{type(error).__name__}: {error}"}
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
