"""What the record takes: bytes on disk and CPU time for a number and step.

    python -m benchmarks.record_size
    python -m benchmarks.record_size --blocks 100 --json record.json

Bytes are of everything in the .record folder. *norms* are like gradient norms: every series has a magnitude of its own
and varies by a third from step to step; *normal* numbers follow a normal distribution; of *random bits* every bit is
random, which nothing can make smaller than 4 bytes. CPU time is the process's, from a row on the device to the file,
without the first block; of it, the loop's thread takes what is stated, the rest is the writing thread's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bifusion_diag.probes.base import Reading
from bifusion_diag.probes.rows import RowBlock, pack
from bifusion_diag.record import RunHeader, RunWriter, TensorBoardSink

BLOCK = 32  # rows
KINDS = ("norms", "normal", "random bits")
Numbers = NDArray[np.float32]


@dataclass(frozen=True)
class Measurement:
    """One kind of numbers. Times are milliseconds for a thousand numbers."""

    numbers: str
    series: int
    missing: float  # share of series that are not measured
    tensorboard: bool
    bytes_a_number: float
    cpu: float
    cpu_of_the_loop: float


def blocks(kind: str, series: int, count: int) -> Iterator[Numbers]:
    """Blocks of numbers (BLOCK, series)."""
    rng = np.random.default_rng(0)
    magnitude = 10.0 ** rng.uniform(-6, 2, series)
    shape = (BLOCK, series)
    for _ in range(count):
        if kind == "norms":
            yield (magnitude * rng.lognormal(0, 0.3, shape)).astype(np.float32)
        elif kind == "normal":
            yield rng.normal(size=shape).astype(np.float32)
        else:
            yield rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)


def measure(kind: str, series: int, missing: float, count: int, *, tensorboard: bool) -> Measurement:
    """Record `count` blocks after a first one, as the Monitor does."""
    names = tuple(f"grads/encoder.block{i}.conv/param_norm" for i in range(series))
    gone = np.random.default_rng(1).random(series) < missing
    total = in_loop = 0.0
    with tempfile.TemporaryDirectory() as folder:
        sink = TensorBoardSink(Path(folder) / "tensorboard") if tensorboard else None
        with RunWriter(Path(folder) / "run.json", RunHeader("run"), tensorboard=sink) as writer:
            rows = RowBlock(writer, BLOCK, seconds=1e9)
            for number, values in enumerate(blocks(kind, series, count + 1)):
                tensors = torch.from_numpy(values)
                cpu, loop = time.process_time(), time.thread_time()
                for i in range(BLOCK):
                    reading = Reading(names, tensors[i], missing=gone if missing else None)
                    rows.add(pack(number * BLOCK + i, [reading], {"train/lr": 0.1}))
                loop = time.thread_time() - loop
                rows.flush()
                if number:
                    total += time.process_time() - cpu
                    in_loop += loop
        size = sum(file.stat().st_size for file in writer.folder.iterdir())
    thousands = series * BLOCK * count / 1000
    of_a_number = size / (series * BLOCK * (count + 1))
    return Measurement(
        kind, series, missing, tensorboard, of_a_number, 1e3 * total / thousands, 1e3 * in_loop / thousands
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record_size", description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=30, help="blocks of 32 rows")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases = [(kind, series, 0.0, False) for series in (100, 1000, 4000) for kind in KINDS]
    cases += [("norms", 4000, 0.1, False), ("norms", 4000, 0.1, True)]
    found = [measure(kind, n, gone, options.blocks, tensorboard=board) for kind, n, gone, board in cases]
    print(
        f"{'numbers':12} {'series':>6} missing TensorBoard  bytes a number   CPU ms per 1,000: all   the loop's thread"
    )
    for one in found:
        print(
            f"{one.numbers:12} {one.series:6} {one.missing:7.0%} {'yes' if one.tensorboard else 'no':>11} "
            f"{one.bytes_a_number:15.2f} {one.cpu:23.3f} {one.cpu_of_the_loop:19.3f}"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
