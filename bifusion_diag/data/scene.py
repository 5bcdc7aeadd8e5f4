"""One sample: posed RGB-D images and the labelled points that were taken from them.

Legend: N points · V views · H, W image size [px] · S superpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.errors import UserError

Array = NDArray[Any]

#: What each array of a scene must look like: dtype and shape, where a letter stands for one and the same number.
LAYOUT: dict[str, tuple[type[np.generic], tuple[str | int, ...]]] = {
    "points": (np.float32, ("N", 6)),
    "images": (np.uint8, ("V", 3, "H", "W")),
    "depth": (np.float32, ("V", "H", "W")),
    "intrinsics": (np.float32, ("V", 3, 3)),
    "pose": (np.float32, ("V", 4, 4)),
    "semantic": (np.int64, ("N",)),
    "instance": (np.int64, ("N",)),
    "superpoint": (np.int64, ("N",)),
}


@dataclass(frozen=True, eq=False)
class Scene:
    """A sample as a source hands it out. Flawed captures are representable: see ``notes``."""

    name: str  # e.g. "frame-000040"
    points: Array  # (N, 6) float32: xyz [m] in the world frame, rgb in [0, 255] (flawed captures leave that range)
    images: Array  # (V, 3, H, W) uint8
    depth: Array  # (V, H, W) float32 [m], 0 = no reading
    intrinsics: Array  # (V, 3, 3) float32 [px]
    pose: Array  # (V, 4, 4) float32 camera-to-world [m]; non-finite where tracking was lost
    semantic: Array  # (N,) int64: ScanNet200 class 0..199, -1 = unlabelled
    instance: Array  # (N,) int64: 0.. , -1 = none
    superpoint: Array  # (N,) int64: 0..S-1, every id used
    labels: str  # where the labels come from, e.g. "ground truth (synthetic)"
    notes: tuple[str, ...] = ()  # flaws that were seen, one sentence each

    def __len__(self) -> int:
        """Number of points, N."""
        return len(self.points)

    def validate(self) -> Scene:
        """Check dtypes and shapes, and that superpoint ids are compact.

        Returns:
            The scene itself.

        Raises:
            UserError: names the scene, the field, what was expected and what was found.
        """
        sizes: dict[str, int] = {}
        for field, (dtype, shape) in LAYOUT.items():
            array = getattr(self, field)
            if not isinstance(array, np.ndarray) or array.dtype != dtype or not _fits(array.shape, shape, sizes):
                found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
                wanted = ", ".join(f"{s}={sizes[s]}" if s in sizes else str(s) for s in map(str, shape))
                raise UserError(f"scene '{self.name}': {field} must be {dtype.__name__} ({wanted}), got {found}")
        used = np.unique(self.superpoint)
        if not np.array_equal(used, np.arange(len(used))):
            raise UserError(
                f"scene '{self.name}': superpoint ids must be 0..S-1 with every id used, "
                f"got {len(used)} ids from {used.min()} to {used.max()}; relabel them with numpy.unique"
            )
        return self

    def take(self, keep: Array, *notes: str) -> Scene:
        """The scene with some of its points; superpoint ids are made compact again.

        Args:
            keep: (N,) bool, or point indices.
            notes: what to add to ``notes``.
        """
        superpoint = np.unique(self.superpoint[keep], return_inverse=True)[1].reshape(-1).astype(np.int64)
        return replace(
            self,
            points=self.points[keep],
            semantic=self.semantic[keep],
            instance=self.instance[keep],
            superpoint=superpoint,
            notes=self.notes + notes,
        )


def _fits(shape: tuple[int, ...], wanted: tuple[str | int, ...], sizes: dict[str, int]) -> bool:
    """Whether ``shape`` is ``wanted``, where a letter takes the first size that it meets (kept in ``sizes``)."""
    if len(shape) != len(wanted):
        return False
    return all(
        size == (sizes.setdefault(want, size) if isinstance(want, str) else want)
        for size, want in zip(shape, wanted, strict=True)
    )


assert set(LAYOUT) <= {field.name for field in fields(Scene)}
