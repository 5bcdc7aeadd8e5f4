"""What the rules of the fusion ask of the probes clip, projection and matching, against plain computations."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bifusion_diag.config.settings import ProjectionSettings
from bifusion_diag.errors import UserError
from bifusion_diag.model.projection import PointProjection
from bifusion_diag.probes import MatchingProbe, Monitor, ProjectionProbe
from bifusion_diag.probes.clip import likeness


def test_likeness_is_the_mean_cosine_over_all_pairs() -> None:
    rng = np.random.default_rng(0)
    f2d, f3d = rng.normal(size=(2, 40, 5)) + 0.7
    valid = rng.random(40) > 0.3
    f2d[3], f3d[5] = np.nan, 0.0
    counted = valid & np.isfinite(f2d).all(1) & (np.abs(f3d).sum(1) > 0)
    units = [side[counted] / np.linalg.norm(side[counted], axis=1, keepdims=True) for side in (f2d, f3d)]
    pairs = ~np.eye(int(counted.sum()), dtype=bool)
    expected = [*(np.mean((unit @ unit.T)[pairs]) for unit in units), np.mean((units[0] * units[1]).sum(1))]
    found = likeness(torch.from_numpy(f2d), torch.from_numpy(f3d), torch.from_numpy(valid))
    assert [float(value) for value in found] == pytest.approx(expected)
    assert all(
        value.isnan() for value in likeness(torch.ones(4, 2), torch.ones(4, 2), torch.zeros(4, dtype=torch.bool))
    )


class Views(nn.Module):
    """Projects what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = PointProjection(ProjectionSettings())

    def forward(self, xyz: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """How many points are valid."""
        counts = torch.bincount(batch["scene_index"]).tolist()
        depth, intrinsics = torch.ones(2, 2, 8, 8), torch.eye(3).expand(2, 2, 3, 3)
        found: Tensor = self.projection(xyz, counts, depth, intrinsics, batch["pose"]).valid.sum()
        return found


def views() -> dict[str, Tensor]:
    """Two scenes of two views with poses of their own."""
    generator = torch.Generator().manual_seed(0)
    turns = torch.linalg.qr(torch.randn(2, 2, 3, 3, generator=generator)).Q
    pose = torch.eye(4).repeat(2, 2, 1, 1)
    pose[..., :3, :3], pose[..., :3, 3] = turns, torch.randn(2, 2, 3, generator=generator)
    xyz = torch.randn(3000, 3, generator=generator)
    return {"xyz": xyz, "coords": xyz * 1.1 + 0.3, "scene_index": torch.arange(3000) // 1500, "pose": pose}


@pytest.mark.parametrize("projected", ["xyz", "coords"])
def test_what_is_projected_is_compared_with_the_batch(projected: str) -> None:
    batch, model = views(), Views()
    with Monitor(model, probes=[ProjectionProbe()]) as monitor, monitor.step(batch):
        model(batch[projected], batch)
    monitor.end_step()
    latest = monitor.latest()
    apart = float((batch["coords"] - batch["xyz"])[::3].norm(dim=1).median())
    expected = {"xyz": (0.0, apart), "coords": (apart, 0.0)}[projected]
    found = latest["projection/off_captured"], latest["projection/off_augmented"]
    assert found == pytest.approx(expected, rel=0.01, abs=1e-5)


def test_a_lost_pose_is_left_out_of_the_distances_and_other_batches_are_not_measured() -> None:
    batch, model = views(), Views()
    batch["pose"][0, 0] = -torch.inf
    for given, measured in ((batch, True), ({"xyz": batch["xyz"]}, False), (None, False)):
        with Monitor(model, probes=[ProjectionProbe()]) as monitor, monitor.step(given):
            model(batch["xyz"], batch)
        monitor.end_step()
        assert ("projection/off_captured" in monitor.latest()) == measured
        if measured:
            assert monitor.latest()["projection/off_captured"] == pytest.approx(0.0, abs=1e-5)


def test_an_unknown_field_of_the_batch_is_refused() -> None:
    with pytest.raises(UserError, match="captured"):
        ProjectionProbe(batch={"captrued": "points"})


class Told(NamedTuple):
    """What a criterion returns."""

    matches: list[Tensor]
    objects: list[int]


class Criterion(nn.Module):
    """Matches the first query of each scene."""

    def forward(self, predictions: NamedTuple) -> Told:
        """Two scenes."""
        return Told([torch.tensor([0]), torch.tensor([0])], [1, 2])


class Predicted(NamedTuple):
    """What a decoder returns."""

    query_superpoints: list[Tensor]


class HungarianMatcher(nn.Module):
    """As DETR's kind."""

    def forward(self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """One pair a scene."""
        return [(torch.tensor([0]), torch.tensor([0])) for _ in targets]


def test_all_queries_are_counted_where_the_arguments_tell_them() -> None:
    ours = Criterion(), (Predicted([torch.arange(5), torch.arange(7)]),), 12.0
    labels = [{"labels": torch.zeros(3)} for _ in range(2)]
    detr = HungarianMatcher(), ({"pred_logits": torch.zeros(2, 9, 4)}, labels), 18.0
    for module, arguments, expected in (ours, detr):
        model = nn.ModuleDict({"part": module})
        with Monitor(model, probes=[MatchingProbe()]) as monitor, monitor.step():
            model["part"](*arguments)
        monitor.end_step()
        assert monitor.latest()["matching/queries"] == expected
