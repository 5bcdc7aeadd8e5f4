"""``bifusion-diag presets``: what can be trained."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def presets(
    name: Annotated[str | None, typer.Argument(help="Show every setting of this preset, as YAML.")] = None,
) -> None:
    """List the model presets, or show one with all its settings (a start for --config)."""
    from bifusion_diag.config import load_settings, preset_description, preset_names

    if name is not None:
        import yaml

        typer.echo(yaml.safe_dump(load_settings(name).model_dump(mode="json"), sort_keys=False).rstrip())
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("preset", style="bold")
    table.add_column("what it is")
    for preset in preset_names():
        table.add_row(preset, preset_description(preset))
    Console().print(table)
