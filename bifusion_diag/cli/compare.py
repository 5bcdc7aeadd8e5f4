"""``bifusion-diag compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from bifusion_diag.cli.options import Language, ThresholdOptions, ThresholdsFile
from bifusion_diag.cli.output import print_written
from bifusion_diag.errors import UserError

if TYPE_CHECKING:
    from bifusion_diag.diagnosis.comparing.gates import GateResult
    from bifusion_diag.diagnosis.comparing.groups import GroupComparison
    from bifusion_diag.diagnosis.comparing.sides import RunGroup


def compare(
    baseline: Annotated[Path, typer.Argument(help="Record of the run to compare with, often the 3D baseline.")],
    candidates: Annotated[
        list[Path] | None, typer.Argument(help="Records of one or more runs to judge against it.")
    ] = None,
    more_baselines: Annotated[
        list[Path] | None,
        typer.Option("--baseline", help="Another run of the baseline's side, such as another seed. Repeat."),
    ] = None,
    group: Annotated[list[str] | None, typer.Option(help="Runs that are one side: NAME=PATH,PATH,... Repeat.")] = None,
    separate: Annotated[
        bool,
        typer.Option("--separate", help="Keep every run by itself. Default: seeds of the same settings are one side."),
    ] = False,
    align: Annotated[str, typer.Option(help="What is set against each other: step, epoch or samples.")] = "step",
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-on",
            help="Exit 1 if this holds: 'spike_rate>0.01', 'ratio:grad_norm/p99>2', finding:error, criterion:miou, "
            "worse, unstable. Repeat.",
        ),
    ] = None,
    allow_unmeasured: Annotated[
        bool, typer.Option("--allow-unmeasured", help="A --fail-on that could not be measured passes.")
    ] = False,
    threshold: ThresholdOptions = None,
    thresholds: ThresholdsFile = None,
    lang: Language = "en",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print everything, not 30 lines.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the HTML stability report here.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything that the report shows as JSON.")] = None,
) -> None:
    """Compare the stability of runs: measures, criteria, where they part, what differed and is to blame.

    Exit codes: 0 fine, 1 a --fail-on holds, 2 bad input.
    """
    from bifusion_diag.diagnosis.comparing.gates import check_gates, parse_gates
    from bifusion_diag.diagnosis.comparing.groups import compare_groups
    from bifusion_diag.diagnosis.comparing.sides import group_runs
    from bifusion_diag.diagnosis.thresholds import read_thresholds
    from bifusion_diag.reports import print_comparison
    from bifusion_diag.reports.language import speaking

    gates = parse_gates(fail_on or ())
    bounds = read_thresholds(thresholds, threshold or ())
    named = dict(map(_named, group or ()))
    if group and len(named) < len(group):
        raise UserError("--group: two groups have the same name. Give each its own.")
    with speaking(lang):
        loaded = _Records()
        reference, sides = group_runs(
            loaded.read([baseline, *(more_baselines or ())]),
            loaded.read(candidates or ()),
            {name: loaded.read(paths) for name, paths in named.items()},
            separate=separate,
        )
        comparisons = [compare_groups(reference, side, bounds, align) for side in sides]
        checked = [check_gates(gates, one, allow_unmeasured=allow_unmeasured) for one in comparisons]
        console = Console()
        for place, (one, results) in enumerate(zip(comparisons, checked, strict=True)):
            if place:
                console.print()
            print_comparison(console, worst_pair(one), group=one, gates=results, verbose=verbose)
        written = _write(comparisons, checked, reference, sides, loaded, html=html, json=json, language=lang)
    print_written(console, written)
    if any(result.failed for results in checked for result in results):
        raise typer.Exit(1)


class _Records:
    """Runs that were read, each once, and where they lie."""

    def __init__(self) -> None:
        self._runs: dict[Path, Any] = {}

    def read(self, paths: Sequence[Path]) -> list[Any]:
        """The runs of some paths."""
        from bifusion_diag.diagnosis import load_measured

        for path in paths:
            if path not in self._runs:
                self._runs[path] = load_measured(path)
        return [self._runs[path] for path in paths]

    def sources(self, runs: Sequence[Any]) -> list[Path]:
        """The paths of runs."""
        return [path for run in runs for path, known in self._runs.items() if known is run]


def _named(text: str) -> tuple[str, list[Path]]:
    name, sign, paths = text.partition("=")
    found = [Path(path) for path in paths.split(",") if path]
    if not sign or not name.strip() or not found:
        raise UserError(f"--group {text}: write it as NAME=PATH,PATH")
    return name.strip(), found


def worst_pair(group: GroupComparison) -> Any:
    """Of a side of several runs, the one with most bad steps: its findings are printed."""
    return max(group.pairs, key=lambda pair: pair.candidate.measures.number("bad_steps") or 0.0)


def _write(
    comparisons: Sequence[GroupComparison],
    checked: Sequence[Sequence[GateResult]],
    reference: RunGroup,
    sides: Sequence[RunGroup],
    loaded: _Records,
    *,
    html: Path | None,
    json: Path | None,
    language: str,
) -> list[Path]:
    """The page and the data: one page of all candidates where each side is one run, else one a candidate side."""
    from bifusion_diag.reports.files import write_comparison, write_groups, write_json

    if html is None and json is None:
        return []
    written: list[Path] = []
    if all(len(side.runs) == 1 for side in (reference, *sides)):
        runs = [side.runs[0] for side in sides]
        written = write_comparison(
            [pair for one in comparisons for pair in one.pairs], reference.runs[0], runs, html=html, json=json,
            language=language, sources=loaded.sources([reference.runs[0], *runs]),
        )  # fmt: skip
    else:
        for number, (one, side) in enumerate(zip(comparisons, sides, strict=True)):
            written += write_groups(
                one, reference.runs, side.runs, html=_numbered(html, number), json=_numbered(json, number),
                language=language, sources=loaded.sources([*reference.runs, *side.runs]),
            )  # fmt: skip
    _complete([path for path in written if path != html], comparisons, checked, write_json)
    return written


def _numbered(path: Path | None, number: int) -> Path | None:
    """report.html, report-2.html, ..."""
    return path if path is None or not number else path.with_name(f"{path.stem}-{number + 1}{path.suffix}")


def _complete(
    paths: Sequence[Path],
    comparisons: Sequence[GroupComparison],
    checked: Sequence[Sequence[GateResult]],
    write_json: Any,
) -> None:
    """Add the sides, what was tested and the gates to the data."""
    import json

    from bifusion_diag.diagnosis.plain import to_plain

    extra = [{**to_plain(one), "gates": to_plain(results)} for one, results in zip(comparisons, checked, strict=True)]
    for place, path in enumerate(path for path in paths if path.suffix == ".json"):
        stored = json.loads(path.read_text(encoding="utf-8"))
        sides = extra if "comparisons" in stored else extra[place : place + 1]
        stored.pop("groups", None)
        if "comparisons" in stored:  # the pairs are there already
            sides = [{key: value for key, value in side.items() if key != "pairs"} for side in sides]
        write_json(path, {**stored, "sides": sides})


__all__ = ["compare", "worst_pair"]
