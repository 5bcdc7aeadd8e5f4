"""``bifusion-diag bisect``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bifusion_diag.cli.options import ThresholdOptions, ThresholdsFile
from bifusion_diag.cli.output import print_written
from bifusion_diag.errors import UserError


def bisect(
    baseline: Annotated[str, typer.Argument(help="The settings that are stable: a preset, or a YAML file.")],
    candidate: Annotated[str, typer.Argument(help="The settings that are not: a preset, or a YAML file.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value that both have, for example training.batch_size=2. May be repeated."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings that both have.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each run; the first ten are not judged for spikes.")] = 60,
    seeds: Annotated[
        int, typer.Option(min=1, max=100, help="Seeds that a stable set of settings is run on; a bad one needs one.")
    ] = 2,
    oracle: Annotated[
        str,
        typer.Option(
            help="When a run is bad: unstable, a measure such as 'nonfinite_steps>0' or 'grad_norm/p99>50', or "
            "finding:<rule>."
        ),
    ] = "unstable",
    budget: Annotated[str | None, typer.Option(help="What all runs may take: '30min', '2h' or '40runs'.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of journal, records and result. Default: runs/bisect-<both names>.")
    ] = None,
    probe: Annotated[
        list[str] | None, typer.Option(help="Measure with this probe in every run. May be repeated.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report: the failing run against its cured twin.")] = None,
    threshold: ThresholdOptions = None,
    thresholds: ThresholdsFile = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show the plan and its cost, and end.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before it starts.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the bisection at --out; the same command does so anyway.")
    ] = False,
) -> None:
    """Find out which of the settings that differ make a run unstable, by short training runs.

    Exit codes: 0 found · 1 not found: the baseline is bad itself, the candidate is not, or the budget is spent ·
    2 bad input · 130 interrupted: the same command goes on.
    """
    from bifusion_diag.diagnosis.thresholds import read_thresholds
    from bifusion_diag.experiments.bisect import Request
    from bifusion_diag.experiments.bisect import bisect as run

    names = [Path(name).stem if Path(name).suffix in (".yaml", ".yml") else name for name in (baseline, candidate)]
    request = Request(
        baseline=baseline,
        candidate=candidate,
        config=config,
        overrides=set_ or (),
        steps=steps,
        seeds=seeds,
        oracle=oracle,
        thresholds=read_thresholds(thresholds, threshold or ()),
        probes=probe or (),
        budget=budget,
        out=out or Path("runs") / f"bisect-{names[0]}-{names[1]}",
        resume=resume,
    )
    if html is not None and html.is_dir():
        raise UserError(f"{html}: cannot be written (it is a folder; a file name was expected).")

    def go_on() -> bool:
        if plan:
            return False
        asks = not yes and sys.stdin.isatty() and sys.stdout.isatty()
        return not asks or typer.confirm("Go on?", default=True)

    console = Console()
    try:
        result = run(request, console, go_on)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo(f"interrupted; the same command goes on with {request.out}")
        raise typer.Exit(130) from None
    if result is None:
        return
    if html is not None and result.cure is not None and result.candidate is not None:
        _report(console, request.out / result.cure.tried.records[0], request.out / result.candidate.records[0], html)
    raise typer.Exit(result.exit_code)


def _report(console: Console, cured: Path, failing: Path, html: Path) -> None:
    """The candidate against its cured twin."""
    from bifusion_diag.diagnosis import compare_runs, load_measured
    from bifusion_diag.reports import write_comparison

    twin, bad = load_measured(cured), load_measured(failing)
    print_written(console, write_comparison([compare_runs(twin, bad)], twin, [bad], html=html))
