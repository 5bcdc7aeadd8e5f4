"""The Fourier encoding against its formula."""

from __future__ import annotations

import math

import torch

from bifusion_diag.model.fourier import FourierEncoding, within_box


def test_sines_then_cosines_of_the_projected_position() -> None:
    encoding = FourierEncoding(8, 1.0).double()
    positions = torch.rand(5, 3, dtype=torch.float64)
    code = encoding(positions)
    for row, place in enumerate(positions.tolist()):
        for k in range(4):
            angle = 2 * math.pi * sum(place[axis] * encoding.frequencies[axis, k].item() for axis in range(3))
            assert math.isclose(code[row, k].item(), math.sin(angle), abs_tol=1e-12)
            assert math.isclose(code[row, 4 + k].item(), math.cos(angle), abs_tol=1e-12)


def test_frequencies_are_normal_of_the_given_scale_stored_and_not_trained() -> None:
    encoding = FourierEncoding(20_000, 3.0)
    # 30,000 draws: the standard deviation is known to 3 / sqrt(2 · 30,000) = 0.012.
    assert abs(encoding.frequencies.std().item() - 3.0) < 0.06
    assert abs(encoding.frequencies.mean().item()) < 0.1
    assert list(encoding.parameters()) == []
    assert list(encoding.state_dict()) == ["frequencies"]


def test_the_box_of_the_scene_is_the_unit_cube_and_a_flat_side_is_zero() -> None:
    box = torch.tensor([[1.0, 5.0, -2.0], [3.0, 5.0, 2.0]])
    found = within_box(torch.tensor([[1.0, 5.0, 2.0], [2.0, 5.0, -1.0]]), box)
    assert found.tolist() == [[0.0, 0.0, 1.0], [0.5, 0.0, 0.25]]
