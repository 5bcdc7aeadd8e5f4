"""Some of a source's scenes as a source of their own: what is kept out of training, or in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bifusion_diag.data.scene import Scene
from bifusion_diag.data.source import SceneSource


class SceneSubset:
    """A :class:`~bifusion_diag.data.source.SceneSource` of chosen scenes.

    Args:
        source: where they come from.
        indices: which, in the order in which they are served.
    """

    def __init__(self, source: SceneSource, indices: Sequence[int]) -> None:
        self.source = source
        self.indices = tuple(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)} chosen scenes")
        return self.source[self.indices[index]]

    def names(self) -> list[str]:
        """Those of the chosen scenes."""
        names = self.source.names()
        return [names[index] for index in self.indices]

    def describe(self) -> dict[str, Any]:
        """That of the source, with the number of chosen scenes, of how many, and which."""
        whole = self.source.describe()
        chosen = {"scenes": len(self), "of": whole.get("scenes", len(self.source)), "chosen": _ranges(self.indices)}
        return whole | chosen


def _ranges(indices: Sequence[int]) -> str:
    """Indices in words: '0-6', '7, 9'."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
