"""Batches by step number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bifusion_diag.config.settings import DataSettings
from bifusion_diag.data.augment import Augmentation
from bifusion_diag.data.batch import Batch, collate
from bifusion_diag.data.crop import crop_scene
from bifusion_diag.data.scene import Scene
from bifusion_diag.data.source import SceneSource
from bifusion_diag.errors import UserError, near_matches

# Random streams of one seed are kept apart by a number of their own.
_ORDER, _SAMPLE = 1, 2


class BatchLoader:
    """Serves the batch of any step: a pure function of (seed, step).

    So a resumed run, a replayed step and a second run of another model all see the same batches. An epoch visits every
    scene once, in an order of its own; a batch may span two epochs. Scenes of ``data.exclude`` are passed over, and all
    others come in the order that they would have had: until the first of their turns, a run is as it was with them.

    Of several processes each has a part of the step's batch: N ranks with batches of b see, in order of their ranks,
    the very samples that a single process sees with a batch of N·b.
    """

    def __init__(
        self, source: SceneSource, settings: DataSettings, *, batch_size: int, seed: int, rank: int = 0, ranks: int = 1
    ) -> None:
        """Args: ``batch_size`` scenes a step and rank; ``rank`` of this process among ``ranks``.

        Raises UserError for a source that has no scenes, and for names in ``data.exclude`` that are none of its scenes
        or all of them.
        """
        if len(source) == 0:
            raise UserError(f"the data source has no scenes: {source.describe()}")
        self._excluded = _excluded(source, settings.exclude)
        self.source = source
        self.settings = settings
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.augment = Augmentation(settings.augment)

    @property
    def scenes_per_epoch(self) -> int:
        """Number of scenes that an epoch visits once each."""
        return len(self.source) - len(self._excluded)

    def scene_indices(self, step: int) -> tuple[int, ...]:
        """Which scenes make up the batch of ``step`` (counted from 0)."""
        first = (step * self.ranks + self.rank) * self.batch_size
        indices = []
        for position in range(first, first + self.batch_size):
            epoch, place = divmod(position, self.scenes_per_epoch)
            indices.append(self._order(epoch)[place])
        return tuple(indices)

    def _order(self, epoch: int) -> list[int]:
        order = np.random.default_rng([self.seed, _ORDER, epoch]).permutation(len(self.source)).tolist()
        return [index for index in order if index not in self._excluded]

    def batch(self, step: int) -> Batch:
        """The batch of ``step`` (counted from 0), cropped and augmented."""
        scenes, coords = [], []
        for slot, index in enumerate(self.scene_indices(step), start=self.rank * self.batch_size):
            rng = np.random.default_rng([self.seed, _SAMPLE, step, slot])
            scene = crop_scene(self._scene(index), self.settings, rng)
            scenes.append(scene)
            coords.append(self.augment(scene.points[:, :3], rng))
        return collate(scenes, coords)

    def _scene(self, index: int) -> Scene:
        """Scene ``index``, or the first one after it that has a point: a capture without depth must not end a run."""
        without: list[str] = []
        for candidate in (*range(index, len(self.source)), *range(index)):
            if candidate in self._excluded:
                continue
            scene = self.source[candidate]
            if np.isfinite(scene.points[:, :3]).all(axis=1).any():
                stands_in = tuple(f"stands in for '{name}', which has no points" for name in without)
                return replace(scene, notes=scene.notes + stands_in) if stands_in else scene
            without.append(scene.name)
        raise UserError(f"none of the {len(without)} scenes has a point: {self.source.describe()}")


def _excluded(source: SceneSource, names: Sequence[str]) -> frozenset[int]:
    """The scenes of these names."""
    if not names:
        return frozenset()
    known = source.names()
    for name in names:
        if name not in known:
            raise UserError(
                f"data.exclude: none of the {len(known)} scenes trained on is called {name!r}."
                + near_matches(name, known)
            )
    excluded = frozenset(index for index, name in enumerate(known) if name in names)
    if len(excluded) == len(known):
        raise UserError(f"data.exclude names all {len(known)} scenes: none is left to train on")
    return excluded
