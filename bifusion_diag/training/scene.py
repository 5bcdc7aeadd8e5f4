"""Snapshots of α on one scene: before training, when the gate is released, and at the end."""

from __future__ import annotations

import contextlib
import warnings

import torch

from bifusion_diag.config import Settings
from bifusion_diag.data import Batch, SceneSource
from bifusion_diag.errors import UserError
from bifusion_diag.model.gate.learned import LearnedGate
from bifusion_diag.model.segmenter import Segmenter
from bifusion_diag.probes.scene import take_snapshot
from bifusion_diag.record import RunWriter
from bifusion_diag.training.evaluation import scene_alone, validation_source

START, RELEASED, END = "before training", "when the gate is released", "at the end"
EVENT = "scene"  # kind of the event that says why there is no snapshot


class SceneSnapshots:
    """Takes α of one and the same scene at three moments of a run; of several processes, rank 0 does.

    The scene is the first of the validation where there is one (of a run on synthetic rooms there always is), else the
    first that the run trains on: whole, without augmentation. A snapshot that fails says so once, and training goes on.

    Args:
        settings: of the run.
        model: takes no snapshot where it has no learned gate.
        device: where the model is.
        writer: gets the snapshots.
        training: scenes of the run.
        validation: scenes that it is evaluated on, None where it is not evaluated.
    """

    def __init__(
        self,
        settings: Settings,
        model: Segmenter,
        device: torch.device,
        writer: RunWriter,
        training: SceneSource,
        validation: SceneSource | None,
    ) -> None:
        self._settings = settings
        self._model = model
        self._device = device
        self._writer = writer
        self._sources = (training, validation)
        self._scene: tuple[Batch, dict[str, str]] | None = None  # drawn once
        gate = getattr(model.encoder, "gate", None)
        self._gate = gate if isinstance(gate, LearnedGate) else None

    def before(self, step: int) -> None:
        """Called with the model as a step begins: takes what is due there."""
        if self._gate is None:
            return
        released = self._gate.released_at(self._settings.training.steps)
        if step == 0:
            self._take(step, START)
        elif step == released:
            self._take(step, RELEASED)

    def end(self, done: int) -> None:
        """Called once no step follows: all are done, or the run was interrupted."""
        if self._gate is not None and done:
            self._take(done, END)

    def _take(self, done: int, moment: str) -> None:
        try:
            if self._scene is None:
                self._scene = self._chosen()
            batch, provenance = self._scene
            height, width = batch.depth.shape[-2:]
            snapshot = take_snapshot(
                self._model,
                lambda: self._model.encoder(batch),
                batch.xyz,
                batch.images[0],
                done=done,
                name=batch.names[0],
                moment=moment,
                intrinsics=batch.intrinsics[0],
                pose=batch.pose[0],
                image_size=(width, height),
                provenance=provenance,
            )
        except Exception as error:  # a picture of a run must not end it
            message = f"no picture of α {moment}: {type(error).__name__}: {error}"
            self._writer.event(done - 1 if done else None, EVENT, message, moment=moment)
            warnings.warn(f"{message}. Training goes on without it.", RuntimeWarning, stacklevel=3)
            self._gate = None
            return
        self._writer.snapshot(snapshot)

    def _chosen(self) -> tuple[Batch, dict[str, str]]:
        """The scene on its own, and what it is.

        Raises:
            UserError: no scene has a point.
        """
        training, validation = self._sources
        if validation is None and self._settings.data.source == "synthetic":
            with contextlib.suppress(UserError):
                validation = validation_source(self._settings)
        split, source = ("training", training) if validation is None else ("validation", validation)
        points = self._settings.evaluation.max_points or self._settings.data.max_points
        for index in range(len(source)):
            batch = scene_alone(source, index, self._settings, points)
            if batch is not None:
                told = source.describe()
                flaws = "; ".join(batch.notes[0]) if batch.notes else ""
                provenance = {
                    "split": split,
                    "kind": str(told.get("kind", "")),
                    "labels": batch.labels[0],
                    "flaws": flaws,
                }
                return batch.to(self._device), provenance
        raise UserError(f"none of the {len(source)} scenes has a point: {source.describe()}")
