"""Scenes concatenated as torch tensors.

Legend: N points in the batch · B scenes · V views a scene · S superpoints in the batch · H, W image size [px].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bifusion_diag.data.scene import Scene
from bifusion_diag.errors import UserError

#: Mean and standard deviation of ScanNet's colours on a scale of 0..255, as ESAM normalises with.
COLOR_MEAN = np.array([0.47793125906962, 0.4303257521323044, 0.3749598901421883], np.float32) * np.float32(255)
COLOR_STD = np.array([0.2834475483823543, 0.27566157565723015, 0.27018971370874995], np.float32) * np.float32(255)


@dataclass(frozen=True, eq=False)
class Batch:
    """What a model is given."""

    xyz: Tensor  # (N, 3) float32 world coordinates as captured [m]: projection always uses these
    coords: Tensor  # (N, 3) float32 augmented coordinates [m]: what is voxelised
    color: Tensor  # (N, 3) float32 rgb, normalised with COLOR_MEAN and COLOR_STD
    scene_index: Tensor  # (N,) int64 0..B-1, ascending
    point_counts: tuple[int, ...]  # points of each scene, sum = N
    superpoint: Tensor  # (N,) int64 0..S-1, unique in the batch, ascending by scene
    superpoint_counts: tuple[int, ...]  # superpoints of each scene, sum = S
    semantic: Tensor  # (N,) int64, -1 = ignore
    instance: Tensor  # (N,) int64, per scene 0..G-1 with every id used, -1 = none
    images: Tensor  # (B, V, 3, H, W) uint8
    depth: Tensor  # (B, V, H, W) float32 [m], 0 = no reading
    intrinsics: Tensor  # (B, V, 3, 3) float32 [px]
    pose: Tensor  # (B, V, 4, 4) float32 camera-to-world [m]
    names: tuple[str, ...]  # scene names
    labels: tuple[str, ...]  # where each scene's labels come from
    notes: tuple[tuple[str, ...], ...] = ()  # flaws of each scene

    @property
    def batch_size(self) -> int:
        """Number of scenes, B."""
        return len(self.point_counts)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on ``device``."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in values.items()}
        return Batch(**moved)

    def select(self, scenes: Sequence[int]) -> Batch:
        """The batch of some of its scenes, in the order given; a scene may be there twice.

        Raises:
            IndexError: there is no such scene, or none is asked for.
        """
        if not scenes or not all(0 <= scene < self.batch_size for scene in scenes):
            raise IndexError(f"scenes {list(scenes)} of a batch of {self.batch_size}")
        chosen = list(scenes)
        ends = np.cumsum(self.point_counts)
        device = self.xyz.device
        rows = torch.cat([torch.arange(ends[i] - self.point_counts[i], ends[i]) for i in chosen]).to(device)
        points = torch.tensor([self.point_counts[i] for i in chosen], device=device)
        superpoints = [self.superpoint_counts[i] for i in chosen]
        before = np.cumsum(self.superpoint_counts) - self.superpoint_counts  # superpoints of the scenes before
        shift = np.cumsum(superpoints) - superpoints - before[chosen]
        return Batch(
            xyz=self.xyz[rows],
            coords=self.coords[rows],
            color=self.color[rows],
            scene_index=torch.arange(len(chosen), device=device).repeat_interleave(points),
            point_counts=tuple(points.tolist()),
            superpoint=self.superpoint[rows] + torch.from_numpy(shift).to(device).repeat_interleave(points),
            superpoint_counts=tuple(superpoints),
            semantic=self.semantic[rows],
            instance=self.instance[rows],
            images=self.images[chosen],
            depth=self.depth[chosen],
            intrinsics=self.intrinsics[chosen],
            pose=self.pose[chosen],
            names=tuple(self.names[i] for i in chosen),
            labels=tuple(self.labels[i] for i in chosen),
            notes=tuple(self.notes[i] for i in chosen) if self.notes else (),
        )


def collate(scenes: Sequence[Scene], coords: Sequence[NDArray[Any]]) -> Batch:
    """Concatenate scenes.

    A point with a coordinate that is not finite cannot be put into a voxel: it is dropped and counted in ``notes``.
    Colours that are not finite are kept and counted there too; points far away and colours outside [0, 255] are kept,
    as training code in the wild keeps them.

    Args:
        scenes: at least one, all with the same number and size of images.
        coords: for each scene the augmented coordinates of its points, (N_i, 3) [m].

    Raises:
        UserError: a scene has no point with finite coordinates, is malformed, or its images differ from the others'.
    """
    assert len(scenes) == len(coords) > 0
    kept: list[Scene] = []
    moved: list[NDArray[Any]] = []
    for scene, xyz in zip(scenes, coords, strict=True):
        finite = _finite(scene.validate(), xyz)
        dropped = len(scene) - int(finite.sum())
        found = scene.take(finite, f"{dropped} points with non-finite coordinates dropped") if dropped else scene
        if odd := int((~np.isfinite(found.points[:, 3:])).any(1).sum()):
            found = replace(found, notes=(*found.notes, f"{odd} points with non-finite colours"))
        kept.append(found)
        moved.append(np.asarray(xyz, dtype=np.float32)[finite])
        if scene.images.shape != scenes[0].images.shape:
            raise UserError(
                f"scenes of one batch need images of one size: '{scenes[0].name}' has (V, 3, H, W) = "
                f"{scenes[0].images.shape}, '{scene.name}' has {scene.images.shape}; resize them, or use batch_size 1"
            )
    counts = tuple(len(scene) for scene in kept)
    superpoints = tuple(int(scene.superpoint.max()) + 1 for scene in kept)
    offsets = np.concatenate([[0], np.cumsum(superpoints)[:-1]]).astype(np.int64)
    points = np.concatenate([scene.points for scene in kept])
    return Batch(
        xyz=torch.from_numpy(points[:, :3].copy()),
        coords=torch.from_numpy(np.concatenate(moved)),
        color=torch.from_numpy((points[:, 3:] - COLOR_MEAN) / COLOR_STD),
        scene_index=torch.repeat_interleave(torch.arange(len(kept)), torch.tensor(counts)),
        point_counts=counts,
        superpoint=_join([scene.superpoint + offset for scene, offset in zip(kept, offsets, strict=True)]),
        superpoint_counts=superpoints,
        semantic=_join([scene.semantic for scene in kept]),
        instance=_join([contiguous(scene.instance) for scene in kept]),
        images=torch.from_numpy(np.stack([scene.images for scene in kept])),
        depth=torch.from_numpy(np.stack([scene.depth for scene in kept])),
        intrinsics=torch.from_numpy(np.stack([scene.intrinsics for scene in kept])),
        pose=torch.from_numpy(np.stack([scene.pose for scene in kept])),
        names=tuple(scene.name for scene in kept),
        labels=tuple(scene.labels for scene in kept),
        notes=tuple(scene.notes for scene in kept),
    )


def contiguous(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Renumber the ids ≥ 0 as 0, 1, ... in their order; negative ids become −1.

    Args:
        ids: (N,).

    Returns:
        (N,): an object that has lost all its points leaves no gap.
    """
    used = np.unique(ids[ids >= 0])
    return np.where(ids >= 0, np.searchsorted(used, ids), -1).astype(np.int64)


def _finite(scene: Scene, coords: NDArray[Any]) -> NDArray[np.bool_]:
    """Which points can be voxelised and projected, (N,); a scene that has none is the user's to repair."""
    if coords.shape != (len(scene), 3):
        raise UserError(f"scene '{scene.name}': augmented coords must be ({len(scene)}, 3), got {coords.shape}")
    finite: NDArray[np.bool_] = np.isfinite(scene.points[:, :3]).all(1) & np.isfinite(coords).all(1)
    if not finite.any():
        found = f"none of its {len(scene)} points has finite coordinates" if len(scene) else "it has no points"
        raise UserError(f"scene '{scene.name}' cannot be batched: {found}; leave the scene out or repair its capture")
    return finite


def _join(parts: list[NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))
