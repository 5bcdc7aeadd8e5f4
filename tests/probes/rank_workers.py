"""What the processes of test_ranks.py do. Started by spawn, they import this file by its name."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from bifusion_diag.probes import Monitor
from bifusion_diag.probes.ranks import agree

BATCH = 4  # samples of each rank
STEPS = 4
STAGE = 2  # the step at which `late` begins to learn


class Net(nn.Module):
    """Modules whose rows divide by no number of ranks, one used twice, one that rank 0 alone uses, one frozen at first,
    one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.twice = nn.Linear(5, 5)
        self.norm = nn.LayerNorm(5)
        self.rare = nn.Linear(5, 5)
        self.late = nn.Linear(5, 3).requires_grad_(False)
        self.last = nn.Linear(3, 1)
        self.never = nn.Linear(2, 2)

    def forward(self, x: Tensor, rare: bool = False) -> Tensor:
        x = self.twice(self.twice(self.first(x).relu()).relu())
        x = self.norm(x + self.rare(x)) if rare else self.norm(x)
        return self.last(self.late(x))


def net() -> Net:
    torch.manual_seed(5)
    return Net()


def samples(step: int, world: int) -> Tensor:
    """The joint batch of a step; rank r has the r-th part of it."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(world * BATCH, 6, generator=generator)


def loss_of(model: nn.Module, x: Tensor, rare: bool = False) -> Tensor:
    return (model(x, rare) - 1).square().mean()


def run_ranks(job: Callable[[int, int, Path], Any], world: int, folder: Path) -> list[Any]:
    """Run job(rank, world, folder) in so many processes of one gloo group; what each returned."""
    torch.multiprocessing.spawn(_process, (job, world, folder), nprocs=world)
    return [torch.load(folder / f"result{rank}.pt") for rank in range(world)]


def _process(rank: int, job: Callable[[int, int, Path], Any], world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    result = job(rank, world, folder)
    torch.save(result, folder / f"result{rank}.pt")
    dist.destroy_process_group()


def replicate(model: nn.Module, bucket_view: bool) -> Any:
    return DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=bucket_view)


def shard(model: Net) -> Any:
    for part in (model.first, model.twice, model.norm, model.last):
        fully_shard(part)
    return fully_shard(model)


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(
    rank: int,
    world: int,
    out: Path,
    probes: list[str],
    *,
    bucket_view: bool = False,
    sharded: bool = False,
    plain: bool = False,
    poisoned: bool = False,
    accumulate: bool = False,
) -> dict[str, Any]:
    """Train and record.

    Args:
        rank: of this process.
        world: how many there are.
        out: the record's folder.
        probes: names; none: no Monitor is opened.
        bucket_view: gradients are views of what is reduced.
        sharded: by fully_shard in place of DistributedDataParallel.
        plain: no parameter that one rank alone uses, no stage change.
        poisoned: rank 1 has a NaN in its batch of step 1, and the weights never change.
        accumulate: two backwards a step, the first of them not reduced.

    Returns:
        Weights, gradients of each step, random state, and what was agreed on.
    """
    model = net()
    parallel = shard(model) if sharded else replicate(model, bucket_view)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(rank)
    gradients: list[dict[str, Tensor]] = []
    agreed: list[tuple[Any, ...]] = []
    monitor = Monitor(parallel, optimizer, probes, out=out if probes else None)
    with monitor if probes else nullcontext():
        for step in range(STEPS):
            if step == STAGE and not plain:  # what learns changes: what reduces it is made anew
                parallel._remove_autograd_hooks()
                model.late.requires_grad_(True)
                parallel = replicate(model, bucket_view)
            x = samples(step, world)[rank * BATCH : (rank + 1) * BATCH]
            if poisoned and (rank, step) == (1, 1):
                x[1, 3] = torch.nan
            with monitor.step(x) if probes else nullcontext():
                if accumulate:
                    with parallel.no_sync():
                        (loss_of(parallel, x[: BATCH // 2]) / 2).backward()
                    loss = loss_of(parallel, x[BATCH // 2 :]) / 2
                else:
                    loss = loss_of(parallel, x, rare=rank == 0 and not plain)
                if probes:
                    monitor.losses({"fit": loss})
                loss.backward()
                agreed.append(agree([not loss.isfinite(), 10 * rank]))
                gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
                if not poisoned:
                    optimizer.step()
            optimizer.zero_grad()
    return {
        "weights": {n: whole(p) for n, p in model.state_dict().items()},
        "gradients": [{n: whole(g) for n, g in of_step.items()} for of_step in gradients],
        "random": torch.get_rng_state(),
        "agreed": [tuple(a) for a in agreed],
    }


def everything(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """All trainings of test_ranks.py, in one start of the processes."""

    def run(name: str, probes: list[str], **how: bool) -> dict[str, Any]:
        return train(rank, world, folder / name, probes, **how)

    return {
        "all": run("all", ["all"]),
        "none": run("none", []),
        "view": run("view", ["all"], bucket_view=True),
        "bad": run("bad", ["grads"], poisoned=True, plain=True),
        "accumulated": run("accumulated", ["grads"], accumulate=True, plain=True),
        "alone": run("alone", ["grads"] if rank == 0 else [], plain=True),
        "replicated": run("replicated", ["all"], plain=True),
        "sharded": run("sharded", ["all"], plain=True, sharded=True),
        "bare": run("bare", [], plain=True, sharded=True),
    }
