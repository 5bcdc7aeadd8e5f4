"""The built-in sparse engine beside MinkowskiEngine: the whole U-Net, forward and backward, kernel maps included.

    python -m benchmarks.sparse_engine --frames FOLDER      real RGB-D frames, one scene a frame
    python -m benchmarks.sparse_engine --frames synthetic   corners of a room

Both engines run the same weights on the same voxels in alternation, in one process, so that a change of the machine's
load meets both. Time is process CPU time; the ratio is the median over the pairs, with the 95 % interval of
that median (bootstrap). Memory is the peak of the resident memory above what it was before, in a fresh process for each
engine and size. The floor is the time of the arithmetic alone: the same FLOPs at the rate of this machine's matrix
product; a U-Net is that and everything else. Points → voxels and back are the same code for both and not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gemm import choose_openblas_kernels, openblas_rate, torch_rate
from benchmarks.inputs import frame_points, joined, synthetic_frames
from benchmarks.process import fresh, peak_growth
from bifusion_diag.config.settings import BackboneSettings
from bifusion_diag.errors import UserError
from bifusion_diag.model.sparse import Conv3d, ConvTranspose3d, SparseTensor, make_engine, voxelize
from bifusion_diag.model.unet import Res16UNet

ENGINES = ("native", "minkowski")
NETWORKS = {
    "18a": BackboneSettings(),
    "34c": BackboneSettings(layers=(2, 3, 4, 6, 2, 2, 2, 2), planes=(32, 64, 128, 256, 256, 128, 96, 96)),
}
TARGET_RATIO, TARGET_RATIO_2CM, TARGET_MEMORY = 1.0, 0.75, 1.25
STEPS_FOR_MEMORY = 2


@dataclass(frozen=True)
class Cell:
    """One size of input."""

    frames: str
    network: str
    voxel_size: float
    count: int

    def settings(self) -> BackboneSettings:
        return NETWORKS[self.network].model_copy(update={"voxel_size": self.voxel_size})

    def voxels(self) -> Tensor:
        """(M, 4) int64 (scene, x, y, z), as voxelisation leaves them: in lexicographic order."""
        synthetic = self.frames == "synthetic"
        scenes = synthetic_frames(self.count) if synthetic else frame_points(Path(self.frames), self.count)
        points, scene = joined(scenes)
        ones, engine = torch.ones(len(points), 1), make_engine("native")
        return voxelize(points, ones, scene, self.voxel_size, engine).tensor.coords.long()


class Runner:
    """The U-Net on one engine, and a training step of it without an optimiser."""

    def __init__(self, engine: str, settings: BackboneSettings, cells: Tensor) -> None:
        torch.manual_seed(0)
        self.engine = make_engine(engine)
        self.net = Res16UNet(settings, engine=self.engine)
        self.cells = cells
        self.feats = torch.randn(len(cells), 3, generator=torch.Generator().manual_seed(2))
        self.grad = torch.full((len(cells), self.net.out_channels), 1e-3)

    def step(self) -> tuple[float, float]:
        """CPU seconds of a forward pass, and of forward and backward."""
        self.net.zero_grad()
        start = time.process_time()
        out = self.net(self._input()).feats
        middle = time.process_time()
        out.backward(self.grad)
        return middle - start, time.process_time() - start

    def _input(self) -> SparseTensor:
        """The voxels with nothing known about them yet."""
        return SparseTensor(self.feats, 1, self.engine.maps(self.cells))

    def flops(self) -> float:
        """Floating-point operations of the convolutions of a step: of pairs that exist, forward and both gradients."""
        total = 0.0

        def count(module: Any, args: tuple[SparseTensor], _out: SparseTensor) -> None:
            nonlocal total
            (x,) = args
            passes = 3 if x.feats.requires_grad else 2  # the colours of the points take no gradient
            total += passes * 2.0 * pairs_of(module, x) * module.in_channels * module.out_channels

        convolutions = [module for module in self.net.modules() if isinstance(module, Conv3d | ConvTranspose3d)]
        hooks = [module.register_forward_hook(count) for module in convolutions]
        self.net(self._input())
        for hook in hooks:
            hook.remove()
        return total


def pairs_of(module: Conv3d | ConvTranspose3d, x: SparseTensor) -> float:
    """Pairs of input and output voxels of a convolution: what ones under a kernel of ones add up to."""
    ones, kernel = x.feats.new_ones(len(x.feats), 1), x.feats.new_ones(module.kernel_size**3, 1, 1)
    if module.kernel_size == 1:
        return float(len(ones))
    with torch.no_grad():
        if isinstance(module, ConvTranspose3d):
            out = x.maps.convolve_transposed(ones, kernel, x.stride, size=module.kernel_size, stride=module.stride)
        else:
            out = x.maps.convolve(
                ones, kernel, x.stride, size=module.kernel_size, stride=module.stride, dilation=module.dilation
            )
    return float(out.double().sum())


@dataclass(frozen=True)
class Measurement:
    """One cell. Seconds are medians; ratios are native / minkowski, the median of the pairs and its 95 % interval."""

    voxel_size: float
    frames: int
    voxels: int
    pairs: int
    seconds: dict[str, float]
    forward_ratio: float
    ratio: float
    interval: tuple[float, float]
    peak_bytes: dict[str, int]
    memory_ratio: float
    floor_seconds: float
    floor_share: float


def median_interval(values: list[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median."""
    draws = np.random.default_rng(0).choice(np.array(values), (2000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(low), float(high)


def measure(cell: Cell, pairs: int) -> Measurement:
    """Alternate the engines on one input; then their memory, each in a process of its own."""
    cells = cell.voxels()
    runners = {name: Runner(name, cell.settings(), cells) for name in ENGINES}
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ENGINES}
    rates = [torch_rate()]
    for pair in range(pairs + 1):  # the first warms up
        for name in ENGINES if pair % 2 else reversed(ENGINES):
            runs[name].append(runners[name].step())
    rates.append(torch_rate())
    forward, total = ([[run[part] for run in runs[name][1:]] for name in ENGINES] for part in (0, 1))
    ratios = [ours / theirs for ours, theirs in zip(*total, strict=True)]
    seconds = {name: statistics.median(values) for name, values in zip(ENGINES, total, strict=True)}
    peaks = {name: peak_of(cell, name) for name in ENGINES}
    floor = runners["native"].flops() / statistics.mean(rates)
    return Measurement(
        voxel_size=cell.voxel_size,
        frames=cell.count,
        voxels=len(cells),
        pairs=pairs,
        seconds=seconds,
        forward_ratio=statistics.median(ours / theirs for ours, theirs in zip(*forward, strict=True)),
        ratio=statistics.median(ratios),
        interval=median_interval(ratios),
        peak_bytes=peaks,
        memory_ratio=peaks["native"] / peaks["minkowski"],
        floor_seconds=floor,
        floor_share=floor / seconds["native"],
    )


def peak_of(cell: Cell, engine: str) -> int:
    """Bytes of peak memory of a step, in a fresh process."""
    arguments = ["--frames", cell.frames, "--network", cell.network, "--voxels", str(cell.voxel_size)]
    answer = fresh("benchmarks.sparse_engine", [*arguments, "--counts", str(cell.count), "--memory-of", engine])
    return int(answer["peak_bytes"])


def print_peak(cell: Cell, engine: str) -> None:
    """The other end of :func:`peak_of`. A step on a few voxels comes first: libraries do not count."""
    cells = cell.voxels()
    Runner(engine, cell.settings(), cells[:64]).step()
    runner = Runner(engine, cell.settings(), cells)
    print(json.dumps({"peak_bytes": peak_growth(lambda: [runner.step() for _ in range(STEPS_FOR_MEMORY)])}))


HEADER = (
    "voxel frames  voxels   ours [s] theirs [s]  forward    both [95 %]           memory ours  theirs [MiB]  ratio   "
    "floor [s]  floor/ours"
)


def row(found: Measurement) -> str:
    """One line of the table; ``!`` marks a missed target."""
    low, high = found.interval
    target = TARGET_RATIO_2CM if found.voxel_size <= 0.02 else TARGET_RATIO
    ours, theirs = (found.peak_bytes[name] / 2**20 for name in ENGINES)
    return (
        f"{found.voxel_size:5.2f} {found.frames:6d} {found.voxels:7d} {found.seconds['native']:10.3f} "
        f"{found.seconds['minkowski']:10.3f} {found.forward_ratio:8.2f} {found.ratio:7.2f} [{low:.2f}, {high:.2f}]"
        f"{'!' if found.ratio > target else ' '} {ours:17.0f} {theirs:13.0f} {found.memory_ratio:6.2f}"
        f"{'!' if found.memory_ratio > TARGET_MEMORY else ' '} {found.floor_seconds:10.3f} {found.floor_share:11.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", default="synthetic", help="folder of RGB-D frames, or 'synthetic'")
    parser.add_argument("--network", choices=sorted(NETWORKS), default="18a")
    parser.add_argument("--voxels", type=float, nargs="+", default=[0.05, 0.02], help="voxel sizes [m]")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4], help="frames per batch")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of runs per cell, after one that warms up")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--memory-of", choices=ENGINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    choose_openblas_kernels()
    cells = [Cell(options.frames, options.network, size, count) for size in options.voxels for count in options.counts]
    if options.memory_of:
        print_peak(cells[0], options.memory_of)
        return
    engines = {name: make_engine(name).version for name in ENGINES}
    torch_gflops, openblas = torch_rate() / 1e9, openblas_rate()
    theirs = f"{openblas[0]} kernels, {openblas[1] / 1e9:.0f} GFLOP/s" if openblas else "not OpenBLAS"
    print(f"{torch.get_num_threads()} thread(s); matrix product: torch {torch_gflops:.0f} GFLOP/s, OpenBLAS {theirs}")
    print(f"native {engines['native']}, MinkowskiEngine {engines['minkowski']}; ! misses the target\n\n{HEADER}")
    measurements = []
    for cell in cells:
        measurements.append(measure(cell, options.pairs))
        print(row(measurements[-1]), flush=True)
    if options.json:
        report = {
            "frames": options.frames if options.frames == "synthetic" else Path(options.frames).name,
            "network": options.network,
            "threads": torch.get_num_threads(),
            "engines": engines,
            "torch_gflops": torch_gflops,
            "openblas": openblas and {"kernels": openblas[0], "gflops": openblas[1] / 1e9},
            "measurements": [asdict(found) for found in measurements],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
