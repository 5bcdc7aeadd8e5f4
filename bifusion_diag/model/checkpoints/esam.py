"""ESAM (Xu et al., ICLR 2025) and OneFormer3D (Kolodiazhnyi et al., CVPR 2024), whose decoder ESAM builds on.

Names as in their modules ``mink_unet``, ``geo_aware_pool`` and ``query_decoder``. What they have beside these (ESAM's
memory, merging head and image branch, OneFormer3D's spconv U-Net) has no counterpart here.
"""

from __future__ import annotations

from bifusion_diag.model.checkpoints.layout import Layout, Rule

_BACKBONE = (Rule(r"backbone\.", "encoder.backbone."),)

_DECODER = (
    Rule(r"decoder\.input_proj\.", "decoder.key_projection."),
    Rule(r"decoder\.query\.", "decoder.learnable."),
    Rule(r"decoder\.query_proj\.", "decoder.query_projection."),
    Rule(r"decoder\.x_mask\.", "decoder.superpoint_mask."),
    Rule(r"decoder\.x_pts_mask\.", "decoder.point_mask."),
    Rule(r"decoder\.cross_attn_layers\.(\d+)\.attn\.", r"decoder.layers.\1.cross_attention.attention."),
    Rule(r"decoder\.cross_attn_layers\.(\d+)\.norm\.", r"decoder.layers.\1.cross_attention.norm."),
    Rule(r"decoder\.self_attn_layers\.(\d+)\.attn\.", r"decoder.layers.\1.self_attention.attention."),
    Rule(r"decoder\.self_attn_layers\.(\d+)\.norm\.", r"decoder.layers.\1.self_attention.norm."),
    Rule(r"decoder\.ffn_layers\.(\d+)\.", r"decoder.layers.\1.feed_forward."),
    Rule(r"decoder\.out_norm\.", "decoder.query_norm."),
    Rule(r"decoder\.out_cls\.", "decoder.heads.classes."),
    Rule(r"decoder\.out_score\.", "decoder.heads.score."),
    Rule(r"decoder\.out_reg\.", "decoder.heads.box."),
    Rule(r"decoder\.out_sem\.", "decoder.semantic_head."),
)

_POOL = (
    Rule(r"pool\.pts_proj1\.", "pool.position."),
    Rule(r"pool\.pts_proj2\.", "pool.weight."),
)

ESAM = Layout(
    "ESAM",
    signature=(r"pool\.pts_proj1\.", r"decoder\.cross_attn_layers\."),
    rules=_BACKBONE + _POOL + _DECODER,
    covers=("encoder.backbone.", "pool.", "decoder."),
)

ONEFORMER3D = Layout(
    "OneFormer3D",
    signature=(r"decoder\.cross_attn_layers\.",),
    rules=_BACKBONE + _DECODER,
    covers=("encoder.backbone.", "decoder."),
)
