"""How long superpoints take and how large they are.

    python -m benchmarks.superpoints [--frames FOLDER] [--json out.json]

VCCS at 200 000 and 1 000 000 points of a synthetic room and, if a folder is given, of real RGB-D frames; then the same
points relabelled by graph-based masks, where the time of the relabelling alone is printed. Normals are given, as the
sources give them. Seconds are wall time, the least of three runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bifusion_diag.config.settings import DataSettings, GraphMaskSettings
from bifusion_diag.data.mask_superpoints import relabel_by_masks
from bifusion_diag.data.masks import graph_masks
from bifusion_diag.data.normals import estimate_normals
from bifusion_diag.data.rgbd import RGBDFolder
from bifusion_diag.data.scene import Scene
from bifusion_diag.data.superpoints import vccs
from bifusion_diag.data.synthetic import SyntheticRooms
from bifusion_diag.data.voxel_graph import build_voxel_graph

SIZES = (200_000, 1_000_000)
HEIGHT, WIDTH = 480, 640
RUNS = 3


@dataclass(frozen=True)
class Measurement:
    """One cloud. Extents are a superpoint's longest side [m]; the median is that of the median point's superpoint."""

    points: str
    count: int
    voxels: int
    method: str
    seconds: float
    superpoints: int
    median_extent: float
    largest_extent: float


def clouds(frames: Path | None) -> dict[str, Callable[[int], Scene]]:
    """Scenes of about as many points as asked for, by where they are from."""

    def room(count: int) -> Scene:
        views = -(-count // 200_000)
        size = {"image_height": HEIGHT, "image_width": WIDTH}
        return SyntheticRooms(DataSettings(**size, max_points=count, views=views, point_views=views), 0)[0]

    def real(count: int) -> Scene:
        assert frames is not None
        views = -(-count // 200_000)
        return RGBDFolder(frames, DataSettings(max_points=count, views=views, point_views=views))[0]

    return {"synthetic room": room, "real frames": real} if frames else {"synthetic room": room}


def measure(name: str, scene: Scene, count: int, options: DataSettings) -> list[Measurement]:
    """VCCS of `count` random points of a scene, and its relabelling."""
    keep = np.random.default_rng(0).permutation(len(scene))[:count]
    xyz, rgb = scene.points[keep, :3], scene.points[keep, 3:]
    normals = estimate_normals(xyz, scene.pose[0, :3, 3])
    sizes = {"voxel_size": options.superpoint_voxel, "seed_size": options.superpoint_size}
    voxels = build_voxel_graph(xyz, options.superpoint_voxel).size
    seconds, clusters = timed(lambda: vccs(xyz, rgb, normals, **sizes))
    mask, frame = masks_of(scene, xyz, options.graph_masks)
    more, relabelled = timed(lambda: relabel_by_masks(clusters, xyz, mask, frame, **sizes))
    found = (("vccs", seconds, clusters), ("masks", more, relabelled))
    return [
        Measurement(name, len(xyz), voxels, method, spent, int(label.max()) + 1, *extents(xyz, label))
        for method, spent, label in found
    ]


def masks_of(scene: Scene, xyz: np.ndarray, settings: GraphMaskSettings) -> tuple[np.ndarray, np.ndarray]:
    """(N,), (N,): mask and frame of each point, from the view whose depth it fits best."""
    best = np.full(len(xyz), np.inf)
    mask, frame = np.zeros((2, len(xyz)), dtype=np.int64)
    for view in range(len(scene.pose)):
        segments = graph_masks(scene.images[view].transpose(1, 2, 0), settings)
        camera = (xyz - scene.pose[view, :3, 3]) @ scene.pose[view, :3, :3]
        z = np.where(camera[:, 2] > 0, camera[:, 2], np.inf)
        u, v = np.round(camera @ scene.intrinsics[view].T / z[:, None]).astype(int)[:, :2].T
        inside = np.isfinite(z) & (u >= 0) & (u < segments.shape[1]) & (v >= 0) & (v < segments.shape[0])
        error = np.full(len(xyz), np.inf)
        error[inside] = np.abs(scene.depth[view][v[inside], u[inside]] - z[inside])
        nearer = error < best
        best[nearer], frame[nearer], mask[nearer] = error[nearer], view, segments[v[nearer], u[nearer]]
    return mask, frame


def timed(make: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """Least seconds of some runs, and what they return."""
    seconds, result = np.inf, np.zeros(0)
    for _ in range(RUNS):
        began = time.perf_counter()
        result = make()
        seconds = min(seconds, time.perf_counter() - began)
    return seconds, result


def extents(xyz: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """Longest side [m] of the median point's superpoint, and of the largest one."""
    order = np.argsort(label, kind="stable")
    first = np.searchsorted(label[order], np.arange(label.max() + 1))
    sides = np.maximum.reduceat(xyz[order], first) - np.minimum.reduceat(xyz[order], first)
    longest = sides.max(axis=1)
    return float(np.median(longest[label])), float(longest.max())


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    options = DataSettings()
    results = []
    print(f"seeds {options.superpoint_size} m, voxels {options.superpoint_voxel} m")
    print("cloud              points  voxels  method  seconds  superpoints  median extent [m]  largest [m]")
    for name, cloud in clouds(arguments.frames).items():
        for count in SIZES:
            for row in measure(name, cloud(count), count, options):
                results.append(row)
                print(
                    f"{row.points:<15}{row.count:>10}{row.voxels:>8}  {row.method:<6}{row.seconds:>9.2f}"
                    f"{row.superpoints:>13}{row.median_extent:>19.2f}{row.largest_extent:>13.2f}",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in results]))


if __name__ == "__main__":
    main()
