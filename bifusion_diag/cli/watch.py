"""``bifusion-diag watch``."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from bifusion_diag.cli.options import ThresholdOptions, ThresholdsFile
from bifusion_diag.errors import UserError

if TYPE_CHECKING:
    from bifusion_diag.diagnosis.live import LiveFindings
    from bifusion_diag.record import RecordFollower

INTERRUPTED = 130  # exit code
WRITING = 60.0  # seconds in which a run that has ended should have written its run.json


def watch(
    path: Annotated[
        Path, typer.Argument(help="A run.json, its .record folder, their folder, or the --out of a run to come.")
    ],
    once: Annotated[bool, typer.Option("--once", help="Print what there is to see now, and end.")] = False,
    interval: Annotated[float, typer.Option(min=0.05, max=3600, help="Seconds between two looks.")] = 1.0,
    window: Annotated[int, typer.Option(min=10, max=100_000, help="Recorded steps that are looked at.")] = 1000,
    top: Annotated[int, typer.Option(min=1, help="Entries of a list.")] = 5,
    timeout: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds to wait for a run to begin. Default: without end; with --once: none."),
    ] = None,
    threshold: ThresholdOptions = None,
    thresholds: ThresholdsFile = None,
) -> None:
    """Follow a run from another terminal while it trains, until it ends.

    Reads the record that the run writes, from any machine that sees its folder, and does not disturb it.
    """
    from bifusion_diag.diagnosis.live import LiveFindings
    from bifusion_diag.diagnosis.thresholds import read_thresholds

    findings = LiveFindings(read_thresholds(thresholds, threshold or []))
    console = Console()
    patience = 0.0 if once and timeout is None else timeout
    try:
        last = _follow(path, console, once, interval, window, top, patience, findings)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    _print(console, last)


def _follow(
    path: Path,
    console: Console,
    once: bool,
    interval: float,
    window: int,
    top: int,
    timeout: float | None,
    findings: LiveFindings,
) -> Sequence[Text | str]:
    """Show a run until it has ended; what to print last."""
    from bifusion_diag.record import RecordError, RecordFollower
    from bifusion_diag.record.follow import find_record
    from bifusion_diag.reports.live import ModuleSeries, live_lines, module_series, status_line

    run: RecordFollower | None = None
    modules: list[ModuleSeries] = []
    alone = time.monotonic()  # since when there is no run to see
    screen = console.is_terminal and not console.is_dumb_terminal and not once
    said = ""
    damaged = False

    def lines(height: int | None = None) -> list[Text]:
        assert run is not None
        found = findings.of(run)
        return live_lines(run, modules, now=time.time(), width=console.width, height=height, top=top, findings=found)

    with _display(console, screen) as show:
        while True:
            looked = time.monotonic()
            folder = find_record(path)
            if folder is None and run is None and path.is_file():
                return _over(path)
            try:
                if folder is None:
                    run = None
                elif run is None or run.folder != folder:
                    run = RecordFollower(folder, window)
                    modules = module_series(run)
                elif run.poll():
                    modules = module_series(run)
                damaged = False
            except RecordError:  # damaged, or replaced at this moment
                if damaged:
                    raise
                run, damaged = None, True
                time.sleep(0.1)
                continue
            if run is None:
                if timeout is not None and looked - alone >= timeout:
                    within = f" within {timeout:g} s" if timeout else ""
                    raise UserError(
                        f"{path}: no run is recorded there{within}. Give the --out of a run, its run.json, its .record "
                        "folder or the folder they lie in."
                    )
                words = f"waiting for a run to begin at {path}: no record there yet (Ctrl-C ends)"
                if screen or words != said:
                    show([Text(words)])
                said = words
            else:
                alone = looked
                if once:
                    return _joined(lines(), _ended(path, run))
                words = status_line(run, now=time.time(), findings=findings.of(run))
                if screen or words != said:  # a log needs no line twice
                    show(lines(console.height) if screen else [words])
                said = words
                if run.status != "running" and (_document(path, run).is_file() or time.time() - run.begun > WRITING):
                    return _joined(lines() if screen else [], _ended(path, run))
            time.sleep(max(interval - (time.monotonic() - looked), 0.05))


@contextmanager
def _display(console: Console, screen: bool) -> Iterator[Callable[[Sequence[Text | str]], None]]:
    """Shows lines: in place on a terminal, which is afterwards as it was before; else one after the other."""
    if not screen:
        yield lambda lines: _print(console, lines)
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        yield lambda lines: live.update(Group(*lines), refresh=True)


def _print(console: Console, lines: Sequence[Text | str]) -> None:
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _over(path: Path) -> list[str]:
    """What to say of a run.json without its record.

    Raises:
        UserError: it is none.
    """
    from bifusion_diag.record import load_run

    run = load_run(path)
    return [f"{run.status}: {len(run.steps)} steps recorded in {path}", _report(path)]


def _ended(path: Path, run: RecordFollower) -> list[str]:
    """Where the record of a run lies that has ended; nothing of one that goes on."""
    if run.status == "running":
        return []
    document = _document(path, run)
    steps = f"{run.status} after step {run.steps[-1]}" if len(run.steps) else run.status
    if document.is_file():
        return [f"{steps}: {document}", _report(document)]
    return [f"{steps}: {document} is not there, its record is: {run.folder}", _report(run.folder)]


def _joined(above: Sequence[Text | str], below: Sequence[str]) -> list[Text | str]:
    return [*above, *([""] if above and below else []), *below]


def _document(path: Path, run: RecordFollower) -> Path:
    from bifusion_diag.record.follow import document_of

    return path if path.is_file() else document_of(run.folder)


def _report(record: Path) -> str:
    """The report of a run, or how to get it."""
    page = record.with_name(f"{record.stem}.report.html")
    return f"report: {page}" if page.is_file() else f"report with: bifusion-diag report {shlex.quote(str(record))}"
