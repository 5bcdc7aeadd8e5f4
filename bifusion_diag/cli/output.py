"""What several commands print alike."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console


def print_written(console: Console, paths: Iterable[Path]) -> None:
    """Say which files were written, the page last: it is what the user opens next."""
    for path in sorted(paths, key=lambda path: path.suffix != ".json"):
        label = "data" if path.suffix == ".json" else "report"
        console.print(f"{label}: {path}", soft_wrap=True, highlight=False, markup=False)
