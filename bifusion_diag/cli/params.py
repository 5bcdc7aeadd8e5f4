"""``bifusion-diag params``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

#: What the documents say of sizes, beside which the measured ones are shown. Keys are parts of the fused model or of
#: the baseline, both with ESAM's decoder.
CLAIMS = {
    ("bifusion", "total"): "about 89 M (001)",
    ("bifusion", "encoder.gate"): "about 0.12 M (003)",
    ("baseline", "total"): "about 41 M (001)",
}


def params(
    model: Annotated[str | None, typer.Option(help="Preset; `bifusion-diag presets` lists them.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value. May be repeated.")] = None,
) -> None:
    """Count the parameters of a model by part, beside what the documents say of the full-size models."""
    from bifusion_diag.config import load_settings
    from bifusion_diag.model.build import build_model

    settings = load_settings(model, config=config, overrides=set_ or ())
    kind = "baseline" if settings.model.fusion == "none" else "bifusion"
    table = Table(box=None, pad_edge=False, title=f"{settings.preset} ({settings.scale})", title_justify="left")
    table.add_column("part", style="bold")
    table.add_column("parameters", justify="right")
    table.add_column("trainable", justify="right")
    table.add_column("the documents")
    for part, size in build_model(settings).part_sizes().items():
        documented = settings.scale == "full" and settings.model.decoder.masks == "mixed"
        claim = CLAIMS.get((kind, part), "") if documented else ""
        table.add_row(part, f"{size.total:,}", f"{size.trainable:,}", claim)
    Console().print(table)
