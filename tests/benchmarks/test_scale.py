"""The scenes of the benchmark are what it says."""

from __future__ import annotations

import pytest
import torch

from benchmarks.scale import SLOPE_POINTS, room_of
from bifusion_diag.model.sparse import make_engine, voxelize


def test_rooms_of_all_sizes_have_one_density_of_points() -> None:
    """Else the slope of time in points would be that of the density, too."""
    density = []
    for count in (SLOPE_POINTS[0], SLOPE_POINTS[-2]):
        points = room_of(count)
        scene = torch.zeros(count, dtype=torch.long)
        voxels = voxelize(points, torch.ones(count, 1), scene, 0.05, make_engine("native"))
        density.append(count / len(voxels.tensor.feats))
    assert density[0] == pytest.approx(density[1], rel=0.15)
