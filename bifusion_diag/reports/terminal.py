"""The verdict in the terminal: about 30 lines, the same numbers as the page."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bifusion_diag.diagnosis.compare import MeasurePair, RunAssessment, RunComparison
from bifusion_diag.diagnosis.criteria import Criterion
from bifusion_diag.diagnosis.definitions import definition_of
from bifusion_diag.diagnosis.findings import Finding
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity, Reading
from bifusion_diag.diagnosis.verdict import Verdict
from bifusion_diag.reports.numbers import ratio_text, reading_text

_SHOWN = (  # the measures of the terminal; the page and the JSON have all
    "bad_steps",
    "nonfinite_steps",
    "first_nonfinite_step",
    "spikes",
    "grad_norm/p50",
    "grad_norm/p99",
    "grad_norm/max",
    "grad_cv",
    "clipped_share",
    "update_ratio/p50",
    "clip/points/absmax",
    "projection/inf",
    "projection/valid_share",
    "gate/mean",
    "eval/miou",
    "eval/ap50",
    "throughput/step_seconds",
)
_STATE_STYLE = {"stable": "bold green", "less stable": "bold yellow", "unstable": "bold red"}
_RESULT_STYLE = {"pass": "green", "fail": "red", "not measured": "dim"}
_FINDINGS = 5


def print_comparison(console: Console, comparison: RunComparison) -> None:
    """Print verdict, measures, criteria and findings of two runs."""
    left, right = comparison.baseline, comparison.candidate
    _print_verdict(console, comparison.verdict)
    if comparison.partings:
        first = comparison.partings[0]
        console.print(Text(f"The runs part at step {first.step}: {first.text}."))
    pairs = {pair.key: pair for pair in comparison.measures}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, justify in (("", "left"), (left.name, "right"), (right.name, "right"), ("ratio", "right")):
        table.add_column(Text(name), justify="left" if justify == "left" else "right")
    for key in _SHOWN:
        if key in pairs and _any_measured(pairs[key]):
            pair = pairs[key]
            row = _value(pair.baseline), _value(pair.candidate), Text(ratio_text(pair.ratio))
            table.add_row(Text(_title(key)), *row)
    for mine, theirs in zip(left.criteria, right.criteria, strict=True):
        table.add_row(Text(_criterion(console, mine)), _result(mine), _result(theirs), "")
    console.print(table)
    _print_findings(console, right.findings)
    _print_limits(console, comparison.limits)


def print_run(console: Console, assessment: RunAssessment) -> None:
    """Print verdict, measures, criteria and findings of one run."""
    _print_verdict(console, assessment.verdict)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column(Text(assessment.name), justify="right")
    for key in _SHOWN:
        reading = assessment.measures.readings.get(key)
        if isinstance(reading, Quantity):
            table.add_row(Text(_title(key)), _value(reading))
    for criterion in assessment.criteria:
        table.add_row(Text(_criterion(console, criterion)), _result(criterion))
    console.print(table)
    _print_findings(console, assessment.findings)
    _print_limits(console, assessment.limits)


def _print_limits(console: Console, limits: Sequence[str]) -> None:
    for limit in limits:
        console.print(Text(limit, style="dim"))


def _print_verdict(console: Console, verdict: Verdict) -> None:
    console.print(Text(verdict.state, style=_STATE_STYLE.get(verdict.state, "bold")))
    console.print(Text(" ".join(part for part in (verdict.sentence, verdict.detail) if part)))
    if verdict.remedy:
        change = " ".join(f"--set {key}={value}" for key, value in verdict.remedy.items())
        console.print(Text(f"{'Tried on a bad step, and it helped' if verdict.tried else 'To try'}: {change}"))


def _print_findings(console: Console, findings: Sequence[Finding]) -> None:
    for finding in findings[:_FINDINGS]:
        console.print(f"[bold]{finding.severity}[/bold] {escape(finding.title)} [dim]({finding.rule})[/dim]")
    if len(findings) > _FINDINGS:
        console.print(Text(f"and {len(findings) - _FINDINGS} more findings", style="dim"))


def _criterion(console: Console, criterion: Criterion) -> str:
    """The title, with the threshold where the terminal has room for it."""
    return f"{criterion.title}: {criterion.threshold}" if console.width >= 100 else criterion.title


def _any_measured(pair: MeasurePair) -> bool:
    return isinstance(pair.baseline, Quantity) or isinstance(pair.candidate, Quantity)


def _title(key: str) -> str:
    definition = definition_of(key)
    grouped = key.startswith(("grad_norm/", "clip/", "projection/", "eval/", "update_ratio/"))
    return f"{definition.group}: {definition.title}" if grouped else definition.title


def _value(reading: Reading) -> Text:
    return Text(reading_text(reading), style="dim" if isinstance(reading, NotMeasured) else "")


def _unit(reading: Quantity) -> str:
    return f" {reading.unit}" if reading.unit and reading.value is not None else ""


def _result(criterion: Criterion) -> Text:
    number = (
        ""
        if isinstance(criterion.reading, NotMeasured)
        else f" ({reading_text(criterion.reading)}{_unit(criterion.reading)})"
    )
    return Text(criterion.result + number, style=_RESULT_STYLE[criterion.result])
