"""What watching costs where several processes train together: measured here with gloo, and simulated for more ranks.

    python -m benchmarks.ranks
    python -m benchmarks.ranks --ranks 2 --rounds 100 --simulate 64 4096 --alpha 20 --bandwidth 25

Measured, in fresh processes of one thread each on this machine:

- the time of an agreement (`bifusion_diag.probes.ranks.agree`, 3 flags), by the clock, and of a bare all-reduce of as
  many bytes;
- CPU time of a training step with a Monitor over that without, under DistributedDataParallel and under fully_shard.
  Steps with and without alternate in the same processes; printed are the median over the rounds, and the 95 % interval
  of that median. "bare" is a step without against a step without: the noise. Rows are not written to a disk. In steps
  without, the hooks are there and at rest: some 0.1 % of the step;
- what the Monitor sends at a step: number of all-reduces, and their payload.

Simulated, and printed apart: an all-reduce of S bytes among N ranks takes α·⌈log2 N⌉ + 2·(N − 1)/N·S / bandwidth. α and
the bandwidth are parameters of the command line, and no property of this machine. The model knows no congestion and no
rank that is late.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.median import interval
from bifusion_diag.probes import Monitor
from bifusion_diag.probes.catalogue import PROBES
from bifusion_diag.probes.ranks import agree

FLAGS = 3  # of a step's verdict: not finite, a spike, a signal
WATCHED = {
    "grads": ["grads", "losses"],
    "all": [name for name in PROBES if name != "loss_gradients"],  # whose extra backward passes are priced per use
}
STRATEGIES = ("replicated", "sharded")


def make_model() -> nn.Module:
    """Six encoder layers of width 256: 4.7 M parameters in 80 modules."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)


def middle(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the 95 % interval of it."""
    return statistics.median(values), *interval(values)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Payload in bytes of every all-reduce that Python starts: those of gradients are started by C++."""
    sizes: list[int] = []
    plain = dist.all_reduce

    def counting(tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return plain(tensor, *arguments, **keywords)

    dist.all_reduce = counting
    try:
        yield sizes
    finally:
        dist.all_reduce = plain


def train(strategy: str, rounds: int) -> dict[str, Any]:
    """Steps of one strategy: CPU time with a Monitor over that without, and what the Monitor sends."""
    model = make_model()
    if strategy == "sharded":
        for layer in model.get_submodule("layers").children():
            fully_shard(layer)
    parallel: Any = fully_shard(model) if strategy == "sharded" else DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = torch.randn(8, 64, 256)
    result: dict[str, Any] = {}
    for title, names in WATCHED.items():
        monitor = Monitor(parallel, optimizer, names)

        def step(watched: bool, monitor: Monitor = monitor) -> float:
            dist.barrier()
            began = time.process_time()
            with monitor.step(batch) if watched else nullcontext():
                parallel(batch).square().mean().backward()
                optimizer.step()
            optimizer.zero_grad()
            return time.process_time() - began

        with monitor:
            for _ in range(3):
                step(True)
            with counted() as sent:
                step(True)
            steps = [(step(False), step(True), step(False)) for _ in range(rounds)]
        result[title] = {
            "bare": middle([first / last for first, _, last in steps]),
            "watched": middle([2 * watched / (first + last) for first, watched, last in steps]),
            "seconds": middle([first for first, _, _ in steps])[0],
            "sent": sent,
        }
    return result


def process(rank: int, world: int, rounds: int, folder: Path) -> None:
    """One rank: measure, and rank 0 writes what it measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    result: dict[str, Any] = {
        "agree": clocked(lambda: agree([0] * FLAGS), 20 * rounds),
        "bare": clocked(lambda: dist.all_reduce(torch.zeros(FLAGS * world, dtype=torch.uint8)), 20 * rounds),
    }
    for strategy in STRATEGIES:
        result[strategy] = train(strategy, rounds)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def clocked(work: Callable[[], Any], times: int) -> tuple[float, float, float]:
    """Seconds by the clock: median and its interval."""
    for _ in range(10):
        work()
    measured = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        measured.append(time.perf_counter() - began)
    return middle(measured)


def measured(world: int, rounds: int) -> dict[str, Any]:
    """Start so many processes, and get what rank 0 has measured."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (world, rounds, Path(folder)), nprocs=world)
        result: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
    return result


def simulated(ranks: int, payload: float, alpha: float, bandwidth: float) -> float:
    """Seconds of an all-reduce by the model: payload [bytes], alpha [s], bandwidth [bytes/s]."""
    return alpha * math.ceil(math.log2(ranks)) + 2 * (ranks - 1) / ranks * payload / bandwidth


def show(world: int, result: dict[str, Any]) -> None:
    """Print what was measured with so many ranks."""
    print(f"\nMEASURED, {world} ranks of one thread on {os.cpu_count()} cores, gloo")
    for name, what in (("agree", f"agreement, {FLAGS * world} bytes"), ("bare", "bare all-reduce of as many")):
        middle, low, high = (1e6 * value for value in result[name])
        print(f"{what:36}{middle:8.0f} µs  [{low:.0f}, {high:.0f}]")
    print(
        f"{'':20}{'step, CPU [s]':>14}{'bare':>8}  {'95 % interval':18}{'watched':>8}  {'95 % interval':18}"
        "the Monitor sends"
    )
    for strategy, title in itertools.product(STRATEGIES, WATCHED):
        of = result[strategy][title]
        ratios = "".join(f"{of[k][0]:>8.3f}  {f'[{of[k][1]:.3f}, {of[k][2]:.3f}]':18}" for k in ("bare", "watched"))
        sent = f"{len(of['sent'])} all-reduces, {sum(of['sent'])} bytes"
        print(f"{f'{strategy}, {title}':20}{of['seconds']:>14.3f}{ratios}{sent}")


def main() -> None:
    """Measure, simulate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4], help="processes that are measured")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--simulate", type=int, nargs="*", default=[8, 64, 512, 4096], help="ranks that are simulated")
    parser.add_argument("--alpha", type=float, default=20.0, help="latency of a hop [µs]")
    parser.add_argument("--bandwidth", type=float, default=12.5, help="of a rank [GB/s]")
    parser.add_argument("--payload", type=int, default=5000, help="of the shards' norms [bytes]: 8 a parameter tensor")
    arguments = parser.parse_args()
    for world in arguments.ranks:
        show(world, measured(world, arguments.rounds))
    alpha, bandwidth = 1e-6 * arguments.alpha, 1e9 * arguments.bandwidth
    print(f"\nSIMULATED, not measured: α = {arguments.alpha:g} µs a hop, {arguments.bandwidth:g} GB/s a rank")
    print(f"{'ranks':>8}{'agreement [µs]':>18}{'bytes':>8}{'all-reduce of norms [µs]':>28}{'bytes':>8}")
    for ranks in arguments.simulate:
        flags = FLAGS * ranks
        times = [1e6 * simulated(ranks, payload, alpha, bandwidth) for payload in (flags, arguments.payload)]
        print(f"{ranks:>8}{times[0]:>18.0f}{flags:>8}{times[1]:>28.0f}{arguments.payload:>8}")


if __name__ == "__main__":
    main()
