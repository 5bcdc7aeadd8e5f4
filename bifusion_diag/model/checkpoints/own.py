"""This project's own checkpoints: the weights of an earlier run, or a plain state dict of the model."""

from __future__ import annotations

from bifusion_diag.model.checkpoints.layout import Layout, Rule

RUN = Layout(
    "bifusion-diag checkpoint",
    signature=(r"model/encoder\.", r"model/decoder\."),
    rules=(Rule(r"model/", ""),),
    covers=None,
    aside=("optimizer/", "random/"),
)

STATE_DICT = Layout(
    "bifusion-diag state dict", signature=(r"encoder\.", r"decoder\."), rules=(Rule(r"", ""),), covers=None
)
