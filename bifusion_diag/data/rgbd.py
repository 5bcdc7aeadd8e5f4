"""Real RGB-D frames as scenes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bifusion_diag.config.settings import DataSettings
from bifusion_diag.data.mask_superpoints import relabel_by_masks, replace_by_ids
from bifusion_diag.data.masks import GRAPH, describe_clusters, describe_superpoints, graph_masks, ids_at_pixels
from bifusion_diag.data.normals import estimate_normals
from bifusion_diag.data.pseudo_labels import pseudo_labels
from bifusion_diag.data.rgbd_files import read_color, read_depth, read_ids, read_pose, read_superpoints
from bifusion_diag.data.rgbd_layouts import Frame, find_layout, with_masks, with_superpoints
from bifusion_diag.data.rgbd_survey import survey
from bifusion_diag.data.scannet_labels import scannet_classes, scannet_instances
from bifusion_diag.data.scene import Scene
from bifusion_diag.data.scene_cache import SceneCache
from bifusion_diag.data.superpoints import vccs
from bifusion_diag.errors import UserError

PSEUDO_LABELS = "geometric pseudo-labels"
SCANNET_LABELS = "ScanNet export"
_MARGIN = 2  # points kept for each point that a crop may keep, so that crops differ from epoch to epoch


class _Cloud(NamedTuple):
    """N points of a scene's F frames, in the frame of reference of the scene's world."""

    xyz: np.ndarray  # (N, 3) [m]
    frame: np.ndarray  # (N,) 0..F-1
    row: np.ndarray  # (N,) the pixel that a point is from
    column: np.ndarray
    camera: np.ndarray  # (F, 3) positions of the cameras [m]
    up: np.ndarray  # (F, 3) upwards in their images


class RGBDFolder:
    """Frames of a folder, in the layout of 7-Scenes or of a ScanNet export.

    A scene is made of ``point_views`` consecutive frames (of ``views``, if that is more); the images are ``views`` of
    them, evenly spread. Images have the size of the depth images: colour of another size is resized to it, and the
    depth camera's intrinsics are used for both. The last scene reaches back where the frames do not divide evenly.

    Flawed frames are kept, noted in the scene and counted, as training code in the wild is fed such frames. A frame
    with a non-finite pose gives images but no points, which would have no place in the world; only where none of a
    scene's frames has a pose, the first one with depth gives points, in its own camera's frame. In ``Scene.pose``
    the pose stays non-finite. A scene without any depth has no points.

    Labels come from ``label-filt/`` and ``instance-filt/`` where these exist, else from
    :mod:`bifusion_diag.data.pseudo_labels`, which rest on VCCS whatever superpoints the scenes have.

    Superpoints are those of VCCS (``superpoints: vccs``); those relabelled by 2D masks (``masks``): of a folder with an
    8- or 16-bit ``<frame name>.png`` for every frame, 0 = no mask, or of the colour images' graph-based segmentation;
    or given ones (``files``): ``superpoints/<frame name>.png`` (0 = none) or ``.npy`` (negative = none) in the folder
    of the frames. Given ids hold for the whole folder, so a superpoint may reach from frame to frame; ids of masks hold
    in their own frame. Pictures of ids may have any size that shows the whole frame: the nearest pixel counts.
    """

    def __init__(self, path: Path | str, settings: DataSettings) -> None:
        """Reads every file once.

        Raises:
            UserError: names the file that is missing, damaged or contradicts the others, and what to do.
        """
        self._path, self._settings = Path(path), settings
        self._layout = find_layout(self._path)
        if settings.superpoints == "files":
            self._layout = with_superpoints(self._layout, self._path)
        elif settings.superpoints == "masks" and settings.masks != GRAPH:
            self._layout = with_masks(self._layout, Path(settings.masks))
        self._survey = survey(self._layout)
        self._span = max(settings.views, settings.point_views)
        if self._span > len(self._layout.frames):
            raise UserError(
                f"{path}: {len(self._layout.frames)} frames, but a scene takes {self._span} "
                f"(data.views = {settings.views}, data.point_views = {settings.point_views}); lower these or add frames"
            )
        self._cache = SceneCache(self._build)

    def __len__(self) -> int:
        """Number of scenes."""
        return -(-len(self._layout.frames) // self._span)

    def __getitem__(self, index: int) -> Scene:
        """Scene `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        return self._cache[index]

    def names(self) -> list[str]:
        """The name of every scene: that of its frame, or of the first and the last one."""
        return [self._name(self.frames(index)) for index in range(len(self))]

    def describe(self) -> dict[str, Any]:
        """For the run record: layout, counts of frames and of marked frames, and where the labels come from."""
        pseudo = self._layout.frames[0].label is None
        return {
            "kind": "rgbd",
            "layout": self._layout.kind,
            "folder": str(self._path),
            "frames": len(self._layout.frames),
            "scenes": len(self),
            "frames_per_scene": self._span,
            "image_size": list(self._survey.size),
            "labels": f"{PSEUDO_LABELS} (no ground truth)" if pseudo else SCANNET_LABELS,
            **({"labels_rest_on": describe_clusters(self._settings)} if pseudo else {}),
            "superpoints": describe_superpoints(self._settings),
            "marked": {
                "non-finite pose": int((~self._survey.tracked).sum()),
                "no depth": int((~self._survey.sensed).sum()),
            },
        }

    def frames(self, index: int) -> range:
        """Numbers of the frames that scene `index` is made of. Only the last two scenes may have frames in common."""
        first = min(index * self._span, len(self._layout.frames) - self._span)
        return range(first, first + self._span)

    def _name(self, frames: range) -> str:
        first, last = (self._layout.frames[frame].name for frame in (frames[0], frames[-1]))
        return first if len(frames) == 1 else f"{first}..{last}"

    def _build(self, index: int) -> Scene:
        first = self.frames(index).start
        frames = self._layout.frames[first : first + self._span]
        color = np.stack([read_color(frame.color, self._survey.size) for frame in frames])
        depth = np.stack([read_depth(frame.depth) for frame in frames])
        pose = np.stack([read_pose(frame.pose) for frame in frames])
        placed, notes = self._place(first, pose)
        cloud = self._unproject(depth, placed, np.random.default_rng(index))
        rgb = color[cloud.frame, cloud.row, cloud.column].astype(np.float32)
        normals = estimate_normals(cloud.xyz, cloud.camera[cloud.frame])
        clusters = vccs(
            cloud.xyz,
            rgb,
            normals,
            voxel_size=self._settings.superpoint_voxel,
            seed_size=self._settings.superpoint_size,
        )
        semantic, instance = self._labels(first, cloud, normals, clusters)
        superpoint = self._superpoints(frames, color, cloud, clusters)
        seen = ((np.arange(self._settings.views) + 0.5) * self._span / self._settings.views).astype(int)
        return Scene(
            name=self._name(self.frames(index)),
            points=np.concatenate([cloud.xyz, rgb], axis=1).astype(np.float32),
            images=np.ascontiguousarray(color[seen].transpose(0, 3, 1, 2)),
            depth=depth[seen],
            intrinsics=np.tile(self._survey.intrinsics.astype(np.float32), (len(seen), 1, 1)),
            pose=pose[seen].astype(np.float32),
            semantic=semantic,
            instance=instance,
            superpoint=superpoint,
            labels=PSEUDO_LABELS if frames[0].label is None else SCANNET_LABELS,
            notes=notes,
        ).validate()

    def _place(self, first: int, pose: np.ndarray) -> tuple[dict[int, np.ndarray], tuple[str, ...]]:
        """The pose to place the points of each frame with, by its number in the scene, and what is flawed."""
        span = range(len(pose))
        names = [frame.name for frame in self._layout.frames[first : first + len(pose)]]
        tracked, sensed = (facts[first : first + len(pose)] for facts in (self._survey.tracked, self._survey.sensed))
        placed = {i: pose[i] for i in span if tracked[i] and sensed[i]}
        if not tracked.any() and sensed.any():
            placed = {int(np.argmax(sensed)): np.eye(4)}
        notes = []
        for i in span:
            if not tracked[i]:
                fate = "its points are in its camera's frame" if i in placed else "its points are left out"
                notes.append(f"non-finite pose in {names[i]}: {fate}")
            if not sensed[i]:
                notes.append(f"no depth reading in {names[i]}")
        return placed, tuple(notes)

    def _unproject(self, depth: np.ndarray, placed: dict[int, np.ndarray], rng: np.random.Generator) -> _Cloud:
        """A random part of the depth readings of the placed frames, in the world."""
        readings = depth > 0
        readings[[i for i in range(len(depth)) if i not in placed]] = False
        pixels = np.flatnonzero(readings)
        limit = _MARGIN * self._settings.max_points
        if len(pixels) > limit:
            pixels = np.sort(rng.choice(pixels, limit, replace=False))
        frame, row, column = np.unravel_index(pixels, depth.shape)
        poses = np.tile(np.eye(4), (len(depth), 1, 1))
        for i, pose in placed.items():
            poses[i] = pose
        pixel = np.stack([column, row, np.ones(len(pixels))], axis=1)
        camera_xyz = pixel @ np.linalg.inv(self._survey.intrinsics).T * depth[frame, row, column][:, None]
        xyz = np.einsum("nij,nj->ni", poses[frame, :3, :3], camera_xyz) + poses[frame, :3, 3]
        up = -poses[:, :3, 1]  # cameras look along z with y downwards
        return _Cloud(xyz.astype(np.float32), frame, row, column, poses[:, :3, 3], up)

    def _labels(
        self, first: int, cloud: _Cloud, normals: np.ndarray, superpoint: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Semantic and instance ids (N,), from the files or from geometry."""
        frames = self._layout.frames[first : first + self._span]
        if frames[0].label is None:
            used = np.unique(cloud.frame)
            if len(used) == 0:
                return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
            up, viewpoint = cloud.up[used].mean(axis=0), cloud.camera[used].mean(axis=0)
            labels = pseudo_labels(cloud.xyz, normals, superpoint, up_hint=up, viewpoint=viewpoint)
            return labels.semantic, labels.instance
        semantic = scannet_classes(self._at_pixels([read_ids(_given(frame.label)) for frame in frames], cloud))
        instance = self._at_pixels([read_ids(_given(frame.instance)) for frame in frames], cloud)
        return semantic, scannet_instances(instance, semantic)

    def _superpoints(
        self, frames: Sequence[Frame], color: np.ndarray, cloud: _Cloud, clusters: np.ndarray
    ) -> np.ndarray:
        """The superpoints (N,) that the settings ask for, from those of VCCS."""
        settings = self._settings
        if settings.superpoints == "vccs":
            return clusters
        if settings.superpoints == "files":
            ids = self._at_pixels([read_superpoints(_given(frame.superpoint)) for frame in frames], cloud)
            return replace_by_ids(clusters, ids)
        if settings.masks == GRAPH:
            masks = [graph_masks(image, settings.graph_masks) for image in color]
        else:
            masks = [read_ids(_given(frame.mask)) for frame in frames]
        return relabel_by_masks(
            clusters,
            cloud.xyz,
            self._at_pixels(masks, cloud),
            cloud.frame,
            voxel_size=settings.superpoint_voxel,
            seed_size=settings.superpoint_size,
        )

    def _at_pixels(self, pictures: Sequence[np.ndarray], cloud: _Cloud) -> np.ndarray:
        width, height = self._survey.size
        return ids_at_pixels(pictures, cloud.frame, cloud.row, cloud.column, height=height, width=width)


def _given(path: Path | None) -> Path:
    assert path is not None, "a file of some frames only"
    return path
