"""What the probes cost: the same training step bare, with each probe, with all, and with what others offer, in turn.

    python -m benchmarks.overhead                            ResNet-50 + transformer, 8 images of 160 px
    python -m benchmarks.overhead --model bifusion           `bifusion` at full scale, synthetic rooms
    python -m benchmarks.overhead --only grads+losses all --rounds 40 --json overhead.json

One process, one model, one batch. Each round takes every way of watching once, in an order of its own: hooks are put
on, one step warms up, the next is timed, hooks are taken off. A way's ratio is that of its step to the mean of the
round's two bare steps; printed are the median over the rounds, the 95 % interval of that median (order statistics), and
in the line "bare, again" what pure noise does to the same numbers. Seconds are the CPU time of the whole process, the
writer's thread included; the clock's ratios stand beside them. Rows are written by blocks of 32, to the record and as
TensorBoard events: what such a block costs is timed apart, and a 32nd of it added to the step's CPU time.

`--memory` measures peak memory instead, each way in a process of its own. What a recorded number takes on disk is
measured by `python -m benchmarks.record_size`.

Ways: bare · each probe · grads+losses · all (without loss_gradients, whose extra backward passes are priced apart:
loss_gradients is timed at a step at which it is due) · recorder (the flight recorder on healthy steps, no probe),
all+recorder · naive (a hook a module with one .item() for each output and each
gradient) · anomaly (torch.autograd.set_detect_anomaly) · transformers (DebugUnderflowOverflow) · wandb-gradients,
wandb-all (wandb.watch, log_freq 1, offline). What is not installed is left out, and said so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.hybrid import ConvTransformer, random_batch
from benchmarks.median import interval
from benchmarks.process import fresh, peak
from bifusion_diag.config import load_settings
from bifusion_diag.data import BatchLoader, open_source
from bifusion_diag.model.build import build_model
from bifusion_diag.probes import PROBES, Monitor, Probe, make_probes
from bifusion_diag.record import RunHeader, RunWriter, TensorBoardSink
from bifusion_diag.replay.recorder import FlightRecorder
from bifusion_diag.replay.watch.detect import DEFAULT_BOUNDS, Detector
from bifusion_diag.training.optim import build_optimizer

BARE = ("bare", "bare, again")
PRICED_APART = "loss_gradients"
BLOCK = 32
PEERS = ("naive", "anomaly", "transformers", "wandb-gradients", "wandb-all")


@dataclass
class Workload:
    """A model, its optimiser, and one step of training: the step gets a function to tell its losses to."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Any
    forward: Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]]  # the total, and terms that no module returns

    def step(self, monitor: Monitor | None = None) -> None:
        """Forward, backward, update."""
        block = contextlib.nullcontext() if monitor is None else monitor.step(self.batch)
        with block:
            total, terms = self.forward(self.model, self.batch)
            if monitor is not None and terms:
                monitor.losses(terms, total=total)
            total.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def hybrid_workload(size: int, pixels: int) -> Workload:
    """(b): ResNet-50 and a transformer, AdamW, two loss terms on noise."""
    model = ConvTransformer().train()

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = batch
        logits = model(images)
        terms = {
            "cross_entropy": nn.functional.cross_entropy(logits, labels),
            "z": 1e-4 * logits.logsumexp(1).square().mean(),  # PaLM's: keeps the logits small
        }
        return terms["cross_entropy"] + terms["z"], terms

    return Workload(model, torch.optim.AdamW(model.parameters(), 1e-4), random_batch(size, pixels), forward)


def bifusion_workload(scale: str, size: int) -> Workload:
    """(a): our own model, AdamW, synthetic rooms."""
    settings = load_settings("bifusion", scale=scale, values={"training.batch_size": size})
    model = build_model(settings).train()
    loader = BatchLoader(open_source(settings.data, seed=0), settings.data, batch_size=size, seed=0)
    optimizer = build_optimizer(model, settings.optim)
    return Workload(model, optimizer, loader.batch(0), lambda model, batch: (model(batch).loss.total, {}))


# Ways of watching: a context in which steps are watched, given the workload; it yields the Monitor, if it is ours.
Way = Callable[[Workload], AbstractContextManager["Monitor | None"]]


def bare(work: Workload) -> AbstractContextManager[None]:
    """Nothing."""
    return contextlib.nullcontext()


def ours(names: Sequence[str], recorded: bool = False) -> Way:
    """Our probes, with the record and the TensorBoard events that a Monitor writes. Each time the steps have the next
    numbers: at every step it is the turn of other modules.

    Args:
        names: of the probes.
        recorded: with the flight recorder, whose detector remembers the steps before.
    """
    steps = itertools.count()
    detector = Detector(DEFAULT_BOUNDS)

    @contextmanager
    def watch(work: Workload) -> Iterator[Monitor]:
        recorder = FlightRecorder(lambda batch: work.forward(work.model, batch)) if recorded else None
        if recorder is not None:
            recorder.detector = detector
        with (
            tempfile.TemporaryDirectory() as folder,
            RunWriter(
                Path(folder) / "run.json",
                RunHeader("overhead"),
                tensorboard=TensorBoardSink(Path(folder) / "tensorboard"),
            ) as writer,
            Monitor(
                work.model,
                work.optimizer,
                chosen(names),
                writer=writer,
                block=1 << 20,
                first_step=next(steps),
                recorder=recorder,
            ) as monitor,
        ):
            yield monitor
        assert recorder is None or not recorder.incidents, "a healthy step was taken for a bad one"

    return watch


def chosen(names: Sequence[str]) -> list[Probe]:
    """Probes by name; "all" is without the one that is priced apart, which alone is due at every step."""
    if list(names) == [PRICED_APART]:
        return [PROBES[PRICED_APART](every=1)]
    return make_probes([name for name in PROBES if name != PRICED_APART] if "all" in names else list(names))


@contextmanager
def naive(work: Workload) -> Iterator[None]:
    """What one writes first: the norm of every output and every gradient, asked for at once."""
    log: dict[str, float] = {}

    def note(name: str, tensor: Any) -> None:
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            log[name] = tensor.detach().norm().item()

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def seen(module: nn.Module, inputs: Any, output: Any) -> None:
            note(name, output)
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda gradient: note(f"{name}.grad", gradient))

        return seen

    def grad_hook(name: str) -> Callable[[Tensor], None]:
        return lambda parameter: note(f"{name}.grad", parameter.grad)

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in work.model.named_modules()
        if not any(module.children())
    ]
    handles += [
        parameter.register_post_accumulate_grad_hook(grad_hook(name))
        for name, parameter in work.model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def anomaly(work: Workload) -> Iterator[None]:
    """PyTorch's anomaly mode."""
    with torch.autograd.set_detect_anomaly(True):
        yield


@contextmanager
def underflow_overflow(work: Workload) -> Iterator[None]:
    """Transformers' DebugUnderflowOverflow."""
    from transformers.debug_utils import DebugUnderflowOverflow

    before = {id(module): set(module._forward_hooks) for module in work.model.modules()}
    watcher = DebugUnderflowOverflow(work.model)
    try:
        yield
    finally:
        del watcher  # it keeps no handles: its hooks are those that were not there before
        for module in work.model.modules():
            for key in set(module._forward_hooks) - before[id(module)]:
                del module._forward_hooks[key]


def wandb_watch(log: str) -> Way:
    """Weights & Biases, every step."""

    @contextmanager
    def watch(work: Workload) -> Iterator[None]:
        wandb: Any = importlib.import_module("wandb")
        with tempfile.TemporaryDirectory() as folder:
            run = wandb.init(mode="offline", dir=folder, settings=wandb.Settings(silent=True))
            wandb.watch(work.model, log=log, log_freq=1)
            handle = work.optimizer.register_step_post_hook(lambda *_: run.log({"step": 1}))
            try:
                yield
            finally:
                handle.remove()
                wandb.unwatch(work.model)
                run.finish()

    return watch


def ways_to_watch() -> dict[str, Way]:
    """All, by name, that can be had here."""
    found: dict[str, Way] = dict.fromkeys(BARE, bare)
    found |= {name: ours([name]) for name in PROBES}
    found |= {"grads+losses": ours(["grads", "losses"]), "all": ours(["all"])}
    found |= {"recorder": ours([], recorded=True), "all+recorder": ours(["all"], recorded=True)}
    found |= {"naive": naive, "anomaly": anomaly}
    if importlib.util.find_spec("transformers"):
        found["transformers"] = underflow_overflow
    if importlib.util.find_spec("wandb"):
        found |= {"wandb-gradients": wandb_watch("gradients"), "wandb-all": wandb_watch("all")}
    return found


@dataclass
class Cost:
    """Of one way: ratios to the bare step, one a round."""

    cpu: list[float] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)
    numbers: int = 0  # recorded a step
    write_seconds: float = 0.0  # of CPU, a step: a 32nd of what a block costs


@dataclass
class Result:
    """All costs, and the step that they are ratios of."""

    workload: str
    threads: int
    step_cpu_seconds: float
    step_clock_seconds: float
    costs: dict[str, Cost]


def measure(work: Workload, title: str, ways: dict[str, Way], rounds: int, seed: int = 0) -> Result:
    """Take every way in turn."""
    shuffled = random.Random(seed)
    costs = {name: Cost() for name in ways}
    bare_cpu: list[float] = []
    bare_clock: list[float] = []
    for _ in range(2):
        work.step()
    for name, way in ways.items():
        if way is not bare and name not in PEERS:
            costs[name].numbers, costs[name].write_seconds = writing(work, way)
    for done in range(rounds):
        order = list(ways)
        shuffled.shuffle(order)
        cpu: dict[str, float] = {}
        clock: dict[str, float] = {}
        for name in order:
            cpu[name], clock[name] = timed(work, ways[name])
            cpu[name] += costs[name].write_seconds
        base_cpu = statistics.mean(cpu[name] for name in BARE)
        base_clock = statistics.mean(clock[name] for name in BARE)
        bare_cpu.append(base_cpu)
        bare_clock.append(base_clock)
        for name, cost in costs.items():
            again = name == BARE[1]
            cost.cpu.append(cpu[name] / (cpu[BARE[0]] if again else base_cpu))
            cost.clock.append(clock[name] / (clock[BARE[0]] if again else base_clock))
        print(f"\rround {done + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return Result(title, torch.get_num_threads(), statistics.median(bare_cpu), statistics.median(bare_clock), costs)


def timed(work: Workload, way: Way) -> tuple[float, float]:
    """CPU and clock seconds of a watched step, the second after the hooks were put on."""
    with way(work) as monitor:
        work.step(monitor)
        cpu, clock = time.process_time(), time.perf_counter()
        work.step(monitor)
        if monitor is not None:
            monitor.end_step()
        return time.process_time() - cpu, time.perf_counter() - clock


def writing(work: Workload, way: Way) -> tuple[int, float]:
    """Numbers recorded a step, and the CPU seconds a step that writing them takes, in blocks of 32."""
    with way(work) as monitor:
        assert monitor is not None
        work.step(monitor)
        monitor.end_step()
        numbers = len(monitor.latest())
        monitor.flush()
        row = monitor._rows._latest
        assert row is not None
        for i in range(BLOCK):
            noise = torch.empty_like(row.packed).uniform_(0.7, 1.3)  # what repeats would be smaller on the disk
            monitor._rows.add(row._replace(step=row.step + 1 + i, packed=row.packed * noise))
        began = time.process_time()
        monitor.flush()
        return numbers, (time.process_time() - began) / BLOCK


def show(result: Result) -> None:
    """Print the table."""
    print(
        f"{result.workload}, {result.threads} thread(s), torch {torch.__version__}: a bare step takes "
        f"{result.step_cpu_seconds:.3f} s of CPU, {result.step_clock_seconds:.3f} s"
    )
    spread = "95 % interval" if len(result.costs[BARE[0]].cpu) >= 6 else "range"
    print(f"{'watched by':18}{'CPU':>8}  {spread:18}{'clock':>8}{'numbers a step':>17}{'writing [ms]':>15}")
    for name, cost in result.costs.items():
        if name == BARE[0]:
            continue
        low, high = interval(cost.cpu)
        spread = f"[{low:.3f}, {high:.3f}]"
        middle, clock = statistics.median(cost.cpu), statistics.median(cost.clock)
        count = f"{cost.numbers:>17}{cost.write_seconds * 1e3:>15.2f}" if cost.numbers else ""
        print(f"{name:18}{middle:>8.3f}  {spread:18}{clock:>8.3f}{count}")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hybrid", choices=("hybrid", "bifusion"))
    parser.add_argument("--scale", default="full", choices=("full", "small"), help="of bifusion")
    parser.add_argument("--batch-size", type=int, help="default: 8 images, or 4 scenes")
    parser.add_argument("--pixels", type=int, default=160, help="of the images, for the hybrid")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="*", help="these ways, beside bare; default: all")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--json", type=Path, help="write the numbers there as well")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    ways = ways_to_watch()
    if unknown := sorted(set(arguments.only or ()) - set(ways)):
        sys.exit(f"--only: {', '.join(unknown)} is unknown or not installed. Known: {', '.join(ways)}")
    for name in sorted({*PEERS} - set(ways)):
        print(f"{name}: not installed, left out")
    if arguments.only:
        ways = {name: way for name, way in ways.items() if name in BARE or name in arguments.only}
    if arguments.memory:
        memory(arguments, ways)
        return
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    work, title = workload(arguments)
    if arguments.peak_of:
        with ways_to_watch()[arguments.peak_of](work) as monitor:
            for _ in range(3):
                work.step(monitor)
        print(json.dumps({"peak": peak()}))
        return
    result = measure(work, title, ways, arguments.rounds)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")


def workload(arguments: argparse.Namespace) -> tuple[Workload, str]:
    """The workload asked for, and its title."""
    if arguments.model == "bifusion":
        size = arguments.batch_size or 4
        return bifusion_workload(arguments.scale, size), f"bifusion, scale {arguments.scale}, {size} synthetic scenes"
    size = arguments.batch_size or 8
    work = hybrid_workload(size, arguments.pixels)
    leaves = sum(not any(module.children()) for module in work.model.modules())
    return work, f"ResNet-50 + transformer ({leaves} leaf modules), {size} images of {arguments.pixels} px"


def memory(arguments: argparse.Namespace, ways: dict[str, Way]) -> None:
    """Print the peak memory of each way, of three steps in a fresh process."""
    passed = ["--model", arguments.model, "--scale", arguments.scale, "--pixels", str(arguments.pixels)]
    passed += ["--threads", str(arguments.threads)]
    passed += ["--batch-size", str(arguments.batch_size)] if arguments.batch_size else []
    peaks: dict[str, int] = {}
    print(f"{'watched by':18}{'peak [GiB]':>12}{'ratio':>8}")
    for name in ways:
        peaks[name] = fresh("benchmarks.overhead", [*passed, "--peak-of", name])["peak"]
        print(f"{name:18}{peaks[name] / 2**30:>12.3f}{peaks[name] / peaks[BARE[0]]:>8.3f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(peaks, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
