"""Both encoders on a small batch: what flows where, and what must not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bifusion_diag.config.settings import BackboneSettings, ClipSettings, ModelSettings, ProjectionSettings
from bifusion_diag.data.batch import Batch
from bifusion_diag.model.encoder3d import Encoder3D
from bifusion_diag.model.encoder_bifusion import BiFusionEncoder
from bifusion_diag.model.outputs import EncoderOutput
from bifusion_diag.model.sparse import make_engine

H, W = 12, 16
BACKBONE = BackboneSettings(
    layers=(1,) * 8, planes=(4, 4, 8, 8, 8, 8, 4, 6), init_dim=4, first_kernel=3, voxel_size=0.1
)
SETTINGS = ModelSettings(
    common_width=32, film_hidden=8, backbone=BACKBONE, clip=ClipSettings(width=16, heads=2, head_hidden=12)
)


def make_encoder(normalize: str = "before_sampling", sanitize: str = "strict") -> BiFusionEncoder:
    torch.manual_seed(1)
    projection = ProjectionSettings.model_validate({"normalize": normalize, "sanitize": sanitize})
    settings = SETTINGS.model_copy(update={"projection": projection})
    return BiFusionEncoder(settings, early_share=0.0, engine=make_engine("native"))


def catch_gradient(module: torch.nn.Module) -> list[Tensor]:
    """The gradient of the module's output, once backward has run."""
    caught: list[Tensor] = []

    def watch(module: torch.nn.Module, args: tuple, out: Tensor) -> None:
        out.register_hook(caught.append)

    module.register_forward_hook(watch)
    return caught


def sampled_gradient(encoder: BiFusionEncoder, batch: Batch) -> tuple[EncoderOutput, Tensor]:
    """Run forward and backward; also the gradient that arrives at the sampled features."""
    caught = catch_gradient(encoder.sampling)
    out = encoder(batch)
    out.fused.sin().sum().backward()
    return out, caught[0]


def test_baseline_hands_on_the_unets_features(batch_of_two: Callable[..., Batch]) -> None:
    encoder = Encoder3D(BACKBONE, engine=make_engine("native"))
    batch = batch_of_two()
    out = encoder.eval()(batch)
    assert encoder.out_channels == 6
    voxels = encoder.backbone.voxelize(batch.coords, batch.color, batch.scene_index)
    assert torch.equal(out.fused, voxels.slice(encoder.backbone(voxels.tensor)))
    assert torch.equal(out.fused, out.f3d)
    assert out[2:] == (None,) * 5


def test_scales_come_beside_the_same_features(batch_of_two: Callable[..., Batch]) -> None:
    batch = batch_of_two()
    outputs = []
    watched = []
    for scales in (False, True):
        torch.manual_seed(0)
        encoder = Encoder3D(BACKBONE, engine=make_engine("native"), scales=scales).eval()
        encoder.backbone.register_forward_hook(lambda _module, _args, out: watched.append(out))
        outputs.append(encoder(batch))
    plain, rich = outputs
    assert len(watched) == 2  # the U-Net's hooks see both ways
    assert watched[1] is rich.scales.tensors
    assert torch.equal(plain.fused, rich.fused)
    assert [tensor.stride for tensor in rich.scales.tensors] == [16, 8, 4, 2, 1]
    assert torch.equal(rich.scales.tensors[-1].feats[rich.scales.point_voxel], rich.fused)


def test_fused_encoder_declares_its_shapes_and_norms(batch_of_two: Callable[..., Batch]) -> None:
    encoder = make_encoder()
    out = encoder(batch_of_two())
    n = 2 * H * W
    assert out.fused.shape == out.f3d.shape == out.f2d.shape == (n, 32)
    assert out.alpha.shape == (n, 1)
    assert out.global2d.shape == (2, 32)
    seen = torch.ones(n, dtype=torch.bool)
    seen[: H * W : 3] = False
    assert torch.equal(out.valid, seen)
    torch.testing.assert_close(out.f3d.norm(dim=1), torch.ones(n))
    torch.testing.assert_close(out.global2d.norm(dim=1), torch.ones(2))
    assert (out.f2d[~seen] == 0).all()
    length = out.f2d[seen].norm(dim=1)  # a mean of unit vectors
    assert ((length > 0.1) & (length < 1 + 1e-5)).all()
    assert list(dict(encoder.named_children())) == [
        "clip",
        "spatial_head",
        "global_head",
        "normalize_global",
        "projection",
        "sampling",
        "normalize2d",
        "backbone",
        "head3d",
        "normalize3d",
        "geometry",
        "film",
        "gate",
    ]


def test_fused_is_film_and_gate_of_the_reported_branches(batch_of_two: Callable[..., Batch]) -> None:
    encoder = make_encoder()  # a fresh FiLM is the identity
    batch = batch_of_two()
    out = encoder(batch)
    gate = encoder.gate(out.f2d, out.f3d, out.valid, batch.point_counts, batch.xyz)
    torch.testing.assert_close(out.fused, gate.fused)
    torch.testing.assert_close(out.alpha, gate.alpha)


def test_the_global_feature_is_the_mean_of_the_scenes_own_views(batch_of_two: Callable[..., Batch]) -> None:
    encoder = make_encoder().eval()
    batch = batch_of_two()
    out = encoder(batch)
    for scene in range(2):
        views = [encoder.global_head(encoder.clip(batch.images[scene, view][None, None]).pooled)[0] for view in (0, 1)]
        mean = sum(views) / 2
        torch.testing.assert_close(out.global2d[scene], mean / mean.norm())


def test_after_sampling_gives_unit_vectors(batch_of_two: Callable[..., Batch]) -> None:
    out = make_encoder("after_sampling")(batch_of_two())
    torch.testing.assert_close(out.f2d.norm(dim=1), out.valid.float())


def test_augmented_coordinates_move_neither_projection_nor_encoding(batch_of_two: Callable[..., Batch]) -> None:
    encoder = make_encoder().eval()
    batch = batch_of_two()
    encodings: list[Tensor] = []
    encoder.geometry.register_forward_hook(lambda module, args, out: encodings.append(out))
    before, after = encoder(batch), encoder(replace(batch, coords=batch.coords * 1.1 + 0.3))
    assert torch.equal(before.f2d, after.f2d)
    assert torch.equal(before.valid, after.valid)
    assert torch.equal(*encodings)
    assert not torch.equal(before.f3d, after.f3d)


def test_every_trainable_parameter_learns_and_clip_does_not(batch_of_two: Callable[..., Batch]) -> None:
    encoder = make_encoder()
    torch.nn.init.normal_(encoder.film.mlp[2].weight, std=0.1)  # at the identity, only FiLM's last layer would learn
    out = encoder(batch_of_two())
    (out.fused.sin().sum() + out.global2d.sin().sum()).backward()
    for name, parameter in encoder.named_parameters():
        if name.startswith("clip."):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("branch", "learning"),
    [
        ("f2d", {"spatial_head"}),
        ("f3d", {"backbone", "head3d"}),
        ("global2d", {"global_head"}),
        ("alpha", {"spatial_head", "backbone", "head3d", "film", "gate"}),
    ],
)
def test_each_output_teaches_the_parts_it_is_made_of(
    branch: str, learning: set[str], batch_of_two: Callable[..., Batch]
) -> None:
    """So that a loss term on a branch, as ``clip_align`` is one, trains that branch and no other."""
    encoder = make_encoder()
    getattr(encoder(batch_of_two()), branch).sin().sum().backward()
    taught = {name.partition(".")[0] for name, p in encoder.named_parameters() if p.grad is not None and p.grad.any()}
    assert taught == learning


def test_zero_features_normalised_after_sampling_have_a_gain_of_1e12(batch_of_two: Callable[..., Batch]) -> None:
    batch = batch_of_two()
    encoder = make_encoder("after_sampling")
    arriving = catch_gradient(encoder.normalize2d)
    out, gradient = sampled_gradient(encoder, batch)
    torch.testing.assert_close(gradient[~out.valid], arriving[0][~out.valid] * 1e12)
    assert gradient[~out.valid].norm() > 1e6 * gradient[out.valid].norm()

    encoder = make_encoder("before_sampling")
    out, gradient = sampled_gradient(encoder, batch)
    assert gradient.norm() < 1e3


@pytest.mark.parametrize("normalize", ["before_sampling", "after_sampling"])
def test_a_lost_pose_leaves_finite_gradients_and_no_2d_feature(
    normalize: str, batch_of_two: Callable[..., Batch]
) -> None:
    encoder = make_encoder(normalize)
    out, _ = sampled_gradient(encoder, batch_of_two(lost=True))
    assert not out.valid[H * W :].any()
    assert (out.f2d[H * W :] == 0).all()
    torch.testing.assert_close(out.alpha[H * W :], torch.full((H * W, 1), 0.1))
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


def test_points_out_of_view_do_not_reach_the_2d_heads_gradient(batch_of_two: Callable[..., Batch]) -> None:
    """Under strict handling the 2D head learns from valid points only, whatever their features' gradient is."""
    encoder = make_encoder("before_sampling")
    batch = batch_of_two()
    out = encoder(batch)
    out.f2d[~out.valid].sum().backward()
    for parameter in encoder.spatial_head.parameters():
        assert parameter.grad is None or (parameter.grad == 0).all()


def test_rerun_is_bit_identical(batch_of_two: Callable[..., Batch]) -> None:
    def run() -> list[Tensor]:
        encoder = make_encoder()
        out, _ = sampled_gradient(encoder, batch_of_two())
        return [out.fused, *(p.grad for p in encoder.parameters() if p.grad is not None)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_one_point_is_enough(batch_of_two: Callable[..., Batch]) -> None:
    batch = batch_of_two()
    one = replace(
        batch,
        **{name: getattr(batch, name)[-1:] for name in ("xyz", "coords", "color", "semantic", "instance")},
        scene_index=torch.tensor([1]),
        point_counts=(0, 1),
        superpoint=torch.tensor([0]),
        superpoint_counts=(0, 1),
    )
    encoder = make_encoder()
    out, _ = sampled_gradient(encoder, one)
    assert torch.isfinite(out.fused).all()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
