"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ThresholdOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--threshold", help="A bound of the rules, name=number; `bifusion-diag rules --thresholds` lists them. Repeat."
    ),
]
ThresholdsFile = Annotated[Path | None, typer.Option("--thresholds", help="YAML file with bounds of the rules.")]
Language = Annotated[str, typer.Option("--lang", help="Language of the report: en or zh.")]
