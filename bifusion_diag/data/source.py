"""Where scenes come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from bifusion_diag.config.settings import DataSettings
from bifusion_diag.data.scene import Scene
from bifusion_diag.errors import UserError, near_matches


class SceneSource(Protocol):
    """A fixed, indexable set of scenes. Asking twice for one index gives equal scenes."""

    def __len__(self) -> int:
        """Number of scenes."""
        ...

    def __getitem__(self, index: int) -> Scene:
        """Scene ``index``; raises IndexError outside 0..len−1."""
        ...

    def names(self) -> list[str]:
        """The name of every scene, none of them built."""
        ...

    def describe(self) -> dict[str, Any]:
        """What to write into a run's provenance: kind, origin of the labels, counts, flaws. JSON-ready."""
        ...


def open_source(data: DataSettings, *, seed: int) -> SceneSource:
    """The source that the settings name.

    Args:
        data: ``data.source`` is 'synthetic', or a folder of RGB-D frames.
        seed: of the synthetic rooms.

    Raises:
        UserError: the source is neither 'synthetic' nor an existing folder.
    """
    if data.source == "synthetic":
        from bifusion_diag.data.synthetic import SyntheticRooms

        return SyntheticRooms(data, seed)
    folder = Path(data.source)
    if not folder.is_dir():
        problem = "not a folder" if folder.exists() else "no such folder"
        raise UserError(
            f"data.source '{data.source}': {problem}. Give an existing folder of RGB-D frames, or a built-in source."
            + near_matches(data.source, ["synthetic"])
        )
    from bifusion_diag.data.rgbd import RGBDFolder

    return RGBDFolder(folder, data)
