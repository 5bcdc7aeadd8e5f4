"""Mask3D (Schult et al., ICRA 2023): alone, or as Lightning stores it, under ``model.`` and with its criterion.

Names as in its modules ``res16unet`` and ``mask3d``, with one decoder for all rounds (``shared_decoder``), as its
published configurations have it. Its 1×1 convolutions are linear layers here.

Its ScanNet200 head has 200 rows and one for no object. The benchmark's order begins wall, chair, floor; Mask3D drops
wall and floor and takes 2 from a class's number, at least 0, so that chair is 0 and table 1. This project's order is
ESAM's, wall, floor, chair, table, with a row for every class: chair is 2 and table 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bifusion_diag.model.checkpoints.layout import Layout, Rule


def _transposed(kernel: Tensor) -> Tensor:
    """MinkowskiEngine's kernel of size 1, (I, O), as a linear weight, (O, I)."""
    return kernel.transpose(0, -1)


def _flat(bias: Tensor) -> Tensor:
    """MinkowskiEngine's bias, (1, O), as a linear one, (O,)."""
    return bias.flatten()


def _linear(weight: Tensor) -> Tensor:
    """A weight of Conv1d of size 1, (O, I, 1), as a linear one, (O, I)."""
    return weight.squeeze(-1)


def _in_our_order(rows: Tensor) -> Tensor:
    """Rows of the ScanNet200 head by this project's classes; wall and floor get the two that never learned."""
    if len(rows) != _SCANNET200_ROWS:
        return rows
    return torch.cat([rows[198:200], rows[:198], rows[200:]])


_SCANNET200_ROWS = 201
_MODEL = r"(?:model\.)?"

MASK3D = Layout(
    "Mask3D",
    signature=(rf"{_MODEL}backbone\.", rf"{_MODEL}mask_embed_head\."),
    rules=(
        Rule(rf"{_MODEL}backbone\.", "encoder.backbone."),
        Rule(rf"{_MODEL}mask_features_head\.kernel$", "decoder.superpoint_mask.weight", _transposed),
        Rule(rf"{_MODEL}mask_features_head\.bias$", "decoder.superpoint_mask.bias", _flat),
        Rule(rf"{_MODEL}query_projection\.layers\.(\d+)\.weight$", r"decoder.query_projection.\1.weight", _linear),
        Rule(rf"{_MODEL}query_projection\.layers\.", "decoder.query_projection."),
        Rule(rf"{_MODEL}mask_embed_head\.", "decoder.query_mask."),
        Rule(rf"{_MODEL}class_embed_head\.", "decoder.classes.", _in_our_order),
        Rule(rf"{_MODEL}pos_enc\.gauss_B$", "decoder.place.frequencies"),
        Rule(rf"{_MODEL}lin_squeeze\.0\.(\d+)\.", r"decoder.layers.\1.key_projection."),
        Rule(rf"{_MODEL}cross_attention\.0\.(\d+)\.multihead_attn\.", r"decoder.layers.\1.cross_attention.attention."),
        Rule(rf"{_MODEL}cross_attention\.0\.(\d+)\.norm\.", r"decoder.layers.\1.cross_attention.norm."),
        Rule(rf"{_MODEL}self_attention\.0\.(\d+)\.self_attn\.", r"decoder.layers.\1.self_attention.attention."),
        Rule(rf"{_MODEL}self_attention\.0\.(\d+)\.norm\.", r"decoder.layers.\1.self_attention.norm."),
        Rule(rf"{_MODEL}ffn_attention\.0\.(\d+)\.linear1\.", r"decoder.layers.\1.feed_forward.net.0."),
        Rule(rf"{_MODEL}ffn_attention\.0\.(\d+)\.linear2\.", r"decoder.layers.\1.feed_forward.net.3."),
        Rule(rf"{_MODEL}ffn_attention\.0\.(\d+)\.norm\.", r"decoder.layers.\1.feed_forward.norm."),
        Rule(rf"{_MODEL}decoder_norm\.", "decoder.query_norm."),
    ),
    covers=("encoder.backbone.", "decoder."),
    aside=("criterion.",),
)
