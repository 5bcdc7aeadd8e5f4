"""What the page shows, gathered from the diagnosis. One builder for one run, one for a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bifusion_diag.diagnosis.compare import RunAssessment, RunComparison
from bifusion_diag.diagnosis.criteria import Criterion
from bifusion_diag.diagnosis.definitions import DEFINITIONS, definition_of, member_of
from bifusion_diag.diagnosis.findings import Finding, Unmeasured
from bifusion_diag.diagnosis.modules import ModuleGradient, ModulePair
from bifusion_diag.diagnosis.names import loss_terms
from bifusion_diag.diagnosis.parting import Parting
from bifusion_diag.diagnosis.quantity import NotMeasured, Reading
from bifusion_diag.diagnosis.settings_diff import ABSENT, flatten
from bifusion_diag.diagnosis.verdict import Verdict
from bifusion_diag.record.schema import Run
from bifusion_diag.reports.incidents import IncidentGroup, incident_groups
from bifusion_diag.reports.numbers import ratio_text, text
from bifusion_diag.reports.palette import ACCENT, BASELINE, CATEGORY
from bifusion_diag.reports.plots import (
    Trace,
    draw_alpha,
    draw_clip_ranges,
    draw_gradients,
    draw_heatmap,
    draw_projection,
    draw_terms,
    draw_throughput,
    draw_timeline,
    draw_updates,
    draw_validation,
)
from bifusion_diag.reports.sparkline import Spark, draw_spark
from bifusion_diag.reports.svg import Plot

MODULE_ROWS = 500  # of the table of modules; the JSON has them all
MORE_COLOURS = (ACCENT, CATEGORY[2], CATEGORY[1], CATEGORY[6], CATEGORY[5])  # of the candidates
_FACTS = ("data", "labels", "validation", "clip_weights", "text_features", "initial_weights")
_OF_SOME_MODELS = ("clip_weights", "text_features")  # the others have no such thing


@dataclass(frozen=True)
class MeasureRow:
    """One line of the table of measures: one reading a run, one ratio to the baseline's a candidate.

    `definition` is "" where it is that of the line above.
    """

    title: str
    readings: tuple[Reading, ...]
    ratios: tuple[float | None, ...]
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

    @property
    def differs(self) -> bool:
        """Whether the runs differ in it."""
        return len(set(self.texts)) > 1


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
class ModuleTable:
    """Gradients by module; the last column is a state in words, the others are numbers."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    left_out: int


@dataclass(frozen=True)
class Judged:
    """The verdict on one run and what supports it."""

    name: str
    verdict: Verdict
    partings: tuple[Parting, ...]
    first_loss_difference: int | None
    findings: list[tuple[Finding, Spark | None]]
    unmeasured: tuple[Unmeasured, ...]


@dataclass(frozen=True)
class Page:
    """Everything the template reads. `names` has the baseline first, `judged` one entry a judged run.

    `baseline_findings` are those of a comparison's baseline: that it is stable is to be seen, not taken for granted.
    """

    title: str
    compared: bool
    names: tuple[str, ...]
    judged: list[Judged]
    baseline_findings: tuple[Finding, ...]
    facts: list[tuple[str, str]]
    limits: list[str]
    incidents: list[IncidentGroup]
    timeline: Plot
    validation: Plot | None
    heatmap: Plot | None
    modules: list[ModuleTable]
    why: list[Plot]
    why_gaps: list[str]
    cost: tuple[list[Plot], list[str]]
    criteria: list[tuple[Criterion, ...]]
    measures: list[MeasureGroup]
    settings: list[SettingTable]
    reproduce: list[dict[str, str]]


def comparison_page(comparisons: Sequence[RunComparison], baseline: Run, candidates: Sequence[Run]) -> Page:
    """The page of a baseline and one or more candidates, each compared with it."""
    first = comparisons[0].baseline
    assessments = [first, *(comparison.candidate for comparison in comparisons)]
    runs = [baseline, *candidates]
    names = _distinct([assessment.name for assessment in assessments])
    colours = (BASELINE, *(MORE_COLOURS[index % len(MORE_COLOURS)] for index in range(len(candidates))))
    traces = [
        Trace(run, assessment.measures, name, colour)
        for run, assessment, name, colour in zip(runs, assessments, names, colours, strict=True)
    ]
    why, gaps = _why(traces)
    return Page(
        title=f"{', '.join(names[1:])} against {names[0]}",
        compared=True,
        names=names,
        judged=[
            Judged(
                name,
                comparison.verdict,
                comparison.partings,
                comparison.first_loss_difference,
                _with_sparks(run, comparison.candidate),
                comparison.candidate.unmeasured,
            )
            for name, run, comparison in zip(names[1:], candidates, comparisons, strict=True)
        ],
        baseline_findings=first.findings,
        facts=_facts(names, runs),
        limits=_limits(comparisons, names),
        incidents=incident_groups(names, runs),
        timeline=draw_timeline(traces),
        validation=draw_validation(traces),
        heatmap=draw_heatmap(traces),
        modules=[
            _pair_table(comparison.modules, names[0], name)
            for name, comparison in zip(names[1:], comparisons, strict=True)
        ],
        why=why,
        why_gaps=gaps,
        cost=_cost(traces),
        criteria=list(zip(*(assessment.criteria for assessment in assessments), strict=True)),
        measures=_compared_measures(comparisons),
        settings=_setting_tables(runs),
        reproduce=[_reproduce(run, name) for run, name in zip(runs, names, strict=True)],
    )


def _with_sparks(run: Run, assessment: RunAssessment) -> list[tuple[Finding, Spark | None]]:
    return [(finding, draw_spark(run, finding)) for finding in assessment.findings]


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Names that occur twice get their number."""
    return tuple(name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names))


def _limits(comparisons: Sequence[RunComparison], names: Sequence[str]) -> list[str]:
    """The limits of every comparison, once each; with several candidates, named."""
    limits: dict[str, None] = {}
    for name, comparison in zip(names[1:], comparisons, strict=True):
        for limit in comparison.limits:
            named = limit.replace("The candidate", name, 1).replace("the candidate", name, 1)
            limits[limit if len(comparisons) == 1 else named] = None
    if len({comparison.baseline.step_range for comparison in comparisons}) > 1:
        limits[
            f"The candidates cover different steps: the baseline's numbers are those of its steps in {names[1]}."
        ] = None
    return list(limits)


def _compared_measures(comparisons: Sequence[RunComparison]) -> list[MeasureGroup]:
    """The baseline's reading, every candidate's, and the ratios, by measure."""
    tables = [{pair.key: pair for pair in comparison.measures} for comparison in comparisons]
    gap = NotMeasured("was not recorded")
    rows = []
    for key in dict.fromkeys(key for table in tables for key in table):
        pairs = [table.get(key) for table in tables]
        before = next(pair.baseline for pair in pairs if pair is not None)
        readings = (before, *(gap if pair is None else pair.candidate for pair in pairs))
        ratios = tuple(None if pair is None else pair.ratio for pair in pairs)
        rows.append((key, MeasureRow(_measure_title(key), readings, ratios, definition_of(key).text)))
    return _groups(rows)


def _setting_tables(runs: Sequence[Run]) -> list[SettingTable]:
    """Settings of all runs side by side, differences first in each table."""
    tables = []
    for title, sources in (
        ("Settings", [run.settings for run in runs]),
        ("Data and weights", [run.provenance for run in runs]),
        ("Parameters", [run.parameters for run in runs]),
        ("Environment", [run.environment for run in runs]),
    ):
        flat = [flatten(source) for source in sources]
        keys = dict.fromkeys(key for one in flat for key in one)
        rows = [SettingLine(key, tuple(one.get(key, ABSENT) for one in flat)) for key in keys]
        if rows:
            tables.append(SettingTable(title, sorted(rows, key=lambda row: not row.differs)))
    return tables


def _pair_table(pairs: Sequence[ModulePair], baseline: str, candidate: str) -> ModuleTable:
    head = (
        "module",
        baseline,
        candidate,
        "ratio",
        "largest",
        "non-finite steps",
        "update ratio",
        f"state in {candidate}",
    )
    rows = [_pair_row(pair) for pair in pairs[:MODULE_ROWS]]
    title = (
        f"Median gradient norm of the modules of both {baseline} and {candidate}, non-finite first, then by ratio; "
        f"the last four columns are of {candidate}"
    )
    return ModuleTable(title, head, rows, len(pairs) - len(rows))


def run_page(assessment: RunAssessment, run: Run) -> Page:
    """The page of one run."""
    trace = Trace(run, assessment.measures, assessment.name, ACCENT)
    why, gaps = _why([trace])
    readings = assessment.measures.readings.items()
    measures = [
        (key, MeasureRow(_measure_title(key), (reading,), (), definition_of(key).text)) for key, reading in readings
    ]
    modules = sorted(assessment.modules, key=lambda row: row.median is None)  # a frozen part would fill the first rows
    rows = [_module_row(row) for row in modules[:MODULE_ROWS]]
    title = "Gradient norm by module, in execution order; those without a gradient last"
    head = ("module", "median", "largest", "non-finite steps", "update ratio", "state")
    return Page(
        title=assessment.name,
        compared=False,
        names=(assessment.name,),
        judged=[
            Judged(assessment.name, assessment.verdict, (), None, _with_sparks(run, assessment), assessment.unmeasured)
        ],
        baseline_findings=(),
        facts=_facts([assessment.name], [run]),
        limits=list(assessment.limits),
        incidents=incident_groups([assessment.name], [run]),
        timeline=draw_timeline([trace]),
        validation=draw_validation([trace]),
        heatmap=draw_heatmap([trace]),
        modules=[ModuleTable(title, head, rows, len(modules) - len(rows))],
        why=why,
        why_gaps=gaps,
        cost=_cost([trace]),
        criteria=[(criterion,) for criterion in assessment.criteria],
        measures=_groups(measures),
        settings=_setting_tables([run]),
        reproduce=[_reproduce(run, assessment.name)],
    )


def _why(traces: Sequence[Trace]) -> tuple[list[Plot], list[str]]:
    """The plots of losses, features, projection and gate of every run that has them, and what no run has."""
    colours = _term_colours(traces)
    plots, gaps = _drawn(
        traces,
        ("terms", partial(draw_terms, colours=colours), "the losses by term (probe losses)"),
        (
            "gradients",
            partial(draw_gradients, colours=colours),
            "each term's share of the gradient in shared modules, and conflicts between terms (probe loss_gradients)",
        ),
        ("updates", draw_updates, "how far weights move, ‖Δw‖ ÷ ‖w‖ (probe updates)"),
        ("clip", draw_clip_ranges, "the CLIP features (probe clip)"),
        ("projection", draw_projection, "the projection (probe projection)"),
        ("alpha", draw_alpha, "the gate (probe gate)"),
    )
    if not any(trace.run.names("eval/") for trace in traces):
        gaps.append("Not measured: mIoU and AP on validation scenes (train with --evaluate-every).")
    return plots, gaps


def _drawn(
    traces: Sequence[Trace], *kinds: tuple[str, Callable[[Trace, str], Plot | None], str]
) -> tuple[list[Plot], list[str]]:
    """Plots of every run, and a sentence for every kind that no run has."""
    plots: list[Plot] = []
    gaps: list[str] = []
    for kind, draw, words in kinds:
        drawn = [draw(trace, f"{kind}{index}") for index, trace in enumerate(traces)]
        plots += [plot for plot in drawn if plot is not None]
        if not any(drawn):
            gaps.append(f"Not measured: no run recorded {words}.")
    return plots, gaps


def _cost(traces: Sequence[Trace]) -> tuple[list[Plot], list[str]]:
    return _drawn(traces, ("throughput", draw_throughput, "where the time of a step goes (probe throughput)"))


def _term_colours(traces: Sequence[Trace]) -> dict[str, str]:
    """One colour a loss term, the same in every run."""
    terms = dict.fromkeys(term for trace in traces for term in loss_terms(trace.run, "weighted"))
    return {term: CATEGORY[place % len(CATEGORY)] for place, term in enumerate(terms)}


def _facts(names: Sequence[str], runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Provenance that the first screen states, one text where all runs that can have it agree."""
    facts: list[tuple[str, str]] = []
    for key in _FACTS:
        values = [(name, _fact(run, key)) for name, run in zip(names, runs, strict=True)]
        told = dict.fromkeys(value for _, value in values if value)
        if len(told) == 1 and (key in _OF_SOME_MODELS or all(value for _, value in values)):
            facts.append((_words(key), next(iter(told))))
        else:
            facts += [(f"{_words(key)}, {name}", value) for name, value in values if value]
    for name, run in zip(names, runs, strict=True):
        facts.append(
            (
                name,
                f"{text(len(run.steps), whole=True)} step{'s' if len(run.steps) != 1 else ''}"
                + ("" if run.status == "completed" else f", {run.status}"),
            )
        )
    return facts


def _fact(run: Run, key: str) -> str:
    """A provenance entry in a few words; of a structured one its kind, its folder or file, how many scenes, and of
    validation data its labels too.
    """
    value: Any = run.provenance.get(key)
    if isinstance(value, Mapping):
        scenes = f"{value['scenes']} scenes" if "scenes" in value else ""
        labels = value.get("labels") if key == "validation" else None
        parts = (value.get("kind"), value.get("folder"), value.get("file"), scenes, labels)
        return ", ".join(str(part) for part in parts if part)
    return "" if value is None else str(value)


def _words(key: str) -> str:
    return {"clip_weights": "CLIP weights"}.get(key, key.replace("_", " "))


def _pair_row(pair: ModulePair) -> tuple[str, ...]:
    mine = pair.candidate
    return (
        pair.module,
        _norm(pair.baseline.median),
        _norm(mine.median),
        ratio_text(pair.ratio),
        _norm(mine.maximum),
        text(mine.nonfinite, whole=True),
        _norm(mine.update_ratio),
        mine.state,
    )


def _module_row(row: ModuleGradient) -> tuple[str, ...]:
    numbers = _norm(row.median), _norm(row.maximum), text(row.nonfinite, whole=True), _norm(row.update_ratio)
    return (row.module, *numbers, row.state)


def _norm(value: float | None) -> str:
    return "–" if value is None else text(value)


def _measure_title(key: str) -> str:
    member = member_of(key)
    title = definition_of(key).title
    return title if member in ("", "*") else f"{title}, {member}"


def _groups(rows: Iterable[tuple[str, MeasureRow]]) -> list[MeasureGroup]:
    """By group, in the order of the definitions."""
    groups = {definition.group: MeasureGroup(definition.group, []) for definition in DEFINITIONS}
    for key, row in rows:
        groups[definition_of(key).group].rows.append(row)
    for group in groups.values():
        said = [row.definition for row in group.rows]
        group.rows[:] = [
            replace(row, definition="") if place and said[place - 1] == row.definition else row
            for place, row in enumerate(group.rows)
        ]
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
