"""``bifusion-diag audit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.status import Status

from bifusion_diag.cli.options import ThresholdOptions, ThresholdsFile
from bifusion_diag.cli.output import print_written
from bifusion_diag.errors import UserError


def audit(
    model: Annotated[
        str | None, typer.Option(help="Preset; `bifusion-diag presets` lists them. Default: bifusion.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.")] = None,
    data: Annotated[str | None, typer.Option(help="'synthetic', or a folder of RGB-D frames.")] = None,
    scale: Annotated[
        str | None, typer.Option(help="full, or small: the same architecture, every width a quarter.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps that the run is to have.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Scenes a step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, data and queries.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, for example optim.lr=1e-4. May be repeated.")
    ] = None,
    scan: Annotated[int, typer.Option(min=1, help="Scenes that the data scan looks at, evenly spread.")] = 32,
    scan_seconds: Annotated[float, typer.Option(min=0.0, help="After so long it looks at no further scene.")] = 60.0,
    threshold: ThresholdOptions = None,
    thresholds: ThresholdsFile = None,
    json: Annotated[Path | None, typer.Option(help="Write everything that was measured as JSON.")] = None,
) -> None:
    """Measure a run before it is trained: gradients, extremes, weights, schedule, optimiser and data.

    The configured model takes the run's first batch. Nothing is trained, and nothing is written but --json.

    Exit codes: 0 no error found · 1 some were · 2 bad input.
    """
    from bifusion_diag.config import load_settings
    from bifusion_diag.diagnosis.thresholds import read_thresholds
    from bifusion_diag.reports.files import write_json

    shorthands: dict[str, Any] = {
        "data.source": data,
        "training.steps": steps,
        "training.batch_size": batch_size,
        "training.seed": seed,
        "training.device": device,
    }
    given = {key: value for key, value in shorthands.items() if value is not None}
    settings = load_settings(model, scale=scale, config=config, overrides=set_ or (), values=given)
    bounds = read_thresholds(thresholds, threshold or ())
    if json is not None:
        _check_file(json)
    # loads PyTorch: bad input is refused before
    from bifusion_diag.experiments.audit import audit as measure
    from bifusion_diag.experiments.audit.terminal import print_audit

    told = Console(stderr=True)
    with told.status("", spinner_style="dim") as status:
        found = measure(
            settings,
            thresholds=bounds,
            scenes=scan,
            seconds=scan_seconds,
            say=lambda what: _tell(told, status, what),
        )
    console = Console()
    print_audit(console, found)
    if json is not None:
        write_json(json, found.to_dict())
        print_written(console, [json])
    raise typer.Exit(1 if found.count("error") else 0)


def _tell(console: Console, status: Status, what: str) -> None:
    """One line that is overwritten; nothing where the output is no terminal."""
    if console.is_terminal:
        status.update(what)


def _check_file(path: Path) -> None:
    """Bad paths end the command before minutes of measuring."""
    if path.is_dir():
        raise UserError(f"--json {path}: is a folder. Give a file to write.")
