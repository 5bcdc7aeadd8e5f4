"""What the processes of test_distributed.py do. Started by spawn, they import this file by its name."""

from __future__ import annotations

import copy
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bifusion_diag.config import Settings, load_settings
from bifusion_diag.data import Batch
from bifusion_diag.probes.ranks import gather, own_rank, world_size
from bifusion_diag.record import Run
from bifusion_diag.training import Trainer, resume_training
from bifusion_diag.training.distributed import Replica, process_group

QUIET = Console(quiet=True)
STEPS = 6  # stages begin at steps 0, 1 and 4
TINY = (
    "training.batch_size=1",
    "training.device=cpu",
    "data.scenes=5",
    "data.max_points=600",
    "data.image_height=48",
    "data.image_width=64",
    "data.superpoint_size=0.5",
    f"training.steps={STEPS}",
)
Job = Callable[[Path], Any]


def settings(*overrides: str, preset: str = "bifusion") -> Settings:
    return load_settings(preset, scale="small", overrides=[*TINY, *overrides])


def run_ranks(job: Job, world: int, folder: Path) -> list[Any]:
    """Run job(folder) in so many processes, as torchrun starts them; what each returned."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (job, world, folder, port), nprocs=world)
    return [torch.load(folder / f"{job.__name__}{rank}.pt") for rank in range(world)]


def _process(rank: int, job: Job, world: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.save(job(folder), folder / f"{job.__name__}{rank}.pt")


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """All that is learned, of this process."""
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def train(
    out: Path,
    *overrides: str,
    probes: tuple[str, ...] = (),
    disturb: Callable[[Trainer, int], None] | None = None,
) -> dict[str, Any]:
    """Train, and call disturb(trainer, step) before every step."""
    trainer = Trainer(settings(*overrides), out, probes, ["train"], QUIET)
    step = trainer._step

    def disturbed(number: int, display: Any) -> None:
        if disturb is not None:
            disturb(trainer, number)
        step(number, display)

    trainer._step = disturbed  # type: ignore[method-assign]
    return told(trainer.run()) | {"weights": weights(trainer), "random": torch.get_rng_state()}


def resumed(out: Path) -> dict[str, Any]:
    """Go on with a run, once rank 0 has written its checkpoint."""
    gather(None)
    return told(resume_training(out, console=QUIET))


def told(run: Run) -> dict[str, Any]:
    """What is compared of a record."""
    return {
        "status": run.status,
        "steps": run.steps.tolist(),
        "events": [(e.step, e.kind, e.message, dict(e.data)) for e in run.events],
    }


def send_sigterm_to_rank_1(trainer: Trainer, step: int) -> None:
    if own_rank() == 1 and step == 2:
        os.kill(os.getpid(), signal.SIGTERM)


def send_sigterm_in_the_second_evaluation(trainer: Trainer, step: int) -> None:
    if own_rank() == 0 and step == 0:
        assert trainer.evaluator is not None
        trainer.evaluator.source = Interrupting(trainer.evaluator.source)


class Interrupting:
    """Scenes of which looking at one is interrupted."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source) + 1  # after the signal there is still one to be evaluated

    def __getitem__(self, index: int) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return self.source[0]


def plant_nan_at_rank_1(trainer: Trainer, step: int) -> None:
    batch = trainer.loader.batch

    def poisoned(number: int) -> Batch:
        made = batch(number)
        if own_rank() == 1 and number == 2:
            made.color[0] = torch.nan
        return made

    if step == 0:
        trainer.loader.batch = poisoned  # type: ignore[method-assign]


def fail_at_rank_1(trainer: Trainer, step: int) -> None:
    if own_rank() == 1 and step == 1:
        raise ValueError("a disk was pulled out, say")


def runs(folder: Path) -> dict[str, Any]:
    """Whole runs of one group of processes."""
    with process_group("cpu"):
        return {
            "all": train(folder / "all.json", probes=("all",)),
            "none": train(folder / "none.json"),
            "parts": train(folder / "parts.json", probes=("all",), disturb=send_sigterm_to_rank_1),
            "resumed": resumed(folder / "parts.json"),
            "bad": train(folder / "bad.json", "training.steps=4", disturb=plant_nan_at_rank_1),
            "evaluated": train(folder / "evaluated.json", "evaluation.every=3", "evaluation.scenes=1"),
            "cut": train(
                folder / "cut.json",
                "evaluation.every=3",
                "evaluation.scenes=1",
                disturb=send_sigterm_in_the_second_evaluation,
            ),
            "whole": resumed(folder / "cut.json"),
            "gradients": gradients(folder),
        }


def few_runs(folder: Path) -> dict[str, Any]:
    """One run, where starting the processes is all there is time for."""
    with process_group("cpu"):
        return {"all": train(folder / "all.json", probes=("grads",))}


def gradients(folder: Path) -> dict[str, Any]:
    """The gradient that a replica reduces, and the mean of those that every rank computes by itself."""
    trainer = Trainer(settings("training.stages=none"), folder / "gradients.json", (), [], QUIET)
    batch, found = trainer.loader.batch(0), []
    for reduced in (False, True):
        torch.manual_seed(own_rank())
        model = copy.deepcopy(trainer.model)
        replica = Replica(model)
        loss = replica.loss(batch) if reduced else model(batch).loss
        loss.total.backward()
        mine = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if reduced:
            found.append((mine, replica.local_norm(torch.zeros(()))))
        else:
            every = gather(mine)
            names = sorted({name for gradients in every for name in gradients})
            total = {name: sum(g[name].double() for g in every if name in g) / world_size() for name in names}
            found.append((total, torch.cat([g.flatten() for g in mine.values()]).double().norm()))
    trainer.writer.finish("completed")
    return {"names": batch.names, "expected": found[0], "reduced": found[1]}


def failing(folder: Path) -> dict[str, Any]:
    """A run that breaks on rank 1."""
    return broken(folder / "failing.json", fail_at_rank_1)


def vanishing(folder: Path) -> dict[str, Any]:
    """A run whose rank 0 is gone in the middle of it, and with it all that the ranks share."""

    def vanish(trainer: Trainer, step: int) -> None:
        if own_rank() == 0 and step == 1:
            torch.save({}, folder / "vanishing0.pt")
            os._exit(0)

    return broken(folder / "vanishing.json", vanish)


def broken(out: Path, disturb: Callable[[Trainer, int], None]) -> dict[str, Any]:
    """What a rank raises, and when."""
    began = 0.0
    try:
        with process_group("cpu"):
            began = time.monotonic()
            train(out, disturb=disturb)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - began}
    return {"error": "none"}
