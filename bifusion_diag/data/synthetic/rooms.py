"""The source of synthetic scenes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bifusion_diag.config.settings import DataSettings
from bifusion_diag.data.batch import contiguous
from bifusion_diag.data.geometry import unproject_depth
from bifusion_diag.data.mask_superpoints import relabel_by_masks
from bifusion_diag.data.masks import GRAPH, describe_superpoints, graph_masks
from bifusion_diag.data.scannet200 import STUFF_CLASSES, class_id
from bifusion_diag.data.scene import Scene
from bifusion_diag.data.scene_cache import SceneCache
from bifusion_diag.data.superpoints import vccs
from bifusion_diag.data.synthetic.camera import intrinsics, sense_depth, walk
from bifusion_diag.data.synthetic.flaws import apply_flaws, drawn_flaws
from bifusion_diag.data.synthetic.raycast import pixel_rays
from bifusion_diag.data.synthetic.render import render
from bifusion_diag.data.synthetic.room import Room, furnish
from bifusion_diag.data.synthetic.solids import Solid
from bifusion_diag.errors import UserError

Array = NDArray[Any]

LABELS = "ground truth (synthetic)"
#: A scene has at most so many times ``max_points`` points, so that every visit can draw others of them.
POINTS_FACTOR = 2

# Random streams of one (seed, index) are kept apart by a number of their own.
_ROOM, _CAMERA, _SENSOR, _POINTS, _FLAWS = range(5)


@dataclass(frozen=True)
class _View:
    """One captured view: images for the model, and per pixel what its points will need."""

    color: Array  # (H, W, 3) uint8
    depth: Array  # (H, W) float32 [m], 0 = no reading
    normal: Array  # (H, W, 3) float32
    thing: Array  # (H, W) int64, −1 = nothing


class SyntheticRooms:
    """Procedural indoor rooms with exact labels: a :class:`~bifusion_diag.data.source.SceneSource`.

    A scene is a pure function of (seed, index) and the settings, whatever was asked for before.
    """

    def __init__(self, settings: DataSettings, seed: int) -> None:
        """Builds no room yet.

        Raises:
            UserError: superpoints or masks are to come from files, which rendered images have none of.
        """
        if settings.superpoints == "files":
            raise UserError(
                "data.superpoints 'files': synthetic rooms have no files. Use 'vccs' or 'masks', or set data.source to "
                "a folder of RGB-D frames"
            )
        if settings.superpoints == "masks" and settings.masks != GRAPH:
            raise UserError(
                f"data.masks '{settings.masks}': synthetic rooms have no mask files. Use '{GRAPH}', or set data.source "
                "to a folder of RGB-D frames"
            )
        self.settings = settings
        self.seed = seed
        self._cache = SceneCache(self._build)

    def __len__(self) -> int:
        return self.settings.scenes

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)} synthetic rooms")
        return self._cache[index]

    def names(self) -> list[str]:
        """The name of every scene, none of them built."""
        return [self._name(index) for index in range(len(self))]

    def _name(self, index: int) -> str:
        return f"synthetic-{index:06d}(seed {self.seed})"

    def _build(self, index: int) -> Scene:
        scene = self._capture(index)
        return apply_flaws(scene, self.settings.flaws, partial(self._rng, index, _FLAWS)).validate()

    def describe(self) -> dict[str, Any]:
        """Kind, labels, size and flaws; how many scenes have each flaw is counted without building them."""
        hits = Counter(
            name
            for index in range(len(self))
            for name in drawn_flaws(self.settings.flaws, partial(self._rng, index, _FLAWS))
        )
        chances = {name: chance for name, chance in self.settings.flaws.model_dump().items() if chance > 0}
        return {
            "kind": "synthetic rooms",
            "labels": LABELS,
            "scenes": len(self),
            "seed": self.seed,
            "views": self.settings.views,
            "point_views": self.settings.point_views,
            "superpoints": describe_superpoints(self.settings),
            "flaw_chances": chances,
            "flawed_scenes": {name: hits[name] for name in chances},
        }

    def room(self, index: int) -> Room:
        """The room of a scene, before any camera has seen it."""
        return furnish(self._rng(index, _ROOM))

    def _rng(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *stream])

    def _capture(self, index: int) -> Scene:
        """Walk through a room with a camera and make points of what its depth sensor reads."""
        options = self.settings
        room = self.room(index)
        count = max(options.views, options.point_views)
        poses = walk(room, count, self._rng(index, _CAMERA))
        views = [self._view(room, pose, self._rng(index, _SENSOR, number)) for number, pose in enumerate(poses)]
        shown = _evenly(count, options.views)
        used = _evenly(count, options.point_views)
        points, normals, thing, pixel = self._points(views, poses, used, index)
        superpoint = self._superpoints([views[k] for k in used], points, normals, pixel)
        semantic = np.array([class_id(item.name) for item in room.things], np.int64)[thing]
        K = intrinsics(options.image_height, options.image_width)
        return Scene(
            name=self._name(index),
            points=points,
            images=np.stack([views[k].color.transpose(2, 0, 1) for k in shown]),
            depth=np.stack([views[k].depth for k in shown]),
            intrinsics=np.repeat(K[None], len(shown), axis=0),
            pose=poses[shown],
            semantic=semantic,
            instance=contiguous(np.where(np.isin(semantic, STUFF_CLASSES), -1, thing)),
            superpoint=superpoint,
            labels=LABELS,
        )

    def _view(self, room: Room, pose: Array, rng: np.random.Generator) -> _View:
        height, width = self.settings.image_height, self.settings.image_width
        K = intrinsics(height, width)
        solids: list[Solid] = [solid for thing in room.things for solid in thing.solids]
        owner = np.array([number for number, thing in enumerate(room.things) for _ in thing.solids])
        drawn = render(solids, room.light, pose, K, height, width)
        exposure = rng.uniform(0.9, 1.1)
        noisy = drawn.color * exposure + rng.normal(0, 0.012, drawn.color.shape)
        color = np.round(np.clip(noisy, 0, 1) * 255).astype(np.uint8)
        depth = sense_depth(drawn, pose, pixel_rays(K, height, width), rng)
        return _View(color, depth, drawn.normal, np.where(drawn.solid >= 0, owner[drawn.solid], -1))

    def _superpoints(self, chosen: list[_View], points: Array, normals: Array, pixel: Array) -> Array:
        """The superpoints (N,) that the settings ask for; ``pixel`` (N,) counts through all pixels of the views."""
        options = self.settings
        sizes = {"voxel_size": options.superpoint_voxel, "seed_size": options.superpoint_size}
        clusters = vccs(points[:, :3], points[:, 3:], normals, **sizes)
        if options.superpoints == "vccs":
            return clusters
        masks = np.stack([graph_masks(view.color, options.graph_masks) for view in chosen])
        return relabel_by_masks(clusters, points[:, :3], masks.reshape(-1)[pixel], pixel // masks[0].size, **sizes)

    def _points(self, views: list[_View], poses: Array, used: Array, index: int) -> tuple[Array, Array, Array, Array]:
        """Points (N, 6) float32, their normals (N, 3), things (N,), pixels (N,): readings of the views ``used``."""
        chosen = [views[k] for k in used]
        depth = torch.from_numpy(np.stack([view.depth for view in chosen]))
        K = torch.from_numpy(intrinsics(*depth.shape[1:]))
        xyz = unproject_depth(depth, K.expand(len(used), 3, 3), torch.from_numpy(poses[used])).numpy()
        read = depth.numpy() > 0
        keep = np.flatnonzero(read)
        limit = POINTS_FACTOR * self.settings.max_points
        if len(keep) > limit:
            keep = np.sort(self._rng(index, _POINTS).choice(keep, limit, replace=False, shuffle=False))
        color = np.stack([view.color for view in chosen]).reshape(-1, 3)[keep].astype(np.float32)
        points = np.concatenate([xyz.reshape(-1, 3)[keep], color], axis=1)
        normals = np.stack([view.normal for view in chosen]).reshape(-1, 3)[keep]
        return points, normals, np.stack([view.thing for view in chosen]).reshape(-1)[keep], keep


def _evenly(count: int, chosen: int) -> NDArray[np.int64]:
    """``chosen`` of 0..count−1, evenly spread."""
    return ((np.arange(chosen) + 0.5) * count / chosen).astype(np.int64)
