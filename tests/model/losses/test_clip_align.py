"""The alignment loss: bounded slope, declared and measured gradient flow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bifusion_diag.config.settings import ClipAlignSettings
from bifusion_diag.model.losses.clip_align import alignment, clip_align_loss, limit_gradient
from bifusion_diag.model.outputs import EncoderOutput

SCENE_INDEX = torch.tensor([0, 0, 0, 1, 1])


def _encoder(f2d: Tensor, valid: Tensor | None = None) -> EncoderOutput:
    return EncoderOutput(
        fused=torch.randn(5, 4, requires_grad=True),
        f3d=torch.randn(5, 4, requires_grad=True),
        f2d=f2d,
        valid=torch.tensor([True, False, True, True, False]) if valid is None else valid,
        global2d=F.normalize(torch.randn(2, 4), dim=1).requires_grad_(),
    )


def test_slope_is_bounded_by_one_over_temperature() -> None:
    cosine = torch.linspace(-1, 1, 2001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(alignment(cosine, 0.07).sum(), cosine)
    assert slope.abs().max().item() <= 1 / 0.07
    assert round(1 / 0.07, 2) == 14.29
    assert round(slope[cosine == -0.5].abs().item(), 2) == 14.27

    (slope,) = torch.autograd.grad(alignment(cosine, 0.1).sum(), cosine)
    assert slope.abs().max().item() <= 10.0


def test_point_target_against_its_definition() -> None:
    f2d = torch.randn(5, 4)
    encoder = _encoder(f2d)
    expected = 0.0
    for row in (0, 2, 3):
        cosine = F.cosine_similarity(f2d[row], encoder.f3d[row], dim=0).item()
        expected -= math.log(1 / (1 + math.exp(-cosine / 0.07)) + 1e-8) / 3
    loss = clip_align_loss(encoder, SCENE_INDEX, ClipAlignSettings())
    assert math.isclose(loss.item(), expected, rel_tol=1e-5)


def test_global_target_compares_every_point_with_its_scenes_token() -> None:
    encoder = _encoder(torch.randn(5, 4))
    assert encoder.global2d is not None
    expected = 0.0
    for row, scene in enumerate(SCENE_INDEX.tolist()):
        cosine = F.cosine_similarity(encoder.fused[row], encoder.global2d[scene], dim=0).item()
        expected -= math.log(1 / (1 + math.exp(-cosine / 0.07)) + 1e-8) / 5
    loss = clip_align_loss(encoder, SCENE_INDEX, ClipAlignSettings(target="global"))
    assert math.isclose(loss.item(), expected, rel_tol=1e-5)


@pytest.mark.parametrize("target", ["point", "global"])
@pytest.mark.parametrize("share", [0.02, 0.05, 1.0])
def test_the_declared_share_of_the_gradient_reaches_the_2d_head(share: float, target: str) -> None:
    head = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
    tokens, pooled = torch.randn(5, 6), torch.randn(2, 6)
    rest = _encoder(torch.zeros(5, 4))

    def gradients(flow: float) -> tuple[Tensor, Tensor, Tensor]:
        encoder = rest._replace(f2d=head(tokens), global2d=head(pooled))
        settings = ClipAlignSettings.model_validate({"target": target, "gradient_flow": flow})
        loss = clip_align_loss(encoder, SCENE_INDEX, settings)
        side_3d = encoder.fused if target == "global" else encoder.f3d
        last, own = torch.autograd.grad(loss, [head[2].weight, side_3d])
        return loss, last, own

    full_loss, full, full_3d = gradients(1.0)
    loss, limited, limited_3d = gradients(share)
    torch.testing.assert_close(limited, share * full)
    torch.testing.assert_close(loss, full_loss)
    torch.testing.assert_close(limited_3d, full_3d)


@pytest.mark.parametrize("target", ["point", "global"])
def test_a_flow_of_zero_cuts_the_graph(target: str) -> None:
    """Not a gradient times 0, which would be NaN where the gradient is."""
    f2d = torch.randn(5, 4, requires_grad=True)
    encoder = _encoder(f2d)
    assert encoder.global2d is not None
    settings = ClipAlignSettings.model_validate({"target": target, "gradient_flow": 0.0})
    loss = clip_align_loss(encoder, SCENE_INDEX, settings)
    (loss * torch.nan).backward()
    assert f2d.grad is None
    assert encoder.global2d.grad is None
    side_3d = encoder.fused if target == "global" else encoder.f3d
    assert side_3d.grad is not None
    assert torch.equal(limit_gradient(f2d, 1.0), f2d)
    assert limit_gradient(f2d, 1.0).requires_grad


@pytest.mark.parametrize("target", ["point", "global"])
def test_clamp_bounds_both_sides_before_the_cosine(target: str) -> None:
    f2d = 30 * torch.randn(5, 4)
    encoder = _encoder(f2d)._replace(
        fused=30 * torch.randn(5, 4), f3d=30 * torch.randn(5, 4), global2d=30 * torch.randn(2, 4)
    )
    assert encoder.global2d is not None
    pairs = [(f2d[row], encoder.f3d[row]) for row in (0, 2, 3)]
    if target == "global":
        pairs = [(encoder.global2d[scene], encoder.fused[row]) for row, scene in enumerate(SCENE_INDEX.tolist())]
    expected = {}
    for bound in (10.0, None):
        cosines = []
        for pair in pairs:
            one, other = ([min(max(x, -bound), bound) if bound else x for x in side.tolist()] for side in pair)
            dot = sum(a * b for a, b in zip(one, other, strict=True))
            cosines.append(dot / math.hypot(*one) / math.hypot(*other))
        expected[bound] = -sum(math.log(1 / (1 + math.exp(-c / 0.1)) + 1e-8) for c in cosines) / len(cosines)
    for bound, want in expected.items():
        settings = ClipAlignSettings.model_validate({"target": target, "temperature": 0.1, "clamp": bound})
        assert math.isclose(clip_align_loss(encoder, SCENE_INDEX, settings).item(), want, rel_tol=1e-4)
    assert expected[10.0] != pytest.approx(expected[None], rel=1e-2)


def test_clamp_stops_the_gradient_of_what_it_clamps() -> None:
    f2d = torch.tensor([[20.0, 1.0, 2.0, 3.0]], requires_grad=True)
    encoder = EncoderOutput(
        fused=torch.zeros(1, 4), f3d=torch.randn(1, 4), f2d=f2d, valid=torch.ones(1, dtype=torch.bool)
    )
    clip_align_loss(
        encoder, torch.zeros(1, dtype=torch.int64), ClipAlignSettings(clamp=10.0, gradient_flow=1.0)
    ).backward()
    assert f2d.grad is not None
    assert f2d.grad[0, 0] == 0
    assert (f2d.grad[0, 1:] != 0).all()


def test_note_003s_formula_lets_95_percent_through_not_5() -> None:
    f = torch.randn(5, 4, requires_grad=True)
    upstream = torch.randn(5, 4)
    (noted,) = torch.autograd.grad(0.95 * f + 0.05 * f.detach(), f, upstream)
    (ours,) = torch.autograd.grad(limit_gradient(f, 0.05), f, upstream)
    assert math.isclose((noted.norm() / upstream.norm()).item(), 0.95, rel_tol=1e-6)
    assert math.isclose((ours.norm() / upstream.norm()).item(), 0.05, rel_tol=1e-6)


def test_points_without_a_view_have_no_gradient_even_if_they_are_nan() -> None:
    f2d = torch.randn(5, 4)
    f2d[1] = math.nan
    f2d.requires_grad_()
    encoder = _encoder(f2d)
    loss = clip_align_loss(encoder, SCENE_INDEX, ClipAlignSettings(gradient_flow=1.0))
    loss.backward()
    assert torch.isfinite(loss)
    assert f2d.grad is not None
    assert f2d.grad[[1, 4]].abs().sum() == 0
    assert torch.isfinite(f2d.grad).all()


def test_without_valid_points_it_is_zero_and_has_a_graph() -> None:
    f2d = torch.randn(5, 4, requires_grad=True)
    encoder = _encoder(f2d, valid=torch.zeros(5, dtype=torch.bool))
    loss = clip_align_loss(encoder, SCENE_INDEX, ClipAlignSettings())
    loss.backward()
    assert loss.item() == 0.0
    for side in (f2d.grad, encoder.f3d.grad):
        assert side is not None
        assert side.abs().sum() == 0
