"""The terminal's tables."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
from rich.console import Console

from bifusion_diag.diagnosis import assess_run, compare_runs
from bifusion_diag.record.schema import Run, Series
from bifusion_diag.reports import print_comparison, print_run


def test_a_comparison_fits_a_screen_and_says_what_the_page_says(baseline: Run, candidate: Run) -> None:
    console = Console(file=io.StringIO(), width=110)
    comparison = compare_runs(baseline, candidate)
    print_comparison(console, comparison)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert len(output.splitlines()) <= 40
    assert comparison.verdict.sentence in " ".join(output.split())
    assert "The runs part at step 141" in output
    assert "fail (3 steps)" in output
    assert "not measured" in output


def test_one_run(candidate: Run) -> None:
    console = Console(file=io.StringIO(), width=110)
    print_run(console, assess_run(candidate))
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert len(output.splitlines()) <= 40
    assert "bifusion-fragile is unstable: 10 bad steps in 600" in output


def test_the_report_of_one_run_says_what_its_metrics_are_measured_against(candidate: Run) -> None:
    steps = candidate.steps
    series = {"eval/miou": Series.from_values("eval/miou", steps, np.full(steps.size, 0.5))}
    labels = {"validation": {"labels": "geometric pseudo-labels (no ground truth)"}}
    header = dataclasses.replace(candidate.header, provenance={**candidate.provenance, **labels})
    run = dataclasses.replace(candidate, header=header, all_series={**candidate.all_series, **series})
    console = Console(file=io.StringIO(), width=110)
    print_run(console, assess_run(run))
    output = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "mIoU and AP of this run are measured against geometric pseudo-labels (no ground truth)" in output


def test_markup_in_names_stays_text(candidate: Run) -> None:
    named = dataclasses.replace(candidate, header=dataclasses.replace(candidate.header, name="[red]x[/red] [/oops]"))
    console = Console(file=io.StringIO(), width=110)
    print_run(console, assess_run(named))
    assert "[red]x[/red] [/oops] is unstable" in console.file.getvalue()  # type: ignore[attr-defined]
