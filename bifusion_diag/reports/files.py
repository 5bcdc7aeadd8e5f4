"""Writing a report: the page and, beside it, the data of everything it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from json import dumps
from pathlib import Path
from typing import Any

from bifusion_diag.diagnosis.compare import RunAssessment, RunComparison
from bifusion_diag.diagnosis.plain import to_plain
from bifusion_diag.errors import UserError
from bifusion_diag.files import write_text
from bifusion_diag.record.schema import Run


def write_comparison(
    comparisons: Sequence[RunComparison],
    baseline: Run,
    candidates: Sequence[Run],
    *,
    html: Path | str | None = None,
    json: Path | str | None = None,
) -> list[Path]:
    """Write the page and the data of a comparison.

    Args:
        comparisons: of each candidate with the baseline.
        baseline: its record.
        candidates: their records, in the same order.
        html: where the page goes; its data go beside it where `json` names no other place. None: no page.
        json: where the data go.

    Returns:
        The files written; none where neither was asked for.

    Raises:
        UserError: one of them cannot be written. No file is left half-written.
    """
    from bifusion_diag.reports.html import render_comparison  # loads matplotlib: only where a page is drawn

    data = _data("comparison", {"comparisons": to_plain(comparisons)})
    return _write(html, json, data, lambda: render_comparison(comparisons, baseline, candidates))


def write_run(
    assessment: RunAssessment, run: Run, *, html: Path | str | None = None, json: Path | str | None = None
) -> list[Path]:
    """Write the page and the data of one run; arguments and errors as of :func:`write_comparison`."""
    from bifusion_diag.reports.html import render_run

    return _write(html, json, _data("assessment", to_plain(assessment)), lambda: render_run(assessment, run))


def _data(kind: str, content: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": f"bifusion-diag {kind}", "schema_version": "1.0", **content}


def _write(
    html: Path | str | None, data_path: Path | str | None, data: Mapping[str, Any], draw: Callable[[], str]
) -> list[Path]:
    if html is not None:
        page = Path(html)
        if page.is_dir():
            raise UserError(f"{page}: cannot be written (it is a folder; a file name was expected).")
        beside = Path(data_path) if data_path is not None else page.with_name(f"{page.name}.json")
        if beside == page:
            raise UserError(f"{page}: the page and its data need two different files.")
        write_json(beside, data)
        write_text(page, draw())
        return [page, beside]
    if data_path is not None:
        write_json(data_path, data)
        return [Path(data_path)]
    return []


def write_json(path: Path | str, data: Mapping[str, Any]) -> None:
    """Write strict JSON, whole or not at all."""
    write_text(path, dumps(data, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
