"""Incidents and replays in the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from bifusion_diag.replay.capsules.execute import Replay
    from bifusion_diag.replay.incident import Incident, ModuleTrace, SampleShare

_BAR = 24  # characters of the longest bar in a trace
_SHOWN = 12  # entries of evidence; the capsule holds all


def print_incident(console: Console, incident: Incident) -> None:
    """What happened, where it began, of which term and sample, and by which mechanism."""
    console.print(Text(f"step {incident.step}: {incident.triggers[0].message}", style="bold red"))
    table = _plain_table()
    for trigger in incident.triggers[1:6]:
        table.add_row("also", Text(trigger.message))
    if len(incident.triggers) > 6:
        table.add_row("", f"and {len(incident.triggers) - 6} more signs")
    cause = incident.cause
    if cause is not None:
        parts = [cause.module or "no module", cause.direction, cause.op or "", cause.parameter or ""]
        if cause.direction == "data":
            parts = ["the batch", cause.parameter or ""]
        table.add_row("begins in", Text(", ".join(filter(None, parts)), style="bold"))
        if cause.source:
            table.add_row("source", Text(cause.source))
    else:
        table.add_row("begins in", Text("not found", style="dim"))
    if incident.terms:
        table.add_row("loss term", Text(", ".join(incident.terms), style="bold"))
    for number, sample in enumerate(incident.samples[:4]):
        table.add_row("sample" if not number else "", _sample(sample))
    table.add_row("mechanism", Text(incident.mechanism, style="bold"))
    if incident.explanation:
        table.add_row("", Text(incident.explanation))
    for number, (name, value) in enumerate(list(incident.evidence.items())[:_SHOWN]):
        table.add_row("evidence" if not number else "", Text(f"{name}: {value_text(value)}"))
    if incident.remedies:
        table.add_row("worth trying", Text(", ".join(incident.remedies)))
    done = {"record": "the update was done", "skip": "the update was left out"}
    done |= {"rollback": "the run went back to an earlier state", "stop": "the run was stopped"}
    update = done.get(incident.action, incident.action)
    table.add_row("then", update + ("; it was harmless" if incident.harmless else ""))
    if incident.rank:
        table.add_row("rank", str(incident.rank))
    console.print(table)


def print_replay(console: Console, replay: Replay, *, nothing: str = "nothing to compare with") -> None:
    """Whether the step ran as it had run, and why not."""
    if replay.identical:
        console.print(Text(f"bit-identical: {replay.compared}", style="bold green"))
    elif replay.identical is None:
        console.print(Text(f"not compared: {replay.compared or nothing}", style="bold yellow"))
    else:
        console.print(Text(f"not bit-identical ({replay.compared}): first {replay.difference}", style="bold red"))
    table = _plain_table()
    for number, reason in enumerate(replay.reasons):
        table.add_row("it may be" if not number else "", Text(reason))
    for number, entry in enumerate(replay.lost):
        table.add_row("not stored" if not number else "", Text(entry))
    losses = [f"{name} {value_text(value)}" for name, value in replay.losses.items()]
    if losses:
        table.add_row("losses", Text(" · ".join(losses)))
    if replay.grad_norm is not None:
        table.add_row("grad norm", value_text(replay.grad_norm))
    if replay.error:
        table.add_row("raised", Text(replay.error))
    table.add_row("took", f"{replay.seconds:.2f} s")
    console.print(table)


def print_trace(console: Console, trace: Sequence[ModuleTrace], incident: Incident) -> None:
    """Every call of a module in order of execution: how large numbers go in and come out, and the gradients that
    arrive. The bar is the output's order of magnitude; the module where it began is marked."""
    wide = console.width >= 110
    bar = _BAR if wide else _BAR // 3
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    table.add_column("module", overflow="fold")
    if wide:
        table.add_column("type", no_wrap=True)
    for title in ("|in|", "|out|"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("log |out|"[: bar + 1], no_wrap=True, min_width=bar)
    table.add_column("grad norm", justify="right", no_wrap=True, min_width=9)
    low, high = _orders(trace)
    cause = incident.cause.module if incident.cause is not None else None
    forward_said = False
    for row in trace:
        begins = bool(row.output_bad and not row.input_bad) and not forward_said
        forward_said = forward_said or begins
        mark = "→" if row.name == cause or begins else ""
        bad = row.output_bad or row.input_bad or row.gradient_bad
        table.add_row(
            mark,
            Text(row.name),
            *([Text(row.type, style="dim")] if wide else []),
            _range(row.input_absmax, row.input_bad),
            _range(row.output_absmax, row.output_bad),
            Text("█" * _length(row.output_absmax, low, high, bar), style="red" if row.output_bad else "cyan"),
            _range(row.gradient_norm, row.gradient_bad),
            style="bold" if mark else "red" if bad else None,
        )
    console.print(table)


def print_readings(console: Console, readings: Mapping[str, float | None]) -> None:
    """What the probes measured."""
    table = _plain_table()
    for name, value in readings.items():
        table.add_row(Text(name), "missing" if value is None else value_text(value))
    console.print(table)


def value_text(value: Any) -> str:
    """A number with four digits; everything else as it is."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(value_text, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {value_text(entry)}" for name, entry in value.items())
    return str(value)


def _plain_table() -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _sample(sample: SampleShare) -> Text:
    name = f"{sample.index}" if sample.name is None else f"{sample.index} ({sample.name})"
    text = Text(name, style="bold").append(f": {sample.why}" if sample.why else "", style="not bold")
    return text.append(f" [{'; '.join(sample.notes)}]" if sample.notes else "", style="not bold")


def _range(value: float | None, bad: int) -> Text:
    size = "" if value is None or (bad and not math.isfinite(value)) else f"{value:.3g}"
    return Text(f"{size} {bad} bad".strip(), style="bold red") if bad else Text(size)


def _orders(trace: Sequence[ModuleTrace]) -> tuple[float, float]:
    """Smallest and largest order of magnitude of the outputs; as one bar a decade is enough."""
    found = [math.log10(row.output_absmax) for row in trace if row.output_absmax and math.isfinite(row.output_absmax)]
    return (min(found), max(found)) if found else (0.0, 0.0)


def _length(value: float | None, low: float, high: float, bar: int) -> int:
    if value is None or not value > 0 or not math.isfinite(value):
        return 0
    share = (math.log10(value) - low) / (high - low) if high > low else 0.0
    return 1 + round(share * (bar - 1))
