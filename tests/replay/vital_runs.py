"""Training loops that are watched by the sentinel and judged by the detector, without the rest of the recorder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bifusion_diag.probes.monitor import Monitor
from bifusion_diag.replay.incident import Trigger
from bifusion_diag.replay.watch.detect import DEFAULT_BOUNDS, Bounds, Detector
from bifusion_diag.replay.watch.rules import Rule
from bifusion_diag.replay.watch.sentinel import Sentinel
from bifusion_diag.replay.watch.vitals import Vitals


class Watch:
    """A recorder that notes alarms and does nothing about them. Calls are in the flight recorder's order."""

    def __init__(self, rules: Iterable[Rule] = (), bounds: Bounds = DEFAULT_BOUNDS) -> None:
        self.detector = Detector(bounds, rules)
        self.sentinel = Sentinel(lambda vitals: bool(self.detector.judge(vitals)))
        self.alarms: dict[int, list[Trigger]] = {}
        self.vitals: list[Vitals] = []
        self.fingerprints: dict[int, Any] = {}

    def open(self, *_: Any) -> None:
        pass

    def begin(self, number: int, batch: Any) -> None:
        self._number, self._judged = number, False

    def before_update(self, optimizer: Optimizer | None) -> None:
        if not self._judged:
            self._judged = True
            self._vitals = self.sentinel.measure(self._number)
            self._triggers = self.detector.judge(self._vitals)
            self.fingerprints[self._number] = self.sentinel.fingerprint

    def end(self) -> None:
        self.before_update(None)
        vitals = self.sentinel.updated(self._vitals)
        triggers = self._triggers or self.detector.judge_update(vitals)
        self.detector.remember(vitals)
        self.vitals.append(vitals)
        if triggers:
            self.alarms[self._number] = triggers

    def failed(self, error: BaseException) -> None:
        raise AssertionError("the step raised") from error

    def kinds(self) -> dict[int, list[str]]:
        """Of all alarms."""
        return {step: [trigger.kind for trigger in triggers] for step, triggers in self.alarms.items()}


class Classifier(nn.Module):
    """A small convolutional network with BatchNorm."""

    def __init__(self, classes: int = 4, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), nn.BatchNorm2d(2 * channels), nn.ReLU()
        )
        self.head = nn.Linear(2 * channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, classes)."""
        logits: Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return logits


def images(step: int, size: int = 8, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise (size, 3, 8, 8) on one of some patterns, and which one it is (size,)."""
    patterns = torch.randn(classes, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(1000 * seed + step)
    labels = torch.randint(0, classes, (size,), generator=generator)
    return patterns[labels] + torch.randn(size, 3, 8, 8, generator=generator), labels


def train(
    model: nn.Module,
    optimizer: Optimizer | list[Optimizer],
    loss: Callable[[int, Any], Tensor],
    *,
    batches: Callable[[int], Any] = images,
    steps: int = 60,
    before: Callable[[int], None] = lambda step: None,
    ended: Callable[[int], None] = lambda step: None,
    after: Callable[[int], None] = lambda step: None,
    watch: Watch | None = None,
) -> Watch:
    """The plainest loop there is; `before` the step block, `ended` after the backward, `after` the update."""
    watch = watch or Watch()
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    with Monitor(model, optimizers, [], recorder=watch) as monitor:
        for step in range(steps):
            batch = batches(step)
            before(step)
            with monitor.step(batch):
                value = loss(step, batch)
                for one in optimizers:
                    one.zero_grad()
                value.backward()
                ended(step)
                for one in optimizers:
                    one.step()
            after(step)
    return watch
