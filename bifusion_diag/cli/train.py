"""``bifusion-diag train``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from bifusion_diag.errors import UserError

if TYPE_CHECKING:
    from bifusion_diag.record import Run

FINDINGS = 5  # that are told when a run ends

#: The catalogue's, to which a test holds them: the catalogue itself would load PyTorch for --help.
PROBES = (
    "grads", "activations", "weights", "updates", "losses", "loss_gradients", "clip", "flow", "projection", "gate",
    "normalize", "attention", "matching", "data", "throughput",
)  # fmt: skip


def list_faults(injections: list[str] | None) -> list[str] | None:
    """Print every fault for ``--inject list``, and end."""
    if injections is None or "list" not in injections:
        return injections or None
    from rich.table import Table

    from bifusion_diag.training.faults import fault_table

    table = Table(box=None, pad_edge=False)
    for title in ("fault", "in", "WHERE", "lasts", "what it does"):
        table.add_column(title, no_wrap=title != "what it does")
    for row in fault_table():
        table.add_row(*row)
    Console().print(table)
    raise typer.Exit


def train(
    out: Annotated[Path, typer.Option(help="The run record to write, for example runs/mine.json.")],
    model: Annotated[
        str | None, typer.Option(help="Preset; `bifusion-diag presets` lists them. Default: bifusion.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="'synthetic', or a folder of RGB-D frames.")] = None,
    probe: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(PROBES)}, or all of them: all. May be repeated.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Scenes a step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, data and queries.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = None,
    scale: Annotated[
        str | None, typer.Option(help="full, or small: the same architecture, every width a quarter.")
    ] = None,
    sparse_engine: Annotated[str | None, typer.Option(help="native, minkowski, or auto, which is native.")] = None,
    clip_weights: Annotated[
        str | None, typer.Option(help="random, a local file, or an open_clip pretrained tag.")
    ] = None,
    clip_cache: Annotated[
        str | None, typer.Option(help="Folder that keeps what frozen CLIP makes of each image, for later runs.")
    ] = None,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations on scenes that are not trained on; 0 = none.")
    ] = None,
    val_data: Annotated[
        str | None, typer.Option(help="Folder of RGB-D frames to evaluate on. Synthetic runs have rooms of their own.")
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(help="Weights to begin with: ESAM, OneFormer3D, Mask3D, Res16UNet, or an earlier run's."),
    ] = None,
    on_incident: Annotated[
        str | None, typer.Option(help="What to do about a bad step's update: record, skip, rollback or stop.")
    ] = None,
    alarm: Annotated[
        list[str] | None,
        typer.Option(help="A further sign of a bad step, for example 'loss/clip_align > 10'. May be repeated."),
    ] = None,
    capsule_limit: Annotated[
        str | None, typer.Option(help="Largest capsule of an incident, for example '500 MB'.")
    ] = None,
    inject: Annotated[
        list[str] | None,
        typer.Option(
            help="A fault on purpose, NAME@STEP[:WHERE], to try the instruments on; list: all. May be repeated.",
            callback=list_faults,
            is_eager=True,  # the list needs no --out
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, for example optim.lr=1e-4. May be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run at --out.")] = False,
) -> None:
    """Train a preset with probes on and write a run record.

    A bad step is caught before its update, taken apart, and kept as a capsule beside the record.

    Ctrl-C or SIGTERM ends the run after the step under way, with a valid record and a checkpoint to resume from.

    torchrun --nproc-per-node N -m bifusion_diag train ... trains in N processes, each with a batch of its own.
    """
    shorthands: dict[str, Any] = {
        "data.source": data,
        "training.steps": steps,
        "training.batch_size": batch_size,
        "training.seed": seed,
        "training.device": device,
        "model.sparse_engine": sparse_engine,
        "model.clip.weights": clip_weights,
        "model.clip.cache_folder": clip_cache,
        "model.init_from": init_from,
        "evaluation.every": evaluate_every,
        "incidents.policy": on_incident,
        "incidents.capsule_limit": capsule_limit,
        "incidents.rules": alarm or None,
        "evaluation.source": val_data,
        "training.inject": inject,
    }
    given = {key: value for key, value in shorthands.items() if value is not None}
    console = Console(stderr=True)
    if resume and any(item is not None for item in (model, scale, config, probe, set_, *given.values())):
        raise UserError("--resume goes on with the run's own settings: give nothing else but --out")
    from bifusion_diag.replay.recorder import BadStepError
    from bifusion_diag.training import resume_training, start_training

    try:
        if resume:
            run = resume_training(out, console=console)
        else:
            from bifusion_diag.config import load_settings

            settings = load_settings(model, scale=scale, config=config, overrides=set_ or (), values=given)
            if val_data is not None and not settings.evaluation.every:
                raise UserError("--val-data is evaluated only with --evaluate-every N: say how many steps apart")
            run = start_training(settings, out, probes=probe or [], command=sys.argv[1:], console=console)
    except BadStepError as error:
        typer.echo(f"stopped: {error}")
        if error.incident.capsule is not None:
            typer.echo(f"replay the step with: bifusion-diag replay {error.incident.capsule} --trace")
        raise typer.Exit(1) from error
    _tell(run, out)


def _tell_findings(run: Run, out: Path) -> None:
    """The worst of what the rules found, and where the rest is told."""
    from bifusion_diag.diagnosis import findings_of

    if not len(run.steps):
        return
    found = findings_of(run)
    for finding in found[:FINDINGS]:
        typer.echo(f"{finding.severity}: {finding.title} ({finding.rule})")
    rest = len(found) - FINDINGS
    words = f"and {rest} more findings; " if rest > 0 else "" if found else "no findings; "
    typer.echo(f"{words}report with: bifusion-diag report {shlex.quote(str(out))}")


def _tell(run: Run, out: Path) -> None:
    """Say how the run ended, and how to go on."""
    if run.header.environment.get("rank", 0) == 0:
        typer.echo(f"{run.status}: {len(run.steps)} steps recorded in {out}")
        if run.status == "interrupted":
            ranks = run.header.environment.get("ranks", 1)
            start = "bifusion-diag" if ranks == 1 else f"torchrun --nproc-per-node {ranks} -m bifusion_diag"
            typer.echo(f"go on with: {start} train --resume --out {out}")
        _tell_findings(run, out)
    if run.status == "interrupted":
        raise typer.Exit(130)
