"""The built-in sparse engine beside MinkowskiEngine: process CPU time of the whole U-Net, kernel maps included.

    python -m benchmarks.sparse_engine --frames FOLDER      real RGB-D frames
    python -m benchmarks.sparse_engine --frames synthetic   random points on the walls of a room

Both engines run the same weights on the same points in alternation, so that a change of the machine's load meets both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bifusion_diag.config.settings import BackboneSettings
from bifusion_diag.data.geometry import unproject_depth
from bifusion_diag.data.rgbd_files import read_depth, read_intrinsics, read_pose
from bifusion_diag.data.rgbd_layouts import find_layout
from bifusion_diag.errors import UserError
from bifusion_diag.model.sparse import make_engine, voxelize
from bifusion_diag.model.unet import Res16UNet

ENGINES = ("native", "minkowski")
NETWORKS = {
    "18a": BackboneSettings(),
    "34c": BackboneSettings(layers=(2, 3, 4, 6, 2, 2, 2, 2), planes=(32, 64, 128, 256, 256, 128, 96, 96)),
}
POINTS_PER_SYNTHETIC_FRAME = 250_000


@dataclass(frozen=True)
class Measurement:
    """One size of input. Seconds are medians over the pairs; ratios are medians of native / minkowski of each pair."""

    voxel_size: float
    frames: int
    voxels: int
    forward_seconds: dict[str, float]
    total_seconds: dict[str, float]
    forward_ratio: float
    total_ratio: float


def frame_points(folder: Path, count: int) -> Tensor:
    """(N, 3) [m] world coordinates of every depth reading of frames spread evenly over the folder."""
    layout = find_layout(folder)
    if len(layout.frames) < count:
        raise UserError(f"{folder} has {len(layout.frames)} frames; {count} are needed")
    points = []
    for frame in layout.frames[:: len(layout.frames) // count][:count]:
        depth = read_depth(frame.depth)
        intrinsics = read_intrinsics(layout.intrinsics, (depth.shape[1], depth.shape[0]))
        arrays = (array.astype(np.float32)[None] for array in (depth, intrinsics, read_pose(frame.pose)))
        world = unproject_depth(*(torch.from_numpy(array) for array in arrays))[0]
        points.append(world[torch.from_numpy(depth > 0)])
    return torch.cat(points)


def synthetic_points(count: int) -> Tensor:
    """(N, 3) [m] points on a floor and two walls, a stretch of 2.5 m for each frame."""
    generator = torch.Generator().manual_seed(0)
    number = count * POINTS_PER_SYNTHETIC_FRAME
    points = torch.rand(number, 3, generator=generator) * torch.tensor([2.5 * count, 2.5, 2.0])
    plane = torch.randint(0, 3, (number,), generator=generator)
    points[plane == 0, 2] = 0.0
    points[plane == 1, 1] = 0.0
    points[plane == 2, 1] = 2.5
    return points + 0.004 * torch.randn(number, 3, generator=generator)


def timed(net: Res16UNet, points: Tensor, feats: Tensor, scene: Tensor) -> tuple[float, float]:
    """CPU seconds of a forward pass, and of forward and backward."""
    net.zero_grad()
    start = time.process_time()
    voxels = net.voxelize(points, feats, scene)
    out = voxels.slice(net(voxels.tensor))
    middle = time.process_time()
    out.backward(torch.full_like(out, 1e-3))
    return middle - start, time.process_time() - start


def measure(settings: BackboneSettings, points: Tensor, frames: int, pairs: int) -> Measurement:
    """Alternate the engines on one input."""
    nets = {name: Res16UNet(settings, engine=make_engine(name)) for name in ENGINES}
    nets["minkowski"].load_state_dict(nets["native"].state_dict())
    feats = torch.randn(len(points), 3, generator=torch.Generator().manual_seed(1))
    scene = torch.zeros(len(points), dtype=torch.long)
    voxels = len(voxelize(points, feats, scene, settings.voxel_size, make_engine()).tensor.feats)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ENGINES}
    for pair in range(pairs + 1):  # the first warms up
        for name in ENGINES if pair % 2 else reversed(ENGINES):
            seconds[name].append(timed(nets[name], points, feats, scene))
    forward, total = ({name: [run[part] for run in seconds[name][1:]] for name in ENGINES} for part in (0, 1))
    return Measurement(
        settings.voxel_size,
        frames,
        voxels,
        {name: statistics.median(runs) for name, runs in forward.items()},
        {name: statistics.median(runs) for name, runs in total.items()},
        statistics.median(ours / theirs for ours, theirs in zip(*forward.values(), strict=True)),
        statistics.median(ours / theirs for ours, theirs in zip(*total.values(), strict=True)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", default="synthetic", help="folder of RGB-D frames, or 'synthetic'")
    parser.add_argument("--network", choices=sorted(NETWORKS), default="18a")
    parser.add_argument("--voxels", type=float, nargs="+", default=[0.05, 0.02], help="voxel sizes [m]")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4], help="frames per input")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of runs per size")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    options = parser.parse_args()
    measurements = []
    print("voxel  frames  voxels   forward [s]  ratio   forward + backward [s]  ratio   (native; ratio to minkowski)")
    for size in options.voxels:
        for count in options.counts:
            points = (
                synthetic_points(count) if options.frames == "synthetic" else frame_points(Path(options.frames), count)
            )
            settings = NETWORKS[options.network].model_copy(update={"voxel_size": size})
            found = measure(settings, points, count, options.pairs)
            measurements.append(found)
            print(
                f"{size:5.2f}  {count:6d}  {found.voxels:6d}  {found.forward_seconds['native']:12.3f}  "
                f"{found.forward_ratio:5.2f}  {found.total_seconds['native']:23.3f}  {found.total_ratio:5.2f}",
                flush=True,
            )
    if options.json:
        report = {
            "frames": options.frames if options.frames == "synthetic" else Path(options.frames).name,
            "network": options.network,
            "threads": torch.get_num_threads(),
            "engines": {name: make_engine(name).version for name in ENGINES},
            "measurements": [asdict(found) for found in measurements],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
