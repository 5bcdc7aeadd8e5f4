"""Models of users for the tests of capsules: what runs in one process, and is built again in another by its name."""

from __future__ import annotations

import random
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bifusion_diag.probes import Monitor
from bifusion_diag.replay.capsules.capsule import CapsuleWriter, read_capsule
from bifusion_diag.replay.capsules.execute import replay_capsule, training_of
from bifusion_diag.replay.incident import Incident, Trigger
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.recorder import BadStepError, FlightRecorder
from bifusion_diag.replay.step import Training

STEP = 17


class Pictures(NamedTuple):
    images: Tensor
    targets: Tensor
    names: list[str]


class Doubling(torch.autograd.Function):
    """A backward of the user's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class Net(nn.Module):
    """Convolutions, BatchNorm, dropout, a schedule, a buffer that grows, and plain attributes of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)
        self.calls = 0
        self.weights = {"class": 1.0, "noise": 0.1}
        self.seen: deque[float] = deque(maxlen=3)
        self.mean = torch.zeros(3)
        self.register_buffer("memory", torch.zeros(0, 4))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        mean = images.mean((0, 2, 3)).detach()
        x = images - self.mean[:, None, None]
        x = x + random.random() + float(np.random.rand())
        x = self.drop(torch.relu(self.norm(self.conv(x))) * (1 + self.calls / 100))
        logits = self.head(Doubling.apply(x.mean((2, 3))))
        if self.memory.numel():
            logits = logits + self.memory.mean(0)
        self.mean = 0.9 * self.mean + 0.1 * mean
        self.memory = torch.cat([self.memory, logits.detach()])[-6:]
        self.seen.append(float(mean[0]))
        return logits


def pictures(settings: dict[str, Any]) -> Training:
    """Channels last, two groups, one frozen part, SGD with momentum."""
    model = Net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    groups = [{"params": [*model.conv.parameters(), *model.norm.parameters()]}, {"params": model.head.parameters()}]
    optimizer = torch.optim.SGD(groups, lr=settings["lr"], momentum=0.9, nesterov=True)

    def step(batch: Pictures) -> Any:
        logits = model(batch.images)
        terms = {"class": F.cross_entropy(logits, batch.targets), "noise": logits.square().mean()}
        return sum(model.weights[name] * term for name, term in terms.items()), terms

    return Training(model, step, (optimizer,))


def picture_batch() -> Pictures:
    images = torch.randn(6, 3, 8, 8).to(memory_format=torch.channels_last)
    return Pictures(images, torch.randint(0, 4, (6,)), [f"{i}.png" for i in range(6)])


def words(settings: dict[str, Any]) -> Training:
    """A transformer layer under autocast with a loss scale; AdamW."""
    model = nn.Sequential(
        nn.Embedding(50, 32), nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), nn.Linear(32, 50)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["lr"])

    def step(batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch["tokens"])
        return F.cross_entropy(logits.float().flatten(0, 1), batch["tokens"].flatten())

    return Training(model, step, (optimizer,), torch.amp.GradScaler("cpu", init_scale=1024.0))


def word_batch() -> dict[str, Any]:
    return {"tokens": torch.randint(0, 50, (4, 12)), "meta": {"epoch": 3, "source": np.array(["a", "b"])}}


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(2.0))


def contrast(settings: dict[str, Any]) -> Training:
    """A criterion whose parameter the optimiser holds and the model does not; Adam and a second optimiser, RMSprop."""
    model, critic = nn.Linear(5, 3), Critic()
    optimizers = (
        torch.optim.Adam([model.weight, critic.temperature], lr=settings["lr"], amsgrad=True),
        torch.optim.RMSprop([model.bias], lr=settings["lr"]),
    )
    return Training(model, lambda x: (model(x) * critic.temperature).square().sum(), optimizers)


def contrast_batch() -> Tensor:
    return torch.randn(7, 5)


WORKLOADS = {"pictures": picture_batch, "words": word_batch, "contrast": contrast_batch}


def trained(name: str, steps: int = 3) -> tuple[Training, StepNotes]:
    """A training after some steps, in the middle of one: its gradients are there, and it is about to update."""
    torch.manual_seed(5)
    training = globals()[name]({"lr": 0.01})
    training.model.train()
    for step in range(steps):
        batch = WORKLOADS[name]()
        notes = StepNotes(training.model, STEP, batch)
        training.backward(training.loss(batch))
        if step < steps - 1:
            for optimizer in training.optimizers:
                optimizer.param_groups[0]["lr"] *= 0.9
                optimizer.step()
                optimizer.zero_grad()
    return training, notes


def an_incident(kind: str = "gradient-spike", module: str | None = None) -> Incident:
    return Incident(STEP, kind, (Trigger(kind, "the gradient norm is 120", module, value=float("inf")),))


def written(training: Training, notes: StepNotes, folder: Path, **options: Any) -> tuple[str | None, str]:
    """The capsule of a training, in a folder of its own."""
    writer = CapsuleWriter(5, "1 GB", settings={"lr": 0.01, "odd": float("nan")}, **options)
    writer.open(training.model, folder)
    return writer.write(an_incident(), training, notes, None)


def recorded(name: str, out: Path, spoil: Any) -> list[Incident]:
    """A loop as users write it, with a batch that is spoilt at its step; what the flight recorder found."""
    torch.manual_seed(5)
    training = globals()[name]({"lr": 0.01})
    recorder = FlightRecorder(training.step, settings={"lr": 0.01}, on_incident="stop")
    with Monitor(training.model, training.optimizers, [], out, scaler=training.scaler, recorder=recorder) as monitor:
        for number in range(STEP + 1):
            batch = WORKLOADS[name]()
            if number == STEP:
                spoil(batch, training.model)
            with suppress(BadStepError), monitor.step(batch):
                total = training.loss(batch).total
                assert total is not None
                if training.scaler is None:
                    total.backward()
                else:
                    training.scaler.scale(total).backward()
                for optimizer in training.optimizers:
                    optimizer.step() if training.scaler is None else training.scaler.step(optimizer)
                if training.scaler is not None:
                    training.scaler.update()
            training.model.zero_grad()
    return recorder.incidents


if __name__ == "__main__":  # replays capsules of another process: <workload> <folder> ...
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    for name, folder in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        capsule = read_capsule(folder)
        found = replay_capsule(capsule, training_of(f"{__file__}:{name}", capsule))
        print(name, found.identical, found.compared, found.difference, *found.reasons, sep=" | ")
