"""What each way of ``projection.sanitize`` makes of coordinates that are not finite, from the pixel to the gradient.

The oracle of what unguarded code does is ``grid_sample`` with its default padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bifusion_diag.config.settings import BackboneSettings, ClipSettings, ModelSettings, ProjectionSettings
from bifusion_diag.data.batch import Batch
from bifusion_diag.model.encoder_bifusion import BiFusionEncoder
from bifusion_diag.model.outputs import EncoderOutput, Projection
from bifusion_diag.model.projection import PointProjection, PointSampling
from bifusion_diag.model.sparse import make_engine
from bifusion_diag.probes import Monitor

H, W = 12, 16
N = H * W
FOCAL, CENTRE = 14.0, (7.5, 5.5)  # of the batch of two
MODES = ("strict", "replace", "clamp", "none")


def lost_pose(value: float) -> Tensor:
    return torch.full((4, 4), value)


def pose_with_infinite_coordinates() -> Tensor:
    """(x + ∞) · ∞ = +∞ in every coordinate."""
    pose = torch.full((4, 4), torch.inf)
    pose[:3, 3] = -torch.inf
    return pose


def far_pose() -> Tensor:
    """The camera is 10⁹ m behind the scene: finite, beyond the clamp."""
    pose = torch.eye(4)
    pose[2, 3] = -1e9
    return pose


POSES = {
    "nan": lost_pose(torch.nan),
    "-inf": lost_pose(-torch.inf),  # ScanNet's mark of lost tracking; the coordinates are −∞ too
    "+inf": pose_with_infinite_coordinates(),
    "far": far_pose(),
}

# pose → mode → pixel of every point ("world" = as if the world's frame were the camera's)
NAN, ZERO = (math.nan, math.nan), (0.0, 0.0)
PIXELS = {
    "nan": {"strict": ZERO, "replace": "world", "clamp": NAN, "none": NAN},
    # all three coordinates are ∓1e6: x/z = y/z = 1
    "-inf": {"strict": ZERO, "replace": "world", "clamp": (FOCAL + CENTRE[0], FOCAL + CENTRE[1]), "none": NAN},
    "+inf": {"strict": ZERO, "replace": "world", "clamp": (FOCAL + CENTRE[0], FOCAL + CENTRE[1]), "none": NAN},
    "far": dict.fromkeys(MODES, CENTRE),  # nothing is wrong with it; x/z = 0 to seven digits
}
COUNTS = {
    "nan": {mode: {"nan": N} for mode in MODES},
    "-inf": {mode: {"inf": N} for mode in MODES},
    "+inf": {mode: {"inf": N} for mode in MODES},
    "far": {mode: {"occluded": N} for mode in MODES},  # no reading says 10⁹ m
}
CASES = [(pose, mode) for pose in POSES for mode in MODES]


def scene_with(batch: Batch, pose: Tensor) -> tuple[Tensor, tuple[int, ...], Tensor, Tensor, Tensor]:
    """The batch's second scene, whose points come from its first view, with one view of the given pose."""
    return batch.xyz[N:], (N,), batch.depth[1:, :1], batch.intrinsics[1:, :1], pose[None, None]


@pytest.fixture
def project(batch_of_two: Callable[..., Batch]) -> Callable[[str, str], Projection]:
    def run(pose: str, mode: str) -> Projection:
        module = PointProjection(ProjectionSettings.model_validate({"sanitize": mode}))
        return module(*scene_with(batch_of_two(), POSES[pose]))

    return run


@pytest.mark.parametrize(("pose", "mode"), CASES)
def test_pixels_and_validity(project: Callable[[str, str], Projection], pose: str, mode: str) -> None:
    found = project(pose, mode)
    pixel = PIXELS[pose][mode]
    if pixel == "world":  # the first view's true pose is the identity: the wrong coordinates happen to be right
        row, column = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
        want = torch.stack([column, row], -1).reshape(-1, 2).float()
    else:
        want = torch.tensor(pixel).expand(N, 2)
    torch.testing.assert_close(found.uv[:, 0], want, rtol=1e-5, atol=1e-3, equal_nan=True)
    assert found.valid.all() if pixel == "world" else not found.valid.any()
    raw = torch.isfinite(found.camera_xyz)
    assert raw.all() if pose == "far" else not raw.any()  # never what the sanitising made of it


@pytest.mark.parametrize(("pose", "mode"), CASES)
def test_the_projection_probe_counts_what_came_in(batch_of_two: Callable[..., Batch], pose: str, mode: str) -> None:
    model = torch.nn.Module()
    model.projection = PointProjection(ProjectionSettings.model_validate({"sanitize": mode}))
    with Monitor(model, probes=["projection"]) as monitor:
        with monitor.step():
            found = model.projection(*scene_with(batch_of_two(), POSES[pose]))
        monitor.end_step()
        row = monitor.latest()
    expected = dict.fromkeys(("nan", "inf", "behind", "outside", "occluded"), 0) | COUNTS[pose][mode]
    assert {name: row[f"projection/{name}"] for name in expected} == expected
    assert (row["projection/points"], row["projection/valid"]) == (N, found.valid.sum())


@pytest.mark.parametrize(("pose", "mode"), CASES)
def test_sampled_features_and_their_gradient(project: Callable[[str, str], Projection], pose: str, mode: str) -> None:
    found = project(pose, mode)
    maps = torch.randn(1, 3, 4, 5, requires_grad=True)
    sampling = PointSampling(ProjectionSettings.model_validate({"sanitize": mode}))
    sampled = sampling(maps, found, torch.zeros(N, dtype=torch.int64), (H, W))
    sampled.sum().backward()
    assert maps.grad is not None
    if mode == "replace" and pose != "far":
        assert torch.isfinite(sampled).all()
        assert sampled.abs().sum() > 0
        assert torch.isfinite(maps.grad).all()
    elif (pose == "nan" and mode in ("clamp", "none")) or (mode == "none" and pose in ("-inf", "+inf")):
        assert torch.isnan(sampled).all()
        assert torch.isnan(maps.grad).any()
    else:  # invalid points, with a finite pixel or none
        assert (sampled == 0).all()
        assert (maps.grad == 0).all()


@pytest.mark.parametrize("mode", ["clamp", "none"])
def test_unguarded_sampling_is_nan_where_grid_sample_is(mode: str) -> None:
    maps = torch.randn(1, 3, 4, 5)
    uv = torch.tensor([[3.0, 4.0], [math.nan, 4.0], [3.0, math.nan], [math.inf, 4.0], [3.0, -math.inf], [900.0, 4.0]])
    valid = torch.tensor([True, False, False, False, False, False])
    flags = valid[:, None]
    view = torch.zeros(6, dtype=torch.int64)
    projection = Projection(torch.zeros(6, 1, 3), uv[:, None], flags, flags, flags, view, valid)
    settings = ProjectionSettings.model_validate({"sanitize": mode})
    found = PointSampling(settings)(maps, projection, torch.zeros(6, dtype=torch.int64), (H, W))
    grid = (2 * uv + 1) / torch.tensor([W, H]) - 1
    want = F.grid_sample(maps, grid[None, None], align_corners=False)[0, :, 0].T
    torch.testing.assert_close(found, want, equal_nan=True)


def test_clamp_touches_only_views_that_are_broken() -> None:
    """Of two views on the same points, one overflows at its last point and is clamped whole."""
    turn = math.sqrt(0.5)
    turned = torch.eye(4)
    turned[0, 0] = turned[0, 2] = turned[2, 2] = turn
    turned[2, 0] = -turn
    pose = torch.stack([torch.eye(4), turned])[None]
    xyz = torch.tensor([[0.0, 0.1, 2.0], [0.0, 0.0, 5e6], [3e38, 0.0, 3e38]])
    intrinsics = torch.tensor([[FOCAL, 0, CENTRE[0]], [0, FOCAL, CENTRE[1]], [0, 0, 1.0]]).expand(1, 2, 3, 3)
    found = PointProjection(ProjectionSettings(sanitize="clamp"))(xyz, (3,), torch.ones(1, 2, H, W), intrinsics, pose)
    assert torch.isfinite(found.camera_xyz[:, 0]).all()
    assert torch.isinf(found.camera_xyz[2, 1]).any()
    # view 0 is as it was: 5e6 m straight ahead
    torch.testing.assert_close(found.uv[1, 0], torch.tensor(CENTRE))
    # view 1: (−5e6·√½, 0, 5e6·√½) is clamped to (−1e6, 0, 1e6), which keeps the pixel here; (0, 0, ∞) → (0, 0, 1e6)
    torch.testing.assert_close(found.uv[1, 1], torch.tensor([CENTRE[0] - FOCAL, CENTRE[1]]))
    assert torch.isfinite(found.uv[2, 1]).all()
    assert not found.valid[1:].any()


# ------------------------------------------------------------------------------------------------ the whole encoder


def make_encoder(mode: str, fusion: str = "lite", normalize: str = "before_sampling") -> BiFusionEncoder:
    torch.manual_seed(1)
    settings = ModelSettings(
        fusion=fusion,  # type: ignore[arg-type]
        common_width=32,
        film_hidden=8,
        backbone=BackboneSettings(
            layers=(1,) * 8, planes=(4, 4, 8, 8, 8, 8, 4, 6), init_dim=4, first_kernel=3, voxel_size=0.1
        ),
        clip=ClipSettings(width=16, heads=2, head_hidden=12),
        projection=ProjectionSettings.model_validate({"sanitize": mode, "normalize": normalize}),
    )
    return BiFusionEncoder(settings, early_share=0.0, engine=make_engine("native"))


def run_encoder(encoder: BiFusionEncoder, batch: Batch, pose: str) -> tuple[EncoderOutput, Tensor]:
    """Scene 0 as it is, scene 1 with no other pose than the given one; a loss over every feature, backward."""
    poses = batch.pose.clone()
    poses[1] = POSES[pose]
    out = encoder(replace(batch, pose=poses))
    loss = out.fused.sin().mean()
    loss.backward()
    return out, loss.detach()


def gradients(encoder: BiFusionEncoder, part: str) -> Tensor:
    return torch.cat([p.grad.flatten() for p in encoder.get_submodule(part).parameters() if p.grad is not None])


@pytest.mark.parametrize(("pose", "mode"), CASES)
def test_fused_features_loss_and_gradients(batch_of_two: Callable[..., Batch], pose: str, mode: str) -> None:
    encoder = make_encoder(mode)
    out, loss = run_encoder(encoder, batch_of_two(), pose)
    good, bad = out.fused[:N], out.fused[N:]
    assert torch.isfinite(good).all()  # the other scene is never harmed in the forward pass
    if torch.isnan(torch.tensor(PIXELS[pose][mode]) if PIXELS[pose][mode] != "world" else torch.zeros(1)).any():
        assert torch.isnan(bad).all()  # by way of the mean over the scene, every point of it
        assert not out.valid[N:].any()
        assert torch.isnan(loss)
        for part in ("spatial_head", "gate", "film"):
            assert torch.isnan(gradients(encoder, part)).any(), part
    else:
        assert torch.isfinite(bad).all()
        assert torch.isfinite(loss)
        for part in ("spatial_head", "gate", "film", "head3d", "backbone"):
            assert torch.isfinite(gradients(encoder, part)).all(), part


@pytest.mark.parametrize("pose", POSES)
def test_under_strict_a_bad_scene_adds_nothing_to_the_2d_heads_gradient(
    batch_of_two: Callable[..., Batch], pose: str
) -> None:
    """The gradient is that of a scene whose camera looks the other way: no point is valid either."""
    batch = batch_of_two()
    away = torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    found = []
    for bad in (POSES[pose], away):
        encoder = make_encoder("strict")
        poses = batch.pose.clone()
        poses[1] = bad
        out = encoder(replace(batch, pose=poses))
        assert not out.valid[N:].any()
        out.fused.sin().mean().backward()
        found.append(gradients(encoder, "spatial_head"))
    assert torch.equal(*found)
    assert found[0].abs().sum() > 0


def test_simple_fusion_hides_the_nan_from_the_loss_but_not_from_the_gradient(
    batch_of_two: Callable[..., Batch],
) -> None:
    """Its torch.where selects f3D where no view is valid: the loss is finite, 0 · NaN waits in the backward pass."""
    encoder = make_encoder("none", fusion="simple")
    out, loss = run_encoder(encoder, batch_of_two(), "nan")
    assert torch.isfinite(out.fused).all()
    assert torch.isfinite(loss)
    assert torch.isnan(gradients(encoder, "spatial_head")).any()


@pytest.mark.parametrize("fusion", ["simple", "enhanced"])
def test_strict_keeps_every_fusion_finite(batch_of_two: Callable[..., Batch], fusion: str) -> None:
    encoder = make_encoder("strict", fusion=fusion)
    for pose in POSES:
        encoder.zero_grad()
        out, _ = run_encoder(encoder, batch_of_two(), pose)
        assert torch.isfinite(out.fused).all()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in encoder.parameters())
