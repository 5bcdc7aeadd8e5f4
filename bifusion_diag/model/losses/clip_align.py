"""Pull 2D and 3D features together: −log(σ(cos/τ) + 1e-8).

Documents 002 and 003. The derivative with respect to the cosine is −(1/τ)(1 − σ)·σ/(σ + 1e-8), at most 1/τ in size:
14.29 for τ = 0.07. There are no negatives, so the loss can only pull features together.

Legend: N points · M compared pairs · B scenes · C width.
"""

from __future__ import annotations

from torch import Tensor, nn

from bifusion_diag.config.settings import ClipAlignSettings
from bifusion_diag.model.heads import L2_ROWS
from bifusion_diag.model.outputs import EncoderOutput

_INSIDE_LOG = 1e-8


def clip_align_loss(
    encoder: EncoderOutput,
    scene_index: Tensor,
    settings: ClipAlignSettings,
    normalize2d: nn.Module = L2_ROWS,
    normalize3d: nn.Module = L2_ROWS,
) -> Tensor:
    """Align the 2D with the 3D side.

    Target ``point``: f2d with f3d at the points that have a 2D feature. Target ``global``: the scene's global 2D
    feature with the fused feature of each of its points. The fused feature is made of f2d too: ``gradient_flow`` limits
    what reaches the global token's head, and not what reaches f2d through the gate.

    Args:
        encoder: output of a fused encoder.
        scene_index: (N,) int64.
        settings: target, τ, the clamp, and the share of the gradient that reaches the 2D side.
        normalize2d: the L2 normalisation of the 2D side, a module of the criterion's that instruments can watch.
        normalize3d: that of the other side.

    Returns:
        (), the mean over pairs; 0 if there is no pair.
    """
    if settings.target == "global":
        assert encoder.global2d is not None
        side_2d, side_3d = encoder.global2d.index_select(0, scene_index), encoder.fused
    else:
        assert encoder.f2d is not None
        assert encoder.valid is not None
        rows = encoder.valid.nonzero()[:, 0]
        side_2d, side_3d = encoder.f2d.index_select(0, rows), encoder.f3d.index_select(0, rows)
    written = settings.gradient_formula == "as_written"
    side_2d = limit_gradient(side_2d, 1 - settings.gradient_flow if written else settings.gradient_flow)
    if settings.clamp is not None:
        side_2d, side_3d = (side.clamp(-settings.clamp, settings.clamp) for side in (side_2d, side_3d))
    if len(side_2d) == 0:
        return side_2d.sum() + side_3d.sum()
    cosine = (normalize2d(side_2d) * normalize3d(side_3d)).sum(dim=1)
    return alignment(cosine, settings.temperature).mean()


def alignment(cosine: Tensor, temperature: float) -> Tensor:
    """−log(σ(cos/τ) + 1e-8), element by element."""
    return -((cosine / temperature).sigmoid() + _INSIDE_LOG).log()


def limit_gradient(features: Tensor, share: float) -> Tensor:
    """The same values, with only ``share`` of the gradient: f·r + f.detach()·(1 − r).

    Document 003 writes ``0.95*f + 0.05*f.detach()`` for "5 %" (``gradient_formula: as_written``); that lets 95 %
    through. A share of 0 cuts the graph: a gradient times 0 would still be a gradient, and NaN where it was NaN.
    """
    if share in (0.0, 1.0):
        return features if share else features.detach()
    return features * share + features.detach() * (1 - share)
