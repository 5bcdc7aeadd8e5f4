"""Large scenes: memory and time of the U-Net, and what a whole training step of BiFusion holds for its backward pass.

    python -m benchmarks.scale                       everything
    python -m benchmarks.scale --parts scenes slope  some of it

scenes      One scene of 1 M points, and a batch of 8 crops of 128³ voxels (6.4 m at 5 cm), forward and backward, each
            in a fresh process: peak of the whole process' resident memory, against 20 GiB.
slope       Time of forward and backward against the number of points, at one density of points; the slope on a log-log
            grid, 1 being linear.
training    The documents' claim "24 GB, one GPU, batch 8 crops": bytes of parameters, gradients, AdamW's moments, and
            of what autograd saves for the backward pass of the whole model at full scale, every storage counted once.
            Kernel maps and what is needed for a moment are not among them; the peak on a CPU holds them, too.

The scenes are floor, walls and boxes drawn at random; occupancy is the share of their bounding box that holds voxels.
Rooms are 3 m high: what a crop holds lies in the lower half of its 6.4 m.
The training crops are those of the synthetic source, with as many points as the preset's settings say.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.inputs import joined, room_points
from benchmarks.process import fresh, peak
from benchmarks.sparse_engine import NETWORKS
from bifusion_diag.config import load_settings
from bifusion_diag.data import BatchLoader, open_source
from bifusion_diag.errors import UserError
from bifusion_diag.model.build import build_model
from bifusion_diag.model.sparse import make_engine
from bifusion_diag.model.unet import Res16UNet

GIB = 2**30
LIMIT_GIB = 20
CROP = (6.4, 6.4, 3.0)  # [m]
POINTS_PER_CROP = 250_000
POINTS_PER_SQUARE_METRE = 1600  # some 3 points in a voxel of 5 cm
ROOM_HEIGHT = 3.0  # [m]
SURFACE_PER_FLOOR = 2.57  # [m² / m²] of the floor and the boxes on it, without walls
# name: network, voxel size [m], scenes of how many points, room [m]
SCENES: dict[str, tuple[str, float, list[int], tuple[float, float, float]]] = {
    "1 M points, 18A, 5 cm": ("18a", 0.05, [1_000_000], (12.0, 12.0, 3.0)),
    "8 crops of 128³, 18A, 5 cm": ("18a", 0.05, [POINTS_PER_CROP] * 8, CROP),
    "1 M points, 34C, 2 cm": ("34c", 0.02, [1_000_000], (12.0, 12.0, 3.0)),
}
SLOPE_POINTS = [31_250, 62_500, 125_000, 250_000, 500_000, 1_000_000]


def unet_step(network: str, voxel_size: float, points: Tensor, scene: Tensor) -> dict[str, Any]:
    """Forward and backward from points to points: CPU seconds, wall seconds, voxels."""
    torch.manual_seed(0)
    settings = NETWORKS[network].model_copy(update={"voxel_size": voxel_size})
    net = Res16UNet(settings, engine=make_engine("native"))
    feats = torch.randn(len(points), 3)
    cpu, wall = time.process_time(), time.perf_counter()
    voxels = net.voxelize(points, feats, scene)
    out = voxels.slice(net(voxels.tensor))
    out.backward(torch.full_like(out, 1e-3))
    seconds = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
    if not all(bool(torch.isfinite(p.grad).all()) for p in net.parameters() if p.grad is not None):
        raise SystemExit("a gradient is not finite")
    return {"points": len(points), "voxels": len(voxels.tensor.feats), **seconds}


def scene_step(name: str) -> dict[str, Any]:
    """One of :data:`SCENES`, with the peak memory of this process."""
    network, voxel_size, counts, size = SCENES[name]
    scenes = [room_points(count, size, torch.Generator().manual_seed(i)) for i, count in enumerate(counts)]
    points, scene = joined(scenes)
    found = unet_step(network, voxel_size, points, scene)
    cells = 1.0
    for low, high in zip(points.amin(0).tolist(), points.amax(0).tolist(), strict=True):
        cells *= (high - low) / voxel_size
    return {**found, "occupancy": found["voxels"] / (cells * len(counts)), "peak_gib": peak() / GIB}


def room_of(count: int) -> Tensor:
    """(count, 3) [m] points of a square room of that size, at one density: smaller rooms have more walls a floor."""
    surface, walls = count / POINTS_PER_SQUARE_METRE, 4 * ROOM_HEIGHT  # of side s: SURFACE_PER_FLOOR · s² + walls · s
    side = ((walls**2 + 4 * SURFACE_PER_FLOOR * surface) ** 0.5 - walls) / (2 * SURFACE_PER_FLOOR)
    return room_points(count, (side, side, ROOM_HEIGHT), torch.Generator().manual_seed(count))


def slope(counts: list[int]) -> dict[str, Any]:
    """Time against points at one density: the least-squares slope of log time on log points."""
    runs: list[dict[str, Any]] = []
    for count in counts:
        points = room_of(count)
        scene = torch.zeros(count, dtype=torch.long)
        if not runs:
            unet_step("18a", 0.05, points, scene)  # warms up
        runs.append(unet_step("18a", 0.05, points, scene))
    seconds, points_, voxels = (np.log([run[key] for run in runs]) for key in ("cpu_seconds", "points", "voxels"))
    by_points, by_voxels = (float(np.polyfit(x, seconds, 1)[0]) for x in (points_, voxels))
    return {"runs": runs, "slope_in_points": by_points, "slope_in_voxels": by_voxels}


def saved_for_backward(preset: str, batch_size: int) -> dict[str, Any]:
    """A training step of a whole model at full scale without the optimiser's update: bytes it holds."""
    torch.manual_seed(0)
    settings = load_settings(preset)
    model = build_model(settings).train()
    loader = BatchLoader(open_source(settings.data, seed=0), settings.data, batch_size=batch_size, seed=0)
    batch = loader.batch(0)
    model.set_progress(0, 1)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    learning = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(batch).loss.total
    activations = sum(storages.values())
    loss.backward()
    return {
        "batch": batch_size,
        "points": len(batch.coords),
        "parameter_bytes": weights,
        "gradient_bytes": learning,
        "moment_bytes": 2 * learning,
        "activation_bytes": activations,
        "peak_gib": peak() / GIB,
    }


def total_bytes(found: dict[str, Any]) -> int:
    """What a training step has to hold at once."""
    return int(sum(found[f"{part}_bytes"] for part in ("parameter", "gradient", "moment", "activation")))


def report_scenes(names: list[str]) -> dict[str, Any]:
    print(f"{'scene':<28}{'points':>9}{'voxels':>9}{'occupancy':>11}{'CPU [s]':>9}{'wall [s]':>9}{'peak [GiB]':>12}")
    results = {}
    for name in names:
        found = results[name] = fresh("benchmarks.scale", ["--child-scene", name])
        verdict = "" if found["peak_gib"] <= LIMIT_GIB else f"  above {LIMIT_GIB} GiB!"
        print(
            f"{name:<28}{found['points']:>9}{found['voxels']:>9}{found['occupancy']:>11.2%}"
            f"{found['cpu_seconds']:>9.1f}{found['wall_seconds']:>9.1f}{found['peak_gib']:>12.2f}{verdict}",
            flush=True,
        )
    return results


def report_slope(largest: int) -> dict[str, Any]:
    found = slope([count for count in SLOPE_POINTS if count <= largest])
    print(f"\n{'points':>9}{'voxels':>9}{'CPU [s]':>9}")
    for run in found["runs"]:
        print(f"{run['points']:>9}{run['voxels']:>9}{run['cpu_seconds']:>9.2f}")
    print(f"slope: {found['slope_in_points']:.2f} in points, {found['slope_in_voxels']:.2f} in voxels (1 is linear)")
    return found


def report_training(preset: str, batches: list[int]) -> dict[str, Any]:
    runs = [fresh("benchmarks.scale", ["--child-training", str(size), "--preset", preset]) for size in batches]
    print(f"\n{preset}: {'crops':>5}{'points':>9}{'activations [GiB]':>19}{'all [GiB]':>11}{'peak on a CPU [GiB]':>21}")
    for run in runs:
        print(
            f"{'':{len(preset) + 2}}{run['batch']:>5}{run['points']:>9}{run['activation_bytes'] / GIB:>19.2f}"
            f"{total_bytes(run) / GIB:>11.2f}{run['peak_gib']:>21.2f}"
        )
    result: dict[str, Any] = {"preset": preset, "runs": runs}
    if max(batches) < 8 and len(batches) > 1:
        sizes, activations = [run["batch"] for run in runs], [run["activation_bytes"] for run in runs]
        gain, base = np.polyfit(sizes, activations, 1)
        total = total_bytes(runs[0]) - runs[0]["activation_bytes"] + base + 8 * gain
        result["extrapolated_gib"] = float(total) / GIB
        print(f"8 crops, extrapolated linearly: {total / GIB:.2f} GiB (the documents: 24 GB = {24e9 / GIB:.2f} GiB)")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["scenes", "slope", "training"], default=None)
    parser.add_argument("--scenes", nargs="+", choices=list(SCENES), default=list(SCENES), metavar="NAME")
    parser.add_argument(
        "--largest", type=int, default=SLOPE_POINTS[-1], help="points of the largest scene of the slope"
    )
    parser.add_argument("--preset", default="bifusion")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 8], help="crops per batch")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--child-scene", choices=list(SCENES), help=argparse.SUPPRESS)
    parser.add_argument("--child-training", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child_scene:
        print(json.dumps(scene_step(options.child_scene)))
        return
    if options.child_training:
        print(json.dumps(saved_for_backward(options.preset, options.child_training)))
        return
    parts = options.parts or ["scenes", "slope", "training"]
    results: dict[str, Any] = {"threads": torch.get_num_threads()}
    if "scenes" in parts:
        results["scenes"] = report_scenes(options.scenes)
    if "slope" in parts:
        results["slope"] = report_slope(options.largest)
    if "training" in parts:
        results["training"] = report_training(options.preset, options.batches)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
