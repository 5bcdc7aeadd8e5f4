"""A Res16UNet alone, as MinkowskiEngine's own and pre-training projects store it.

Kernels are (K, I, O), or (I, O) for size 1, with MinkowskiEngine's order of the K offsets, in which x runs fastest. An
order of another kind cannot be told from the file.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from bifusion_diag.model.checkpoints.layout import Layout, Rule

_FIRST = "conv0p1s1.kernel"


def res16unet_layout(names: Collection[str]) -> Layout | None:
    """The layout of a U-Net whose names all begin alike, None where there is none."""
    for name in names:
        if name.endswith(_FIRST):
            prefix = name.removesuffix(_FIRST)
            start = re.escape(prefix)
            rules = (Rule(start, "encoder.backbone."),)
            return Layout("Res16UNet", (start,), rules, covers=("encoder.backbone.",))
    return None
