"""``bifusion-diag import``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bifusion_diag.errors import UserError

SHOWN = 40  # names of a list


def import_(
    source: Annotated[
        Path,
        typer.Argument(
            help="An MMEngine or MMCV work dir or log, a TensorBoard folder, a CSV export, a trainer_state.json."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Write the run here, as a run.json.")],
    name: Annotated[str | None, typer.Option(help="Of the run. Default: that of its folder or file.")] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(help="Which of its columns are what: loss=my_loss,step=iter. May be repeated."),
    ] = None,
    smoothing: Annotated[
        int | None, typer.Option(min=1, help="Steps that a logged value is the mean of; 1: values are of single steps.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="mmengine, mmcv, transformers, tensorboard or csv. Default: what is found.")
    ] = None,
) -> None:
    """Make a run.json of a log that another program wrote, and say what of it is what."""
    from bifusion_diag.diagnosis import measure_record, measures_to_dict
    from bifusion_diag.files import write_text
    from bifusion_diag.record.importers import read_source
    from bifusion_diag.record.reduce import reduce_record

    record = read_source(source, name=name, columns=_pairs(columns or []), smoothing=smoothing, format=format)
    imported = record.state.header.provenance["imported"]
    if out.suffix != ".json":
        raise UserError(f"--out {out}: expected a file name that ends in .json, such as {out.with_suffix('.json')}.")
    if any(out.resolve() == Path(file).resolve() for file in imported["files"]):
        raise UserError(f"--out {out}: that is the log itself. Choose another output path.")
    record.state = record.state._replace(measures=measures_to_dict(measure_record(record)))
    run, text = reduce_record(record)
    write_text(out, text)
    console = Console()
    for line in _told(record.state.header.name, run.steps, imported):
        console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)
    console.print(f"run: {out}", soft_wrap=True, highlight=False, markup=False, emoji=False)


def _pairs(given: list[str]) -> dict[str, str]:
    """ours=theirs, several in one argument where they are divided by commas."""
    pairs: dict[str, str] = {}
    for argument in given:
        parts = argument.split(",") if argument.count("=") > 1 else [argument]
        for part in parts:
            ours, equals, theirs = part.partition("=")
            if not equals or not ours.strip() or not theirs:
                raise UserError(f"--columns {part}: expected ours=theirs, such as loss=my_loss.")
            pairs[ours.strip()] = theirs.strip()
    return pairs


def _told(name: str, steps: Any, imported: Mapping[str, Any]) -> list[str]:
    """What was recognised, left out and not measured, line by line."""
    lines = [
        f"{name}: {imported['format']}, {len(steps)} logged steps from {steps[0]} to {steps[-1]}, usually every "
        f"{imported['interval']}",
        "",
        "recognised",
    ]
    renamed = imported["renamed"]
    width = max(map(len, renamed.values()), default=0)
    lines += [f"  {series:<{width}}  ← {theirs}" for theirs, series in list(renamed.items())[:SHOWN]]
    if len(renamed) > SHOWN:
        lines.append(f"  … {len(renamed) - SHOWN} more")
    window = imported["smoothing"]
    lines += ["", f"smoothing: {f'{window} steps' if window else 'not known'} ({imported['smoothing_from']})"]
    if "grad_norm" in imported:
        lines.append(f"gradient norm: {imported['grad_norm']}")
    if imported["ignored"]:
        rest = len(imported["ignored"]) - SHOWN
        more = f", … {rest} more" if rest > 0 else ""
        lines.append(f"ignored: {', '.join(imported['ignored'][:SHOWN])}{more}")
    if "also_there" in imported:
        lines.append(f"also there, not read (--format): {', '.join(imported['also_there'])}")
    lines += ["not measured", *(f"  {gap}" for gap in imported["not_measured"])]
    lines += ["to be known", *(f"  {note}" for note in imported["notes"])] if imported["notes"] else []
    return lines
