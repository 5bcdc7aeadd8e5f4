"""``bifusion-diag replay``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from bifusion_diag.cli.incidents import print_incident, print_readings, print_replay, print_trace
from bifusion_diag.errors import UserError

if TYPE_CHECKING:
    from bifusion_diag.replay.capsules.capsule import Capsule
    from bifusion_diag.replay.step import Training


def replay(
    path: Annotated[
        Path,
        typer.Argument(help="A capsule, <run>.incidents/000123; or a run.json, whose recorded run is re-executed."),
    ],
    probe: Annotated[
        list[str] | None, typer.Option(help="Measure with this probe; all: with all. May be repeated.")
    ] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Of a capsule: all modules in order of execution, with ranges.")
    ] = False,
    no_backward: Annotated[bool, typer.Option("--no-backward", help="Of a capsule: forward and losses only.")] = False,
    entry: Annotated[
        str | None,
        typer.Option(
            help="Of your own code: module:function or file.py:function. It is given the run's settings, and as "
            "`state` what FlightRecorder(state=...) returned if it has such a parameter; it returns (model, step) or "
            "(model, step, optimizer)."
        ),
    ] = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            help="Of a capsule: the step and those after it under a change, such as clip_align.weight=0, or a remedy's "
            "id; auto: all that may help. May be repeated."
        ),
    ] = None,
    what_if_steps: Annotated[int, typer.Option(help="Steps after the bad one in each trial.")] = 10,
    steps: Annotated[str | None, typer.Option(help="Of a run: first:last, for example 120:140.")] = None,
    out: Annotated[Path | None, typer.Option(help="Of a run: the record to write. Default: <run>.replay.json.")] = None,
    json: Annotated[Path | None, typer.Option(help="Of a capsule: write everything that is shown as JSON.")] = None,
) -> None:
    """Run a bad step again from its capsule, or a recorded run from its checkpoints, and say whether it is the same.

    Exit codes: 0 bit-identical · 1 not · 2 bad input.
    """
    from bifusion_diag.replay.capsules.capsule import JSON_FILE

    console = Console()
    if path.name == JSON_FILE or (path / JSON_FILE).is_file():
        if steps is not None or out is not None:
            raise UserError("--steps and --out are of runs; a capsule is one step")
        identical = _replay_capsule(
            console,
            path,
            probe or [],
            trace=trace,
            backward=not no_backward,
            entry=entry,
            what_if=what_if or [],
            what_if_steps=what_if_steps,
            json=json,
        )
        raise typer.Exit(0 if identical else 1)
    if path.is_dir() and (inside := sorted(path.glob(f"*/{JSON_FILE}"))):
        names = ", ".join(str(one.parent) for one in inside[:5])
        raise UserError(f"{path} holds {len(inside)} capsules: give one of them, such as {names}")
    if trace or no_backward or entry is not None or what_if or json is not None:
        given = {"--trace": trace, "--no-backward": no_backward, "--entry": entry, "--what-if": what_if, "--json": json}
        words = ", ".join(name for name, value in given.items() if value)
        raise UserError(
            f"{words}: of a capsule, and {path} is none. Capsules lie in <run>.incidents/, one folder a bad step."
        )
    from bifusion_diag.experiments.rerun import rerun_command

    raise typer.Exit(rerun_command(path, steps=steps, probes=probe or [], out=out, console=console))


def _replay_capsule(
    console: Console,
    path: Path,
    probes: list[str],
    *,
    trace: bool,
    backward: bool,
    entry: str | None,
    what_if: list[str],
    what_if_steps: int,
    json: Path | None,
) -> bool:
    from bifusion_diag.files import write_text
    from bifusion_diag.record import codec
    from bifusion_diag.replay.capsules.capsule import plain_json, read_capsule
    from bifusion_diag.replay.capsules.execute import replay_capsule

    capsule = read_capsule(path)
    build = _builder(capsule, entry)
    print_incident(console, capsule.incident)
    found = replay_capsule(capsule, build(), probes=probes, trace=trace, backward=backward)
    console.print()
    print_replay(console, found)
    if found.trace:
        console.print()
        print_trace(console, found.trace, capsule.incident)
    if found.readings:
        console.print()
        print_readings(console, found.readings)
    if json is not None:
        document = {"capsule": str(capsule.folder), "incident": capsule.incident.to_dict(), "replay": found.to_dict()}
        write_text(json, codec.dumps(plain_json(document)) + "\n")
    if what_if:
        from bifusion_diag.experiments.what_if import what_if_command

        what_if_command(capsule, what_if, steps=what_if_steps, entry=entry, build=build, console=console)
    return found.identical is True


def _builder(capsule: Capsule, entry: str | None) -> Callable[[], Training]:
    """What makes the model of a capsule.

    Raises:
        UserError: it is of users' code, and no entry is given.
    """
    if entry is not None:
        from bifusion_diag.replay.capsules.execute import training_of

        named = entry
        return lambda: training_of(named, capsule)
    from bifusion_diag.experiments.rebuild import is_own, rebuild

    if not is_own(capsule.settings):
        raise UserError(
            f"{capsule.folder} is not of a run of bifusion-diag train: give --entry module:function, which builds your "
            "model from the run's settings and returns (model, step) or (model, step, optimizer)"
        )
    return lambda: rebuild(capsule)
