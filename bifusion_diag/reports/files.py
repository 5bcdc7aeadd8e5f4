"""Writing a report: the page and, beside it, the data of everything it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bifusion_diag.diagnosis.assess import RunAssessment
from bifusion_diag.diagnosis.comparing.groups import GroupComparison
from bifusion_diag.diagnosis.comparing.pair import RunComparison
from bifusion_diag.diagnosis.plain import to_plain
from bifusion_diag.errors import UserError
from bifusion_diag.files import write_text
from bifusion_diag.record.schema import Run
from bifusion_diag.reports.language import ENGLISH, speaking

if TYPE_CHECKING:
    from bifusion_diag.reports.budget import Budget
    from bifusion_diag.reports.page import Page


def write_comparison(
    comparisons: Sequence[RunComparison],
    baseline: Run,
    candidates: Sequence[Run],
    *,
    html: Path | str | None = None,
    json: Path | str | None = None,
    language: str = ENGLISH,
    sources: Sequence[Path | str] = (),
) -> list[Path]:
    """Write the page and the data of a comparison.

    Args:
        comparisons: of each candidate with the baseline.
        baseline: its record.
        candidates: their records, in the same order.
        html: where the page goes; its data go beside it where `json` names no other place. None: no page.
        json: where the data go.
        language: of the page; the data are in English but for what is said to be shown.
        sources: paths of the records, the baseline's first, as commands name them. Empty: not known.

    Returns:
        The files written; none where neither was asked for.

    Raises:
        UserError: one of them cannot be written, or there is no such language. No file is left half-written.
    """

    def build(budget: Budget) -> Page:
        from bifusion_diag.reports.page import comparison_page  # loads matplotlib: only where a page is drawn

        return comparison_page(comparisons, baseline, candidates, sources=_texts(sources), budget=budget)

    return _write(html, json, _data("comparison", {"comparisons": to_plain(comparisons)}), build, language, sources)


def write_run(
    assessment: RunAssessment,
    run: Run,
    *,
    html: Path | str | None = None,
    json: Path | str | None = None,
    language: str = ENGLISH,
    source: Path | str = "",
) -> list[Path]:
    """Write the page and the data of one run; arguments and errors as of :func:`write_comparison`."""

    def build(budget: Budget) -> Page:
        from bifusion_diag.reports.page import run_page

        return run_page(assessment, run, source=str(source), budget=budget)

    return _write(html, json, _data("assessment", to_plain(assessment)), build, language, [source] if source else [])


def write_groups(
    group: GroupComparison,
    baselines: Sequence[Run],
    candidates: Sequence[Run],
    *,
    html: Path | str | None = None,
    json: Path | str | None = None,
    language: str = ENGLISH,
    sources: Sequence[Path | str] = (),
) -> list[Path]:
    """Write the page and the data of two sides of several runs each.

    Args:
        group: their comparison.
        baselines: the records of the baseline side, in the order of its runs.
        candidates: the records of the candidate side, likewise.
        html: see :func:`write_comparison`, also for what follows.
        json: see there.
        language: see there.
        sources: paths of all records, the baseline side's first.
    """

    def build(budget: Budget) -> Page:
        from bifusion_diag.reports.page import groups_page

        return groups_page(group, baselines, candidates, sources=_texts(sources), budget=budget)

    return _write(html, json, _data("group comparison", {"groups": to_plain(group)}), build, language, sources)


def _texts(paths: Sequence[Path | str]) -> list[str]:
    return [str(path) for path in paths]


def _data(kind: str, content: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": f"bifusion-diag {kind}", "schema_version": "1.0", **content}


def _write(
    html: Path | str | None,
    data_path: Path | str | None,
    data: Mapping[str, Any],
    build: Callable[[Budget], Page],
    language: str,
    sources: Sequence[Path | str],
) -> list[Path]:
    read = {Path(source).resolve() for source in sources}
    for target in (html, data_path, None if html is None else f"{html}.json"):
        if target is not None and Path(target).resolve() in read:
            raise UserError(f"{target}: that is one of the records that were read. Choose another output path.")
    if html is not None:
        page = Path(html)
        if page.is_dir():
            raise UserError(f"{page}: cannot be written (it is a folder; a file name was expected).")
        beside = Path(data_path) if data_path is not None else page.with_name(f"{page.name}.json")
        if beside == page:
            raise UserError(f"{page}: the page and its data need two different files.")
        with speaking(language):
            from bifusion_diag.reports.html import fitted
            from bifusion_diag.reports.page import page_data

            drawn, shown = fitted(build)
            write_json(beside, {**data, "language": language, "shown": page_data(shown)})
        write_text(page, drawn)
        return [page, beside]
    if data_path is not None:
        write_json(data_path, data)
        return [Path(data_path)]
    return []


def write_json(path: Path | str, data: Mapping[str, Any]) -> None:
    """Write strict JSON, whole or not at all."""
    write_text(path, dumps(data, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
