"""Mask3D (Schult et al., ICRA 2023): alone, or as Lightning stores it, under ``model.`` and with its criterion."""

from __future__ import annotations

from bifusion_diag.model.checkpoints.layout import Layout

MASK3D = Layout(
    "Mask3D",
    signature=(r"(model\.)?backbone\.", r"(model\.)?mask_embed_head\."),
    rules=((r"(?:model\.)?backbone\.", "encoder.backbone."),),
    covers=("encoder.backbone.",),
    aside=("criterion.",),
)
