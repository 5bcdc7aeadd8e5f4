"""Metrics on validation scenes, in the course of training and without a trace in it.

A scene is evaluated whole: no augmentation, no crop but to ``evaluation.max_points`` (the same points every time),
every superpoint a query. Scenes are evaluated one at a time, so that memory does not depend on the batch size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bifusion_diag.config import Settings
from bifusion_diag.config.settings import FlawSettings
from bifusion_diag.data import Batch, SceneSource, SceneSubset, collate, crop_scene, open_source
from bifusion_diag.data.masks import GRAPH
from bifusion_diag.data.rgbd import RGBDFolder
from bifusion_diag.errors import UserError
from bifusion_diag.evaluation import AlignmentMean, InstanceScene, SemanticIoU, UniformityMean, average_precision
from bifusion_diag.model.inference import evaluating
from bifusion_diag.model.segmenter import Segmenter
from bifusion_diag.training.determinism import random_state, restore_random_state

#: Seed of the validation rooms. Training seeds are smaller, so that no room of the one can be a room of the other; it
#: is the same for every run, so that all runs are measured on the same rooms.
ROOM_SEED = 1 << 63
_POINTS_PER_REGION = 20_000 / 100  # ScanNet's smallest object, in points of a frame as ESAM samples it
_POINTS_STREAM = 3  # of the points that are kept of a scene


def training_source(settings: Settings) -> SceneSource:
    """The scenes that a run trains on: its source, without what ``evaluation.holdout`` keeps.

    Raises:
        UserError: the source cannot be opened, or nothing would be left of it.
    """
    source = open_source(settings.data, seed=settings.training.seed)
    held_out = _held_out(settings, len(source))
    if not held_out:
        return source
    kept = range(len(source) - held_out)
    if isinstance(source, RGBDFolder) and kept.stop:
        unseen = source.frames(kept.stop).start
        kept = range(sum(source.frames(index).stop <= unseen for index in kept))
    if not kept:
        raise UserError(
            f"evaluation.holdout={settings.evaluation.holdout} keeps {held_out} of the {len(source)} scenes of "
            f"'{settings.data.source}', and no other scene is free of their frames: none is left to train on. Keep "
            "fewer, lower data.views or data.point_views, or give validation scenes of their own with --val-data FOLDER"
        )
    return SceneSubset(source, kept)


def validation_source(settings: Settings) -> SceneSource:
    """The scenes that a run is evaluated on; none of them is a scene of :func:`training_source`.

    Raises:
        UserError: a folder is trained on and no validation scenes are named, the source cannot be opened, or validation
            would be on the training scenes.
    """
    options, data = settings.evaluation, settings.data
    if options.source == "synthetic" or (options.source is None and data.source == "synthetic"):
        rooms = {"source": "synthetic", "masks": _masks(settings), "scenes": options.scenes, "flaws": FlawSettings()}
        return open_source(data.model_copy(update=rooms), seed=ROOM_SEED)
    if options.source is not None and not _same(options.source, data.source):
        other = {"source": options.source, "masks": _masks(settings)}
        source = open_source(data.model_copy(update=other), seed=settings.training.seed)
        return _spread(source, range(len(source)), options.scenes)
    if not options.holdout:
        raise UserError(
            f"there are no scenes to evaluate on but those of '{data.source}', which the run trains on. Give another "
            "folder with --val-data FOLDER, or keep the last scenes out of training with, for example, "
            "--set evaluation.holdout=0.2"
        )
    source = open_source(data, seed=settings.training.seed)
    held_out = _held_out(settings, len(source))
    return _spread(source, range(len(source) - held_out, len(source)), options.scenes)


class Evaluator:
    """Evaluates a model on scenes that stay the same.

    Args:
        settings: of the run.
        source: validation scenes; one without a point is left out.

    Raises:
        UserError: the source has no scene.
    """

    def __init__(self, settings: Settings, source: SceneSource) -> None:
        if len(source) == 0:
            raise UserError(f"there are no scenes to evaluate on: {source.describe()}")
        options = settings.evaluation
        self.source = source
        self.max_points = options.max_points or settings.data.max_points
        self.min_region = options.min_region or max(1, round(self.max_points / _POINTS_PER_REGION))
        self.semantic_classes = settings.model.decoder.semantic_classes
        data = settings.data
        self._drawn = {"image_size": [data.image_width, data.image_height], "drawn_for": data.max_points}
        self._settings = settings

    def provenance(self) -> dict[str, Any]:
        """What is evaluated on, for the run record: all that decides which points and labels these are."""
        return self._drawn | self.source.describe() | {"max_points": self.max_points, "min_region": self.min_region}

    def evaluate(
        self, model: Segmenter, device: torch.device, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """The metrics by name; what could not be measured is left out. The model, its buffers and the random generators
        are afterwards as they were.

        Args:
            model: in any mode.
            device: where the model is.
            stop: asked before each scene; once it says yes, nothing is measured.

        Returns:
            By series name, shares and cosines; empty if it was stopped.
        """
        began = time.perf_counter()
        random = random_state()
        try:
            with evaluating(model):
                numbers = self._metrics(model, device, stop)
        finally:
            restore_random_state(random)
        if numbers is None:
            return {}
        measured = {f"eval/{name}": value for name, value in numbers.items() if value is not None}
        return measured | {"eval/seconds": time.perf_counter() - began}

    def _metrics(
        self, model: Segmenter, device: torch.device, stop: Callable[[], bool]
    ) -> dict[str, float | None] | None:
        semantics, alignment, uniformity = SemanticIoU(self.semantic_classes), AlignmentMean(), UniformityMean()
        instances: list[InstanceScene] = []
        for index in range(len(self.source)):
            if stop():
                return None
            batch = self._batch(index)
            if batch is None:
                continue
            batch = batch.to(device)
            predictions = model.predictions(batch)
            (scene,) = model.inference(predictions, batch, class_agnostic=True)
            semantics.update(scene.semantic, batch.semantic)
            instances.append(
                InstanceScene(
                    scene.masks.cpu().numpy(), scene.scores.double().cpu().numpy(), batch.instance.cpu().numpy()
                )
            )
            encoder = predictions.encoder
            uniformity.update(encoder.f3d)
            if encoder.f2d is not None and encoder.valid is not None:
                alignment.update(encoder.f2d, encoder.f3d, encoder.valid)
        precision = average_precision(instances, min_region=self.min_region)
        return {
            "miou": semantics.mean(),
            "ap": precision.ap,
            "ap50": precision.ap50,
            "ap25": precision.ap25,
            "alignment": alignment.mean(),
            "uniformity": uniformity.value(),
        }

    def _batch(self, index: int) -> Batch | None:
        """A scene on its own, None where it has no point."""
        return scene_alone(self.source, index, self._settings, self.max_points)


def scene_alone(source: SceneSource, index: int, settings: Settings, max_points: int) -> Batch | None:
    """A whole scene as a batch of its own, not augmented: at most so many of its points, the same every time. None
    where it has no point."""
    scene = source[index]
    if not np.isfinite(scene.points[:, :3]).all(axis=1).any():
        return None
    whole = settings.data.model_copy(update={"max_points": max_points, "crop_size": 1e9})
    scene = crop_scene(scene, whole, np.random.default_rng([_POINTS_STREAM, index]))
    return collate([scene], [scene.points[:, :3]])


def _masks(settings: Settings) -> str:
    """Where the masks of validation scenes come from that are not of the source that the run trains on.

    Raises:
        UserError: only the masks of the source that it trains on are named. Frames of two captures often have the same
            names, so that one would quietly be given the other's masks.
    """
    given, data = settings.evaluation.masks, settings.data
    if given is None and data.superpoints == "masks" and data.masks != GRAPH:
        raise UserError(
            f"data.masks '{data.masks}' holds the masks of '{data.source}'; the validation scenes need their own. "
            "Give a folder of them with --set evaluation.masks=FOLDER, or segment the images with "
            f"--set evaluation.masks={GRAPH}"
        )
    return given or data.masks


def _same(one: str, other: str) -> bool:
    """Whether two sources are the same folder."""
    return "synthetic" not in (one, other) and Path(one).resolve() == Path(other).resolve()


def _held_out(settings: Settings, scenes: int) -> int:
    """How many of the source's scenes are kept out of training: at least one where any are."""
    share = settings.evaluation.holdout
    if not share:
        return 0
    count = max(1, round(share * scenes))
    if count >= scenes:
        raise UserError(
            f"evaluation.holdout={share} keeps {count} of the {scenes} scenes of '{settings.data.source}': none is "
            "left to train on. Keep fewer, or give validation scenes of their own with --val-data FOLDER"
        )
    return count


def _spread(source: SceneSource, indices: range, most: int) -> SceneSource:
    """At most so many of the scenes, evenly spread."""
    if len(indices) <= most:
        chosen = list(indices)
    else:
        chosen = [indices[int((place + 0.5) * len(indices) / most)] for place in range(most)]
    return SceneSubset(source, chosen)
