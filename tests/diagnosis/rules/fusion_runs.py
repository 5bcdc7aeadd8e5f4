"""Real trainings for the rules of the fusion: tiny BiFusion runs, and toys of two branches at milliseconds a step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rule_runs import CLASSES, FEATURES, train
from torch import Tensor, nn
from torch.nn import functional as F

from bifusion_diag.config import load_settings
from bifusion_diag.probes import ClipProbe, FlowProbe, GateProbe, Probe
from bifusion_diag.record.schema import Run
from bifusion_diag.training import start_training

TINY: dict[str, Any] = {
    "training.batch_size": 2,
    "training.threads": 1,
    "training.fingerprint_every": 0,
    "data.scenes": 6,
    "data.views": 2,
    "data.point_views": 3,
    "data.max_points": 600,
    "data.image_height": 48,
    "data.image_width": 64,
    "data.superpoint_size": 0.5,
    "incidents.capsules": 0,
}
#: Mistakes that do not get into each other's way.
PLANTED: dict[str, Any] = {
    "training.steps": 12,
    "losses.clip_align.gradient_formula": "as_written",
    "losses.schedule": "constant",
    "losses.clip_align.weight": 0.2,
    "losses.instance": {"style": "esam", "parts": [0.5, 1.0, 1.0, 0.5, 0.5], "no_object_weight": 0.0005},
    "model.projection.coordinates": "augmented",
    "model.projection.normalize": "after_sampling",
    "model.projection.sanitize": "replace",
    "model.gate.early_steps": 29_000,
    "data.flaws": {"colour_outliers": 0.4, "far_outliers": 0.3, "empty_crop": 0.2, "lost_tracking": 0.4},
}


def train_bifusion(folder: Path, preset: str, values: Mapping[str, Any], probes: tuple[str, ...] = ("all",)) -> Run:
    """A tiny run of a preset."""
    settings = load_settings(preset, scale="small", values={**TINY, **values})
    return start_training(settings, folder / "run.json", probes=probes, console=Console(quiet=True))


class Branches(NamedTuple):
    """What a fusion returns."""

    f2d: Tensor  # (N, C)
    f3d: Tensor  # (N, C)
    valid: Tensor  # (N,) bool
    alpha: Tensor  # (N, 1)
    fused: Tensor  # (N, C)


class Fusion(nn.Module):
    """Two branches and a gate, as BiFusion has them, of the same points.

    Args:
        scale: of the 2D features.
        bias: of the gate's logit.
        slope: of the gate's logit by the features; 0 leaves it constant.
        strangers: the image branch sees the point beside: the two sides can be aligned by becoming all alike alone.
    """

    def __init__(self, scale: float = 1.0, bias: float = 0.0, slope: float = 1.0, strangers: bool = False) -> None:
        super().__init__()
        self.image, self.points = nn.Linear(FEATURES, 16), nn.Linear(FEATURES, 16)
        self.gate = nn.Linear(32, 1)
        self.scale, self.bias, self.slope, self.strangers = scale, bias, slope, strangers

    def forward(self, x: Tensor) -> Branches:
        """Points (N, FEATURES)."""
        seen = x.roll(1, 0) if self.strangers else x
        f2d, f3d = F.normalize(self.image(seen), dim=1) * self.scale, F.normalize(self.points(x), dim=1)
        alpha = torch.sigmoid(self.slope * self.gate(torch.cat([f2d, f3d], 1)) + self.bias)
        return Branches(f2d, f3d, torch.ones(len(x), dtype=torch.bool), alpha, alpha * f2d + (1 - alpha) * f3d)


class Align(nn.Module):
    """−log σ(cos/τ) of two sides."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, f2d: Tensor, f3d: Tensor) -> Tensor:
        """The mean over the points."""
        return -F.logsigmoid(F.cosine_similarity(f2d, f3d, dim=1) / self.temperature).mean()


class FusionClassifier(nn.Module):
    """A fusion, a head on it, and an alignment loss."""

    def __init__(self, temperature: float = 1.0, **fusion: Any) -> None:
        super().__init__()
        self.fusion, self.head, self.align = Fusion(**fusion), nn.Linear(16, CLASSES), Align(temperature)

    def losses(self, x: Tensor, labels: Tensor, weight: float) -> dict[str, Tensor]:
        """The class's and the alignment's, which has a weight."""
        found = self.fusion(x)
        aligned = self.align(found.f2d, found.f3d) * weight
        return {"classes": F.cross_entropy(self.head(found.fused), labels), "clip_align": aligned}


def train_fusion(model: FusionClassifier, *, weight: float = 0.1, only_align: bool = False, **options: Any) -> Run:
    """Train a toy with the probes of the fusion; `only_align` leaves the class's loss out."""

    def losses(_: nn.Module, x: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
        found = model.losses(x, labels, weight)
        return {"clip_align": found["clip_align"]} if only_align else found

    probes: list[str | Probe] = ["grads", "losses", "weights", "updates", ClipProbe(), GateProbe()]
    probes.append(FlowProbe(modules=["align"], term="", sides=[("0", "1")]))
    return train(model, options.pop("steps", 120), losses=losses, probes=probes, **options)
