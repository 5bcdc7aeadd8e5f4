"""Our own runs, built again from the settings that a capsule holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bifusion_diag.config import Settings, settings_from_dict
from bifusion_diag.config.settings import TrainingSettings
from bifusion_diag.errors import UserError
from bifusion_diag.model.build import build_model
from bifusion_diag.model.checkpoints import load_weights
from bifusion_diag.model.segmenter import Segmenter
from bifusion_diag.replay.capsules.capsule import Capsule
from bifusion_diag.replay.step import Training
from bifusion_diag.training.determinism import choose_device, make_deterministic
from bifusion_diag.training.faults import FAULTS, Faults, parse_injections
from bifusion_diag.training.optim import build_optimizer
from bifusion_diag.training.stages import StageSwitch, stages_of


class Parts(NamedTuple):
    """What the trainer trains with."""

    model: Segmenter
    optimizer: torch.optim.Optimizer
    stages: StageSwitch
    faults: Faults


def is_own(settings: Mapping[str, Any]) -> bool:
    """Whether these are settings of a run of ``bifusion-diag train``."""
    return {"preset", "model", "losses", "optim", "training", "data"} <= set(settings)


def settings_of(capsule: Capsule) -> Settings:
    """Of the run that the capsule is of.

    Raises:
        UserError: this version does not know them.
    """
    return settings_from_dict(capsule.settings, str(capsule.folder))


def rebuild(capsule: Capsule) -> Training:
    """The model of our own run as it was at the capsule's step: with fresh weights but for those that are frozen for
    good, in its stage, its losses scheduled, with the faults that were injected in forward and losses. Its state is yet
    to be restored.

    Raises:
        UserError: settings of another version, or weights that are not here.
    """
    parts = parts_of(capsule, settings_of(capsule))
    parts.faults.install(capsule.step)
    return Training(parts.model, lambda batch: parts.model(batch).loss, (parts.optimizer,))


def parts_of(capsule: Capsule, settings: Settings) -> Parts:
    """What the trainer has at the capsule's step under these settings, which need not be those of the run: a fault in
    a loss term goes where they take the term away.

    Raises:
        UserError: settings that no model can have, or weights that are not here.
    """
    training = settings.training
    make_deterministic(training.seed, training.threads)
    model = build_model(settings).to(_device(settings)).train()
    if settings.model.init_from is not None and capsule.content["model"]["rebuilt"]["names"]:
        load_weights(model, Path(settings.model.init_from))
    optimizer = build_optimizer(model, settings.optim)
    stages = StageSwitch(model, stages_of(settings), training.steps)
    model.set_progress(capsule.step, training.steps)
    stages.enter(capsule.step)
    specs = [spec for spec in _of_rank(training.inject, capsule.content["rank"]) if _fits(spec, model, training)]
    return Parts(model, optimizer, stages, Faults(specs, model, optimizer, batch_size=training.batch_size))


def _fits(spec: str, model: Segmenter, training: TrainingSettings) -> bool:
    try:
        Faults([spec], model, batch_size=training.batch_size)
    except UserError:
        return False
    return True


def _device(settings: Settings) -> torch.device:
    """The run's, or the CPU where it is not here."""
    name = settings.training.device
    if name.startswith("cuda") and not torch.cuda.is_available():
        name = "cpu"
    return choose_device(name)


def _of_rank(specs: tuple[str, ...], rank: int) -> list[str]:
    """Injections as one process sees them: those in another rank are not its own, and it is rank 0 here."""
    found = []
    for spec, injection in zip(specs, parse_injections(specs), strict=True):
        if FAULTS[injection.fault.name].where != "rank":
            found.append(spec)
        elif (injection.where or "1") == str(rank):
            found.append(f"{injection.fault.name}@{injection.step}:0")
    return found
