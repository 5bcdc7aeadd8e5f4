"""The fused encoder with each fusion, and without CLIP; how much of the CLIP loss's gradient really flows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bifusion_diag.config.settings import BackboneSettings, ClipAlignSettings, ModelSettings
from bifusion_diag.data.batch import Batch
from bifusion_diag.model.encoder_bifusion import BiFusionEncoder
from bifusion_diag.model.losses.clip_align import clip_align_loss
from bifusion_diag.model.outputs import EncoderOutput
from bifusion_diag.model.sparse import make_engine

BACKBONE = BackboneSettings(
    layers=(1,) * 8, planes=(4, 4, 8, 8, 8, 8, 4, 6), init_dim=4, first_kernel=3, voxel_size=0.1
)
CLIP = {"width": 16, "heads": 2, "head_hidden": 12}


def make_encoder(fusion: str = "lite", *, clip: bool = True) -> BiFusionEncoder:
    torch.manual_seed(1)
    settings = {"fusion": fusion, "common_width": 32, "film_hidden": 8, "backbone": BACKBONE}
    return BiFusionEncoder(
        ModelSettings.model_validate({**settings, "clip": {**CLIP, "use": clip}}),
        early_share=0.0,
        engine=make_engine("native"),
    )


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_declared_and_real_gradient_flow_of_clip_align(share: float, batch_of_two: Callable[..., Batch]) -> None:
    """Target point: the points' 2D head gets the declared share. Target global: the global token's head does; the
    points' 2D head is reached through the fused feature, whatever is declared."""
    batch = batch_of_two()

    def flow(target: str, head: str, share: float) -> Tensor:
        encoder = make_encoder()
        settings = ClipAlignSettings.model_validate({"target": target, "gradient_flow": share})
        clip_align_loss(encoder(batch), batch.scene_index, settings).backward()
        weights = list(encoder.get_submodule(head).parameters())
        if share == 0.0 and (target == "global") == (head == "global_head"):
            assert all(weight.grad is None for weight in weights)  # no graph, rather than a gradient of 0
        return torch.cat([w.new_zeros(w.numel()) if w.grad is None else w.grad.flatten() for w in weights])

    for target, head in (("point", "spatial_head"), ("global", "global_head")):
        torch.testing.assert_close(flow(target, head, share), share * flow(target, head, 1.0))
    through_fusion = flow("global", "spatial_head", share)
    assert through_fusion.norm() > 0
    torch.testing.assert_close(through_fusion, flow("global", "spatial_head", 1.0))


def test_without_clip_there_is_no_2d_branch_at_all(batch_of_two: Callable[..., Batch]) -> None:
    encoder = make_encoder("simple", clip=False).eval()
    assert list(dict(encoder.named_children())) == ["backbone", "head3d", "normalize3d", "geometry", "film"]
    for parameter in encoder.film.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    batch = batch_of_two()
    encodings: list[Tensor] = []
    encoder.geometry.register_forward_hook(lambda module, args, out: encodings.append(out))
    out = encoder(batch)
    assert (out.f2d, out.alpha, out.valid, out.global2d) == (None,) * 4
    gamma, beta = encoder.film.mlp(encodings[0]).chunk(2, dim=1)
    torch.testing.assert_close(out.fused, (1 + gamma) * out.f3d + beta)
    assert torch.equal(encodings[0][:, 6:15], torch.eye(3).flatten().expand(len(batch.xyz), 9))  # no camera
    assert "clip_weights" not in encoder.provenance()

    blind = replace(batch, images=torch.zeros(0), depth=torch.zeros(0), pose=batch.pose * torch.nan)
    assert torch.equal(encoder(blind).fused, out.fused)


def test_simple_fusion_with_clip_is_the_mean_after_film(batch_of_two: Callable[..., Batch]) -> None:
    encoder = make_encoder("simple")  # a fresh FiLM is the identity
    out = encoder(batch_of_two())
    torch.testing.assert_close(out.fused, torch.where(out.valid[:, None], (out.f2d + out.f3d) / 2, out.f3d))
    assert torch.equal(out.alpha[:, 0], 0.5 * out.valid)


@pytest.mark.parametrize("fusion", ["simple", "enhanced"])
def test_every_part_learns_and_a_rerun_is_bit_identical(fusion: str, batch_of_two: Callable[..., Batch]) -> None:
    def run() -> tuple[BiFusionEncoder, EncoderOutput]:
        encoder = make_encoder(fusion)
        torch.nn.init.normal_(encoder.film.mlp[2].weight, std=0.1)  # at the identity, only FiLM's last layer learns
        out = encoder(batch_of_two())
        (out.fused.sin().sum() + out.global2d.sin().sum()).backward()
        return encoder, out

    (encoder, out), (again, same) = run(), run()
    assert torch.equal(out.fused, same.fused)
    for (name, parameter), other in zip(encoder.named_parameters(), again.parameters(), strict=True):
        if name.startswith("clip."):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert torch.equal(parameter.grad, other.grad), name
            # a bias of all keys shifts every score alike: softmax does not see it
            assert parameter.grad.any() or name == "gate.attention.key.bias", name
