"""Real trainings of small models, recorded: milliseconds a step, every number measured."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bifusion_diag.diagnosis import Finding, NotMeasured
from bifusion_diag.diagnosis.findings import Context
from bifusion_diag.diagnosis.full import load_measured
from bifusion_diag.diagnosis.measures import measure
from bifusion_diag.diagnosis.rules import RULES
from bifusion_diag.diagnosis.thresholds import Thresholds
from bifusion_diag.probes import LossGradientsProbe, Monitor, Probe
from bifusion_diag.record.schema import Run

CLASSES = 4
FEATURES = 8
Step = Callable[[nn.Module, Tensor, Tensor], Mapping[str, Tensor]]
PROBES = ("grads", "activations", "weights", "updates", "losses", "normalize", "data")


def classifier(width: int = 16) -> nn.Sequential:
    """A small network as they are written: matrices, normalisation, ReLU, a head."""
    return nn.Sequential(
        nn.Linear(FEATURES, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, CLASSES),
    )


def batch_of(generator: torch.Generator, size: int = 32) -> tuple[Tensor, Tensor]:
    """Points of four overlapping clouds, and which cloud each is of."""
    labels = torch.randint(CLASSES, (size,), generator=generator)
    corners = torch.eye(FEATURES)[:CLASSES] * 2
    return corners[labels] + torch.randn(size, FEATURES, generator=generator), labels


def cross_entropy(model: nn.Module, x: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
    """One term."""
    return {"classes": F.cross_entropy(model(x), labels)}


def train(
    model: nn.Module,
    steps: int = 200,
    *,
    losses: Step = cross_entropy,
    optimizer: torch.optim.Optimizer | None = None,
    lr: float = 1e-2,
    before: Callable[[int, nn.Module, torch.optim.Optimizer], Any] | None = None,
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]] = batch_of,
    clip: float | None = None,
    scaler: torch.amp.GradScaler | None = None,
    terms: int | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    out: Path | None = None,
    probes: Sequence[str | Probe] = PROBES,
) -> Run:
    """Train and record.

    Args:
        model: is trained as it is.
        steps: of the optimiser.
        losses: what is summed up and differentiated.
        optimizer: AdamW where none is given.
        lr: its rate.
        before: called before each step.
        batch: makes one.
        clip: the gradient norm's limit.
        scaler: of mixed precision.
        terms: steps between two measurements of the terms' gradients; None: never.
        settings: for the record.
        seed: of the batches.
        out: folder of the record; None: one that is not kept.
        probes: what is measured.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=lr)
    probes = [*probes, *([LossGradientsProbe(every=terms)] if terms else [])]
    with tempfile.TemporaryDirectory() as folder:
        place = out or Path(folder) / "run"
        options: dict[str, Any] = {"scaler": scaler, "settings": settings}
        with Monitor(model, optimizer, probes=probes, out=place, **options) as monitor:
            for step in range(steps):
                if before is not None:
                    before(step, model, optimizer)
                x, labels = batch(generator)
                with monitor.step({"x": x, "labels": labels}):
                    optimizer.zero_grad()
                    found = losses(model, x, labels)
                    monitor.losses(found)
                    total = torch.stack(list(found.values())).sum()
                    (total if scaler is None else scaler.scale(total)).backward()
                    if scaler is not None:
                        scaler.unscale_(optimizer)
                    if clip is not None:
                        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
                        monitor.log("train/clip_coefficient", (clip / (norm + 1e-6)).clamp(max=1.0))
                    if scaler is None:
                        optimizer.step()
                    else:
                        scaler.step(optimizer)
                        scaler.update()
        return load_measured(place)


def look(rule: str, run: Run, **thresholds: Any) -> list[Finding] | NotMeasured:
    """What one rule of the catalogue says of a run."""
    (known,) = [one for one in RULES if one.id == rule]
    return known.look(Context(run, measure(run), Thresholds(**thresholds)))


def found(rule: str, run: Run, **thresholds: Any) -> Finding:
    """Its only finding."""
    findings = look(rule, run, **thresholds)
    assert not isinstance(findings, NotMeasured), findings.reason
    (finding,) = findings
    return finding
