"""What of CLIP's visual tower learns: nothing, low-rank updates (LoRA), or its last blocks."""

from __future__ import annotations

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from bifusion_diag.config.settings import ClipSettings
from bifusion_diag.errors import UserError
from bifusion_diag.model.randomness import own_random_numbers


class LowRankUpdate(nn.Module):
    """W → W + (α / r) · B A, where A and B alone learn (Hu et al., "LoRA", ICLR 2022, section 4.1).

    A is Gaussian with variance 1 / in, B is zero: at the start the weight is what it was, to the bit. A weight that
    stacks several matrices, as attention stacks those of queries, keys and values, has an update for each that learns.

    Args:
        weight: (groups · out, in), the weight that is updated.
        learns: of each of the stacked matrices, whether it is updated.
        rank, alpha: r and α.
    """

    def __init__(self, weight: Tensor, learns: tuple[bool, ...], *, rank: int, alpha: float) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.learns = learns
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.randn(sum(learns), rank, columns) * columns**-0.5)  # A
        self.up = nn.Parameter(torch.zeros(sum(learns), rows // len(learns), rank))  # B

    def forward(self, weight: Tensor) -> Tensor:
        """The updated weight."""
        updates = iter(self.scale * (self.up @ self.down))
        still = torch.zeros_like(weight[: len(weight) // len(self.learns)])
        return weight + torch.cat([next(updates) if learns else still for learns in self.learns])


def tune(visual: VisionTransformer, settings: ClipSettings) -> None:
    """Freeze the tower but for what the settings let learn. Weights are loaded before.

    Raises:
        UserError: the tower has fewer blocks.
    """
    visual.requires_grad_(False)
    if settings.tune == "none":
        return
    blocks = visual.transformer.resblocks
    if settings.tune_blocks > len(blocks):
        raise UserError(
            f"model.clip.tune_blocks: {settings.tune_blocks} of the last blocks are to learn; "
            f"{settings.architecture} has {len(blocks)}."
        )
    last = blocks[-settings.tune_blocks :]
    if settings.tune == "blocks":
        last.requires_grad_(True)
        visual.ln_post.requires_grad_(True)
        return
    rank, alpha = settings.lora_rank, settings.lora_alpha
    with own_random_numbers("LoRA of CLIP"):
        for block in last:
            attention = block.attn
            queries_and_values = LowRankUpdate(attention.in_proj_weight, (True, False, True), rank=rank, alpha=alpha)
            register_parametrization(attention, "in_proj_weight", queries_and_values)
            output = LowRankUpdate(attention.out_proj.weight, (True,), rank=rank, alpha=alpha)
            register_parametrization(attention.out_proj, "weight", output)
