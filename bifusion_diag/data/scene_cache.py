"""Scenes that were built are kept in memory while they fit, as every epoch asks for them again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from bifusion_diag.data.scene import Scene

#: What the scenes of one source may take together: about 200 of full size.
CACHE_BYTES = 2**29


class SceneCache:
    """Remembers scenes by index; of those that do not fit, the ones not asked for the longest go first."""

    def __init__(self, build: Callable[[int], Scene]) -> None:
        self._build = build
        self._scenes: OrderedDict[int, Scene] = OrderedDict()

    def __getitem__(self, index: int) -> Scene:
        """Scene `index`, built if it is not remembered. The last one asked for is always kept."""
        scene = self._scenes.pop(index, None)
        self._scenes[index] = scene = scene if scene is not None else self._build(index)
        while len(self._scenes) > 1 and sum(map(_bytes, self._scenes.values())) > CACHE_BYTES:
            self._scenes.popitem(last=False)
        return scene


def _bytes(scene: Scene) -> int:
    return sum(value.nbytes for value in vars(scene).values() if isinstance(value, np.ndarray))
