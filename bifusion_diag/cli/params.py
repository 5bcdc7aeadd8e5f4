"""``bifusion-diag params``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from bifusion_diag.model.checkpoints import LoadReport

SHOWN_NAMES = 3

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
    init_from: Annotated[
        Path | None, typer.Option(help="Weights of another project or of an earlier run: show what of them fits.")
    ] = None,
) -> None:
    """Count the parameters of a model by part, beside what the documents say of the full-size models."""
    from bifusion_diag.config import load_settings
    from bifusion_diag.model.build import build_model
    from bifusion_diag.model.checkpoints import load_weights

    given = {} if init_from is None else {"model.init_from": str(init_from)}
    settings = load_settings(model, config=config, overrides=set_ or (), values=given)
    kind = "baseline" if settings.model.fusion == "none" else "bifusion"
    documented = (
        settings.scale == "full"
        and settings.model.decoder.masks == "mixed"
        and settings.model.fusion in ("none", "lite")
        and settings.model.common_width == 256
    )
    table = Table(box=None, pad_edge=False, title=f"{settings.preset} ({settings.scale})", title_justify="left")
    table.add_column("part", style="bold")
    table.add_column("parameters", justify="right")
    table.add_column("trainable", justify="right")
    table.add_column("the documents")
    built = build_model(settings)
    report = None if settings.model.init_from is None else load_weights(built, Path(settings.model.init_from))
    for part, size in built.part_sizes().items():
        claim = CLAIMS.get((kind, part), "") if documented else ""
        table.add_row(part, f"{size.total:,}", f"{size.trainable:,}", claim)
    Console().print(table)
    if report is not None:
        _print_report(report)


def _print_report(report: LoadReport) -> None:
    """What became of every tensor of the file and of the model."""
    console = Console()
    title = f"{report.file}: {report.layout}, {report.parameters:,} parameters loaded (sha256 {report.digest[:12]})"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column("tensors", style="bold")
    table.add_column("", justify="right")
    table.add_column("the first ones")
    for kind, names in report.kinds().items():
        if names:
            table.add_row(kind, f"{len(names):,}", escape(", ".join(names[:SHOWN_NAMES])))
    console.print()
    console.print(table)
