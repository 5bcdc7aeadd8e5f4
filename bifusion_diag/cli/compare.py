"""``bifusion-diag compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bifusion_diag.cli.output import print_written


def compare(
    baseline: Annotated[Path, typer.Argument(help="Record of the run to compare with, often the 3D baseline.")],
    candidates: Annotated[list[Path], typer.Argument(help="Records of one or more runs to judge against it.")],
    html: Annotated[Path | None, typer.Option(help="Write the HTML stability report here.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything that the report shows as JSON.")] = None,
) -> None:
    """Compare the stability of runs: measures, criteria, where they part, what differed."""
    from bifusion_diag.diagnosis import compare_runs, load_measured
    from bifusion_diag.reports import print_comparison, write_comparison

    reference = load_measured(baseline)
    runs = [load_measured(path) for path in candidates]
    comparisons = [compare_runs(reference, run) for run in runs]
    console = Console()
    for comparison in comparisons:
        print_comparison(console, comparison)
    print_written(console, write_comparison(comparisons, reference, runs, html=html, json=json))
