"""What becomes of coordinates and poses that are not finite: the real projection and the real sampling are fed them.

Legend: N points · B scenes · V views.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bifusion_diag.config.settings import ProjectionSettings
from bifusion_diag.data import Batch
from bifusion_diag.diagnosis.phrase import join, say
from bifusion_diag.experiments.audit.bench import Bench
from bifusion_diag.experiments.audit.result import Cell, Draft, Number, Section
from bifusion_diag.model.projection import FARTHEST, PointProjection, PointSampling

SANITIZE = "model.projection.sanitize"
WAYS = ("strict", "replace", "clamp", "none")
_POINTS = 0.1  # share of the points that are poisoned

Poison = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Fate(NamedTuple):
    """What became of the poisoned points."""

    poisoned: int  # points whose camera coordinates are not finite in every view
    went_on: int  # points that got finite coordinates in front of a camera all the same
    valid: int  # and even a pixel whose depth agrees
    features: int  # points whose sampled feature is not finite
    gradients: float  # share of the map's gradient that is not finite
    leaked: float  # largest gradient that a poisoned point sends to the map


def sanitising(bench: Bench) -> Section:
    """Every way of `sanitize` under every poison; findings for this run's way."""
    draft = Draft("sanitise", "Coordinates that are not finite")
    if not bench.fused:
        return Section(draft.id, draft.title, not_measured="the model projects nothing")
    _clamp_keeps_nan(draft)
    own = bench.settings.model.projection
    maps = bench.step.sights.maps
    assert maps is not None
    rows: list[list[Cell]] = []
    for name, poison in POISONS.items():
        for way in WAYS:
            fate = fate_of(bench.batch, maps.detach(), own.model_copy(update={"sanitize": way}), poison)
            rows.append([name, way, *fate])
            noted = _noted(draft, name, way, fate)
            if way == own.sanitize:
                _judge(draft, name, fate, noted)
    columns = ("poison", "sanitize", "poisoned", "go on", "valid", "bad features", "bad gradients", "leaked gradient")
    draft.table("What becomes of points without finite camera coordinates", columns, rows, shown=False)
    narrow = ("poison", "poisoned", "go on", "valid", "bad features", "bad gradients", "leaked gradient")
    mine = [[row[0], *row[2:]] for row in rows if row[1] == own.sanitize]
    draft.table(say("Points without finite camera coordinates under sanitize={way}", way=own.sanitize), narrow, mine)
    return draft.done()


def fate_of(batch: Batch, maps: Tensor, settings: ProjectionSettings, poison: Poison) -> Fate:
    """Project and sample a poisoned batch, and send a gradient of ones back.

    Args:
        batch: real.
        maps: (B·V, C, h, w), the real 2D features.
        settings: of the projection.
        poison: what is done to (xyz, pose); it says which points it means.
    """
    xyz, pose, meant = poison(batch.xyz, batch.pose)
    projection = PointProjection(settings)(xyz, batch.point_counts, batch.depth, batch.intrinsics, pose)
    lost = ~torch.isfinite(projection.camera_xyz).all(-1).any(-1) & meant
    leaf = maps.clone().requires_grad_()
    height, width = batch.depth.shape[-2:]
    sampled = PointSampling(settings)(leaf, projection, batch.scene_index, (height, width))
    (whole,) = torch.autograd.grad(sampled.sum(), leaf, retain_graph=True)
    (from_lost,) = torch.autograd.grad(sampled[lost].sum(), leaf)
    return Fate(
        poisoned=int(lost.sum()),
        went_on=int((lost & projection.in_front.any(1)).sum()),
        valid=int((lost & projection.valid).sum()),
        features=int((~torch.isfinite(sampled)).any(1).sum()),
        gradients=float((~torch.isfinite(whole)).float().mean()),
        leaked=float(from_lost.abs().max()),
    )


def lost_pose(xyz: Tensor, pose: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every view's pose is −inf, as ScanNet marks lost tracking."""
    return xyz, torch.full_like(pose, -torch.inf), torch.ones(len(xyz), dtype=torch.bool, device=xyz.device)


def nan_pose(xyz: Tensor, pose: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every view's pose is NaN."""
    return xyz, torch.full_like(pose, torch.nan), torch.ones(len(xyz), dtype=torch.bool, device=xyz.device)


def nan_points(xyz: Tensor, pose: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One point in ten is NaN."""
    return _points(xyz, pose, torch.nan)


def infinite_points(xyz: Tensor, pose: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One point in ten is infinitely far away."""
    return _points(xyz, pose, torch.inf)


def _points(xyz: Tensor, pose: Tensor, value: float) -> tuple[Tensor, Tensor, Tensor]:
    hit = torch.arange(len(xyz), device=xyz.device) % round(1 / _POINTS) == 0
    return torch.where(hit[:, None], value, xyz), pose, hit


POISONS: dict[str, Poison] = {
    "pose of −inf": lost_pose,
    "pose of NaN": nan_pose,
    "points of NaN": nan_points,
    "points of +inf": infinite_points,
}
_KEYS = {
    "pose of −inf": "lost_pose",
    "pose of NaN": "nan_pose",
    "points of NaN": "nan_points",
    "points of +inf": "infinite_points",
}


def _clamp_keeps_nan(draft: Draft) -> None:
    """000's line on three numbers."""
    clamped = torch.tensor([torch.nan, torch.inf, -torch.inf]).clamp(-FARTHEST, FARTHEST)
    draft.number(
        "clamp/nan",
        "NaN left by torch.clamp(coords, −1e6, 1e6) of one NaN and two infinities",
        float(clamped.isnan().sum()),
        "",
        "clamp keeps NaN",
    )


def _noted(draft: Draft, poison: str, way: str, fate: Fate) -> dict[str, Number]:
    titles = {
        "poisoned": say("points without finite camera coordinates ({poison})", poison=poison),
        "went_on": say("of them in front of a camera all the same ({poison}, {way})", poison=poison, way=way),
        "valid": say("of them valid ({poison}, {way})", poison=poison, way=way),
        "features": say("points with a feature that is not finite ({poison}, {way})", poison=poison, way=way),
        "gradients": say("share of the 2D map's gradient that is not finite ({poison}, {way})", poison=poison, way=way),
        "leaked": say("largest gradient that such points send to the 2D map ({poison}, {way})", poison=poison, way=way),
    }
    units = {"poisoned": "points", "went_on": "points", "valid": "points", "features": "points"}
    return {
        name: draft.number(f"{_KEYS[poison]}/{way}/{name}", title, getattr(fate, name), units.get(name, ""))
        for name, title in titles.items()
    }


def _judge(draft: Draft, poison: str, fate: Fate, noted: dict[str, Number]) -> None:
    """A finding where this run's way spoils something. Whether the data has such points, the data scan says."""
    shown: tuple[str, ...]
    if fate.features or fate.gradients:
        words = "{poison}: {count} features become NaN"
        title = say(words, poison=poison, count=fate.features)
        mechanism = (
            "A pixel that is not finite has NaN weights in the sampling. Multiplying by the mask does not help, as 0 "
            "· NaN is NaN; and NaN gradients come back to the whole map."
        )
        shown = ("poisoned", "features", "gradients")
    elif fate.went_on:
        title = say(
            "{poison}: {count} points go on with coordinates that are finite and wrong",
            poison=poison,
            count=fate.went_on,
        )
        mechanism = join(
            [
                "The untransformed world coordinates are taken for camera coordinates.",
                say(
                    "{valid} of them even agree with the depth image by accident: they get the 2D features of another "
                    "place, and send a gradient there.",
                    valid=fate.valid,
                ),
            ]
        )
        shown = ("poisoned", "went_on", "valid", "leaked")
    else:
        return
    if any(finding.rule == "projection-nonfinite" for finding in draft.findings):
        return  # one finding for the way, with the first poison's numbers
    draft.report(
        "projection-nonfinite",
        "warning",
        title,
        mechanism,
        *(noted[name] for name in shown),
        module="encoder.projection",
        remedy={SANITIZE: "strict"},
    )
