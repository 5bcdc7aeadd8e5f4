"""Farthest point sampling against a brute-force loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bifusion_diag.model.fps import farthest_points


def _by_hand(coords: np.ndarray, picks: int) -> list[int]:
    picked = [0]
    while len(picked) < min(picks, len(coords)):
        best, farthest = -1, -1.0
        for candidate in range(len(coords)):
            if candidate in picked:
                continue
            distance = min(float(((coords[candidate] - coords[p]) ** 2).sum()) for p in picked)
            if distance > farthest:
                best, farthest = candidate, distance
        picked.append(best)
    return picked


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cells", [True, False])
def test_against_a_loop(seed: int, cells: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    box = torch.randint(-3, 4, (60, 3), generator=generator)  # small: many equal distances, many equal points
    coords = box if cells else torch.randn(60, 3, generator=generator)
    assert farthest_points(coords, 25).tolist() == _by_hand(coords.double().numpy(), 25)


def test_no_point_twice_even_where_all_are_equal() -> None:
    assert farthest_points(torch.zeros(5, 3), 9).tolist() == [0, 1, 2, 3, 4]


def test_the_corners_of_a_line_come_first() -> None:
    line = torch.tensor([[4, 0, 0], [0, 0, 0], [5, 0, 0], [10, 0, 0], [1, 0, 0]])
    assert farthest_points(line, 3).tolist() == [0, 3, 1]


def test_cells_far_apart_are_told_apart_exactly() -> None:
    """In float32 the distances of the last two cells would be equal."""
    far = 1 << 25
    assert farthest_points(torch.tensor([[0, 0, 0], [far, 0, 0], [far, 1, 0]], dtype=torch.int32), 2).tolist() == [0, 2]
