"""``bifusion-diag report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bifusion_diag.cli.options import Language, ThresholdOptions, ThresholdsFile
from bifusion_diag.cli.output import print_written


def report(
    run: Annotated[
        Path, typer.Argument(help="A run.json, its folder, or the .record folder of a run that was killed.")
    ],
    html: Annotated[Path | None, typer.Option(help="Write the HTML report here. Default: beside the record.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything that the report shows as JSON.")] = None,
    lang: Language = "en",
    threshold: ThresholdOptions = None,
    thresholds: ThresholdsFile = None,
) -> None:
    """Report the stability of one run."""
    from bifusion_diag.diagnosis import assess_run, load_measured
    from bifusion_diag.diagnosis.thresholds import read_thresholds
    from bifusion_diag.record import resolve_run
    from bifusion_diag.reports import print_run, write_run
    from bifusion_diag.reports.language import speaking

    with speaking(lang):  # an unknown language is told before anything is read
        bounds = read_thresholds(thresholds, threshold or [])
    record = load_measured(run)
    assessment = assess_run(record, bounds)
    console = Console()
    print_run(console, assessment)
    where = resolve_run(run)
    where = where if where.name not in ("", "..") else where.resolve()  # no name of a run
    page = html or where.with_name(f"{where.stem}.report.html")
    written = write_run(assessment, record, html=page, json=json, language=lang, source=resolve_run(run))
    print_written(console, written)
