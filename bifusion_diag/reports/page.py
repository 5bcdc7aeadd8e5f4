"""What the page shows, gathered from the diagnosis. One builder for one run and for two."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bifusion_diag.diagnosis.compare import RunAssessment, RunComparison
from bifusion_diag.diagnosis.criteria import Criterion
from bifusion_diag.diagnosis.definitions import DEFINITIONS, definition_of, member_of
from bifusion_diag.diagnosis.findings import Finding, Unmeasured
from bifusion_diag.diagnosis.modules import ModuleGradient, ModulePair
from bifusion_diag.diagnosis.parting import Parting
from bifusion_diag.diagnosis.quantity import Reading
from bifusion_diag.diagnosis.settings_diff import flatten
from bifusion_diag.diagnosis.verdict import Verdict
from bifusion_diag.record.schema import Run
from bifusion_diag.reports.numbers import ratio_text, text
from bifusion_diag.reports.palette import ACCENT, BASELINE
from bifusion_diag.reports.plots import (
    Trace,
    draw_alpha,
    draw_clip_ranges,
    draw_heatmap,
    draw_projection,
    draw_terms,
    draw_timeline,
)
from bifusion_diag.reports.sparkline import Spark, draw_spark
from bifusion_diag.reports.svg import Plot

MODULE_ROWS = 200  # of the table of modules; the JSON has them all
_FACTS = ("data", "labels", "clip_weights")


@dataclass(frozen=True)
class MeasureRow:
    """One line of the table of measures; one reading a run."""

    title: str
    readings: tuple[Reading, ...]
    ratio: float | None
    definition: str


@dataclass(frozen=True)
class MeasureGroup:
    """Measures of one kind."""

    title: str
    rows: list[MeasureRow]


@dataclass(frozen=True)
class SettingLine:
    """One setting; one text a run."""

    key: str
    texts: tuple[str, ...]
    differs: bool


@dataclass(frozen=True)
class SettingTable:
    """Settings of one kind."""

    title: str
    rows: list[SettingLine]

    @property
    def differing(self) -> list[SettingLine]:
        """The lines that differ."""
        return [row for row in self.rows if row.differs]

    @property
    def equal(self) -> list[SettingLine]:
        """The lines that do not differ."""
        return [row for row in self.rows if not row.differs]


@dataclass(frozen=True)
class Page:
    """Everything the template reads."""

    title: str
    compared: bool
    names: tuple[str, ...]
    verdict: Verdict
    facts: list[tuple[str, str]]
    limits: tuple[str, ...]
    timeline: Plot
    partings: tuple[Parting, ...]
    first_loss_difference: int | None
    findings: tuple[Finding, ...]
    sparks: list[Spark | None]
    unmeasured: tuple[Unmeasured, ...]
    heatmap: Plot | None
    modules_title: str
    modules_head: tuple[str, ...]
    modules: list[tuple[str, ...]]
    modules_left_out: int
    why: list[Plot]
    why_gaps: list[str]
    criteria: list[tuple[Criterion, ...]]
    measures: list[MeasureGroup]
    settings: list[SettingTable]
    reproduce: list[dict[str, str]]


def comparison_page(comparison: RunComparison, baseline: Run, candidate: Run) -> Page:
    """The page of two runs."""
    left, right = comparison.baseline, comparison.candidate
    traces = [Trace(baseline, left.measures, left.name, BASELINE), Trace(candidate, right.measures, right.name, ACCENT)]
    why, gaps = _why(traces)
    rows = [_pair_row(pair) for pair in comparison.modules[:MODULE_ROWS]]
    settings = [
        SettingTable(
            group.title, [SettingLine(row.key, (row.baseline, row.candidate), row.differs) for row in group.rows]
        )
        for group in comparison.settings
    ]
    measures = [
        (
            pair.key,
            MeasureRow(_measure_title(pair.key), (pair.baseline, pair.candidate), pair.ratio, _text_of(pair.key)),
        )
        for pair in comparison.measures
    ]
    return Page(
        title=f"{right.name} against {left.name}",
        compared=True,
        names=(left.name, right.name),
        verdict=comparison.verdict,
        facts=_facts([(left, baseline), (right, candidate)]),
        limits=comparison.limits,
        timeline=draw_timeline(traces),
        partings=comparison.partings,
        first_loss_difference=comparison.first_loss_difference,
        findings=right.findings,
        sparks=[draw_spark(candidate, finding) for finding in right.findings],
        unmeasured=right.unmeasured,
        heatmap=draw_heatmap(traces),
        modules_title="Modules of both runs, worst first",
        modules_head=(
            "module",
            left.name,
            right.name,
            "ratio",
            "largest",
            "non-finite steps",
            f"state in {right.name}",
        ),
        modules=rows,
        modules_left_out=max(0, len(comparison.modules) - MODULE_ROWS),
        why=why,
        why_gaps=gaps,
        criteria=list(zip(left.criteria, right.criteria, strict=True)),
        measures=_groups(measures),
        settings=settings,
        reproduce=[_reproduce(baseline, left.name), _reproduce(candidate, right.name)],
    )


def run_page(assessment: RunAssessment, run: Run) -> Page:
    """The page of one run."""
    trace = Trace(run, assessment.measures, assessment.name, ACCENT)
    why, gaps = _why([trace])
    sources = (
        ("Settings", run.settings),
        ("Data and weights", run.provenance),
        ("Parameters", run.parameters),
        ("Environment", run.environment),
    )
    settings = [
        SettingTable(title, [SettingLine(key, (value,), False) for key, value in flatten(source).items()])
        for title, source in sources
        if source
    ]
    readings = assessment.measures.readings.items()
    measures = [(key, MeasureRow(_measure_title(key), (reading,), None, _text_of(key))) for key, reading in readings]
    return Page(
        title=assessment.name,
        compared=False,
        names=(assessment.name,),
        verdict=assessment.verdict,
        facts=_facts([(assessment, run)]),
        limits=(),
        timeline=draw_timeline([trace]),
        partings=(),
        first_loss_difference=None,
        findings=assessment.findings,
        sparks=[draw_spark(run, finding) for finding in assessment.findings],
        unmeasured=assessment.unmeasured,
        heatmap=draw_heatmap([trace]),
        modules_title="Modules in execution order",
        modules_head=("module", "median", "largest", "non-finite steps", "state"),
        modules=[_module_row(row) for row in assessment.modules[:MODULE_ROWS]],
        modules_left_out=max(0, len(assessment.modules) - MODULE_ROWS),
        why=why,
        why_gaps=gaps,
        criteria=[(criterion,) for criterion in assessment.criteria],
        measures=_groups(measures),
        settings=settings,
        reproduce=[_reproduce(run, assessment.name)],
    )


def _why(traces: Sequence[Trace]) -> tuple[list[Plot], list[str]]:
    """The plots of losses, features, projection and gate of every run that has them, and what no run has."""
    plots: list[Plot] = []
    gaps: list[str] = []
    kinds = (
        ("terms", draw_terms, "the losses by term (probe losses)"),
        ("clip", draw_clip_ranges, "the CLIP features (probe clip)"),
        ("projection", draw_projection, "the projection (probe projection)"),
        ("alpha", draw_alpha, "the gate (probe gate)"),
    )
    for kind, draw, words in kinds:
        drawn = [draw(trace, f"{kind}{index}") for index, trace in enumerate(traces)]
        plots += [plot for plot in drawn if plot is not None]
        if not any(drawn):
            gaps.append(f"Not measured: no run recorded {words}.")
    gaps.append("Not measured: each term's share of the gradient in shared modules, and conflicts between terms.")
    return plots, gaps


def _facts(runs: Sequence[tuple[RunAssessment, Run]]) -> list[tuple[str, str]]:
    """Provenance that the first screen states, one text where the runs agree."""
    facts: list[tuple[str, str]] = []
    for key in _FACTS:
        values = [(assessment.name, _fact(run, key)) for assessment, run in runs]
        told = dict.fromkeys(value for _, value in values if value)
        if len(told) == 1:
            facts.append((_words(key), next(iter(told))))
        elif told:
            facts += [(f"{_words(key)}, {name}", value) for name, value in values if value]
    for assessment, run in runs:
        epochs = "" if run.status == "completed" else f", {run.status}"
        facts.append((assessment.name, f"{len(run.steps)} steps{epochs}"))
    return facts


def _fact(run: Run, key: str) -> str:
    value: Any = run.provenance.get(key)
    if isinstance(value, dict):
        return ", ".join(f"{name} {text}" for name, text in flatten(value).items())
    return "" if value is None else str(value)


def _words(key: str) -> str:
    return {"clip_weights": "CLIP weights"}.get(key, key)


def _pair_row(pair: ModulePair) -> tuple[str, ...]:
    mine = pair.candidate
    return (
        pair.module,
        _norm(pair.baseline.median),
        _norm(mine.median),
        ratio_text(pair.ratio),
        _norm(mine.maximum),
        text(mine.nonfinite, whole=True),
        mine.state,
    )


def _module_row(row: ModuleGradient) -> tuple[str, ...]:
    return (row.module, _norm(row.median), _norm(row.maximum), text(row.nonfinite, whole=True), row.state)


def _norm(value: float | None) -> str:
    return "–" if value is None else text(value)


def _measure_title(key: str) -> str:
    member = member_of(key)
    title = definition_of(key).title
    return title if member in ("", "*") else f"{title}, {member}"


def _text_of(key: str) -> str:
    return definition_of(key).text


def _groups(rows: Iterable[tuple[str, MeasureRow]]) -> list[MeasureGroup]:
    """By group, in the order of the definitions."""
    groups = {definition.group: MeasureGroup(definition.group, []) for definition in DEFINITIONS}
    for key, row in rows:
        groups[definition_of(key).group].rows.append(row)
    return [group for group in groups.values() if group.rows]


def _reproduce(run: Run, name: str) -> dict[str, str]:
    facts = {
        "run": run.header.run_id,
        "begun": run.header.created,
        "status": run.status,
        **{key: value for key, value in flatten(run.environment).items() if len(value) < 80},
    }
    seed = run.settings.get("training", {}).get("seed") if isinstance(run.settings.get("training"), dict) else None
    if seed is not None:
        facts["seed"] = str(seed)
    if run.error:
        facts["error"] = run.error
    line = " · ".join(f"{key} {value}" for key, value in facts.items())
    return {"name": name, "command": run.header.command, "line": line}
