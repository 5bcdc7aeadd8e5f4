"""What the page shows, gathered from the diagnosis.

One builder for one run, one for runs against a baseline, one for two sides of several runs each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bifusion_diag.diagnosis.assess import RunAssessment
from bifusion_diag.diagnosis.comparing.attribution import ATTRIBUTED, Attribution
from bifusion_diag.diagnosis.comparing.groups import GroupComparison, Side
from bifusion_diag.diagnosis.comparing.pair import RunComparison
from bifusion_diag.diagnosis.comparing.suspicion import Suspect
from bifusion_diag.diagnosis.criteria import Criterion
from bifusion_diag.diagnosis.findings import Finding
from bifusion_diag.diagnosis.plain import to_plain
from bifusion_diag.diagnosis.quantity import number
from bifusion_diag.record.schema import Run
from bifusion_diag.reports.budget import BUDGETS, Budget
from bifusion_diag.reports.incidents import IncidentGroup, incident_groups
from bifusion_diag.reports.language import tr
from bifusion_diag.reports.page_facts import Reproduction, facts, limits, reproduction
from bifusion_diag.reports.page_findings import Judged, shown_findings
from bifusion_diag.reports.page_measures import MeasureGroup, compared_measures, run_measures
from bifusion_diag.reports.page_modules import ModuleTable, pair_table, run_table
from bifusion_diag.reports.page_plots import cost, heatmaps, why
from bifusion_diag.reports.page_settings import SettingTable, setting_tables
from bifusion_diag.reports.palette import ACCENT, BASELINE, CATEGORY
from bifusion_diag.reports.plots import Trace, draw_timeline, draw_validation
from bifusion_diag.reports.svg import Plot

MORE_COLOURS = (ACCENT, CATEGORY[2], CATEGORY[1], CATEGORY[6], CATEGORY[5])  # of the candidates
ATTRIBUTED_ROWS, SUSPECTS = 8, 12  # the JSON has them all


@dataclass(frozen=True)
class AttributionTable:
    """What makes up the difference: by module or by term, as one measure says."""

    title: str
    rows: tuple[Attribution, ...]


@dataclass(frozen=True)
class Suspicion:
    """Settings of a candidate that differ from the baseline's, the most suspect first, and what its parts add to the
    difference.
    """

    name: str
    attributions: list[AttributionTable]
    suspects: tuple[Suspect, ...]

    @property
    def leading(self) -> list[AttributionTable]:
        """Of each kind the first, which tells most."""
        kinds = {table.rows[0].kind: table for table in reversed(self.attributions)}
        return [table for table in self.attributions if kinds[table.rows[0].kind] is table]

    @property
    def others(self) -> list[AttributionTable]:
        """The rest."""
        return [table for table in self.attributions if table not in self.leading]


@dataclass(frozen=True)
class Page:
    """Everything the template reads. `names` are the runs, the baseline first; `judged` has one entry a judged run or
    side.

    `baseline_findings` are those of a comparison's baseline: that it is stable is to be seen, not taken for granted.
    """

    title: str
    compared: bool
    names: tuple[str, ...]
    baseline: str
    judged: list[Judged]
    baseline_findings: tuple[Finding, ...]
    facts: list[tuple[str, str]]
    limits: list[str]
    incidents: list[IncidentGroup]
    timeline: Plot
    validation: Plot | None
    heatmaps: list[Plot]
    modules: list[ModuleTable]
    why: list[Plot]
    why_gaps: list[str]
    cost: tuple[list[Plot], list[str]]
    criteria: list[tuple[Criterion, ...]]
    measured: tuple[str, ...]  # the runs in the table of measures
    measures: list[MeasureGroup]
    measures_left_out: int
    settings: list[SettingTable]
    reproduce: list[Reproduction]
    suspicions: list[Suspicion] = field(default_factory=list)
    groups: GroupComparison | None = None

    @property
    def opened(self) -> str:
        """Id of the incident that is open at first: that of the finding whose remedy the verdict gives, else of the
        first finding that has one, else the first."""
        told = [
            (not run.verdict.remedy or shown.finding.remedy != run.verdict.remedy, shown.incident)
            for run in self.judged
            for shown in run.findings
            if shown.incident
        ]
        if told:
            return min(told, key=lambda one: one[0])[1]
        return next((one.anchor for group in self.incidents for one in group.articles), "")

    @property
    def plots(self) -> list[Plot]:
        """All plots, in order."""
        some = [self.timeline, self.validation, *self.heatmaps, *self.why, *self.cost[0]]
        return [plot for plot in some if plot is not None]


def comparison_page(
    comparisons: Sequence[RunComparison],
    baseline: Run,
    candidates: Sequence[Run],
    *,
    sources: Sequence[str] = (),
    budget: Budget = BUDGETS[0],
) -> Page:
    """The page of a baseline and one or more candidates, each compared with it; `sources` are the paths of all."""
    first = comparisons[0].baseline
    assessments = [first, *(comparison.candidate for comparison in comparisons)]
    runs = [baseline, *candidates]
    names = _distinct([assessment.name for assessment in assessments])
    labels = dict(enumerate(names))
    colours = (BASELINE, *(MORE_COLOURS[index % len(MORE_COLOURS)] for index in range(len(candidates))))
    incidents = incident_groups(names, runs, budget.incidents)
    traces = _traces(runs, assessments, labels, colours, incidents)
    measures, measures_left_out = compared_measures(comparisons, budget)
    paths = _paths(sources, runs)
    plots, gaps = why(traces, budget)
    return Page(
        title=tr("{candidates} against {baseline}", candidates=", ".join(names[1:]), baseline=names[0]),
        compared=True,
        names=names,
        baseline=names[0],
        judged=[
            Judged(
                name,
                comparison.verdict,
                comparison.partings,
                comparison.first_loss_difference,
                shown_findings(runs[place], comparison.candidate, place, _of_run(incidents, place), paths[place]),
                comparison.candidate.unmeasured,
            )
            for place, (name, comparison) in enumerate(zip(names[1:], comparisons, strict=True), start=1)
        ],
        baseline_findings=first.findings,
        facts=facts(names, runs),
        limits=limits(comparisons, names),
        incidents=_judged_first(incidents, 1),
        timeline=draw_timeline(traces, detail=budget.detail),
        validation=draw_validation(traces),
        heatmaps=heatmaps(traces, budget),
        modules=[
            pair_table(comparison.modules, names[0], name, budget)
            for name, comparison in zip(names[1:], comparisons, strict=True)
        ],
        why=plots,
        why_gaps=gaps,
        cost=cost(traces, budget),
        criteria=list(zip(*(assessment.criteria for assessment in assessments), strict=True)),
        measured=names,
        measures=measures,
        measures_left_out=measures_left_out,
        settings=setting_tables(runs, budget),
        reproduce=[reproduction(run, name, budget) for run, name in zip(runs, names, strict=True)],
        suspicions=[
            one
            for name, comparison in zip(names[1:], comparisons, strict=True)
            if (one := _suspicion(name, comparison)) is not None
        ],
    )


def run_page(assessment: RunAssessment, run: Run, *, source: str = "", budget: Budget = BUDGETS[0]) -> Page:
    """The page of one run; `source` is its path."""
    incidents = incident_groups([assessment.name], [run], budget.incidents)
    traces = _traces([run], [assessment], {0: assessment.name}, (ACCENT,), incidents)
    plots, gaps = why(traces, budget)
    measures, measures_left_out = run_measures(assessment, budget)
    return Page(
        title=assessment.name,
        compared=False,
        names=(assessment.name,),
        baseline="",
        judged=[
            Judged(
                assessment.name,
                assessment.verdict,
                (),
                None,
                shown_findings(run, assessment, 0, _of_run(incidents, 0), source),
                assessment.unmeasured,
            )
        ],
        baseline_findings=(),
        facts=facts([assessment.name], [run]),
        limits=[tr(limit) for limit in assessment.limits],
        incidents=incidents,
        timeline=draw_timeline(traces, detail=budget.detail),
        validation=draw_validation(traces),
        heatmaps=heatmaps(traces, budget),
        modules=[run_table(assessment.modules, budget)],
        why=plots,
        why_gaps=gaps,
        cost=cost(traces, budget),
        criteria=[(criterion,) for criterion in assessment.criteria],
        measured=(assessment.name,),
        measures=measures,
        measures_left_out=measures_left_out,
        settings=setting_tables([run], budget),
        reproduce=[reproduction(run, assessment.name, budget)],
    )


def groups_page(
    group: GroupComparison,
    baselines: Sequence[Run],
    candidates: Sequence[Run],
    *,
    sources: Sequence[str] = (),
    budget: Budget = BUDGETS[0],
) -> Page:
    """The page of two sides of one or more runs each.

    The timeline draws each side as one colour; what shows one run shows the candidate's with the most bad steps, beside
    the run of the baseline that it was compared with.
    """
    worst = max(range(len(group.pairs)), key=lambda place: _bad_steps(group.pairs[place].candidate))
    pair = group.pairs[worst]
    partner = next(
        (place for place, one in enumerate(group.baseline.runs) if one.name == pair.baseline.name),
        min(worst, len(baselines) - 1),
    )
    shown = comparison_page([pair], baselines[partner], [candidates[worst]], sources=(), budget=budget)
    runs = [*baselines, *candidates]
    assessments = [*group.baseline.runs, *group.candidate.runs]
    names = _distinct([*_run_names(group.baseline), *_run_names(group.candidate)])
    labels = {
        place: group.baseline.name if place < len(baselines) else group.candidate.name for place in range(len(runs))
    }
    colours = [BASELINE] * len(baselines) + [ACCENT] * len(candidates)
    incidents = incident_groups(names, runs, budget.incidents)
    traces = _traces(runs, assessments, labels, colours, incidents)
    place = len(baselines) + worst
    judged = Judged(
        group.candidate.name,
        group.verdict,
        pair.partings,
        pair.first_loss_difference,
        shown_findings(
            runs[place], group.candidate.runs[worst], place, _of_run(incidents, place), _paths(sources, runs)[place]
        ),
        pair.candidate.unmeasured,
    )
    alone = tr(
        "Findings, heat maps and all that shows single runs are of {candidate}, of its side's runs that with the most "
        "bad steps, and of {baseline}.",
        candidate=names[place],
        baseline=names[partner],
    )
    return replace(
        shown,
        title=tr("{candidates} against {baseline}", candidates=group.candidate.name, baseline=group.baseline.name),
        names=names,
        baseline=group.baseline.name,
        judged=[judged],
        facts=facts(names, runs),
        limits=[*([alone] if len(runs) > 2 else []), *shown.limits],
        incidents=_judged_first(incidents, len(baselines)),
        timeline=draw_timeline(traces, detail=budget.detail),
        validation=draw_validation(traces),
        criteria=list(zip(*(assessment.criteria for assessment in assessments), strict=True)),
        settings=setting_tables(runs, budget),
        reproduce=[reproduction(run, name, budget) for run, name in zip(runs, names, strict=True)],
        suspicions=[_of_groups(group)],
        groups=group,
    )


def page_data(page: Page) -> dict[str, Any]:
    """What the page shows as plain data: texts, tables, and the values of its plots."""
    return {
        "title": page.title,
        "names": list(page.names),
        "facts": to_plain(page.facts),
        "limits": list(page.limits),
        "incidents": to_plain(page.incidents),
        "modules": to_plain(page.modules),
        "settings": to_plain(page.settings),
        "reproduce": to_plain(page.reproduce),
        "plots": [
            {"name": plot.name, "title": plot.title, "caption": plot.caption, "alt": plot.alt, "rows": plot.rows,
             "numbers": plot.numbers,
             "values": {label: {"steps": steps, "values": values} for label, (steps, values) in plot.values.items()}}
            for plot in page.plots
        ],
        "not_drawn": [*page.why_gaps, *page.cost[1]],
    }  # fmt: skip


def _bad_steps(assessment: RunAssessment) -> float:
    return number(assessment.measures.readings.get("bad_steps")) or 0.0


def _run_names(side: Side) -> list[str]:
    """The runs of a side, with their seeds where they have the same name."""
    return [
        run.name if len({one.name for one in side.runs}) == len(side.runs) else f"{run.name} · {seed}"
        for run, seed in zip(side.runs, side.seeds, strict=True)
    ]


def _suspicion(name: str, comparison: RunComparison) -> Suspicion | None:
    found: tuple[Attribution, ...] = comparison.attribution
    suspects: tuple[Suspect, ...] = comparison.suspects
    return Suspicion(name, _tables(found), suspects[:SUSPECTS]) if found or suspects else None


def _of_groups(group: GroupComparison) -> Suspicion:
    return Suspicion(group.candidate.name, _tables(group.attribution), group.suspects[:SUSPECTS])


def _tables(found: Sequence[Attribution]) -> list[AttributionTable]:
    """One table a kind and measure, in the order in which they come."""
    kinds: dict[tuple[str, str], list[Attribution]] = {}
    for one in found:
        kinds.setdefault((one.kind, one.measure), []).append(one)
    tables = []
    for (kind, measure), rows in kinds.items():
        what = tr(ATTRIBUTED[measure][1] if measure in ATTRIBUTED else measure)
        title = tr("By module: {what}" if kind == "module" else "By loss term: {what}", what=what)
        tables.append(AttributionTable(title, tuple(rows[:ATTRIBUTED_ROWS])))
    return tables


def _traces(
    runs: Sequence[Run],
    assessments: Sequence[RunAssessment],
    labels: dict[int, str],
    colours: Sequence[str],
    incidents: Sequence[IncidentGroup],
) -> list[Trace]:
    traces = []
    for place, (run, assessment, colour) in enumerate(zip(runs, assessments, colours, strict=True)):
        group = _of_run(incidents, place)
        anchors = {} if group is None else {article.step: article.anchor for article in group.articles}
        traces.append(Trace(run, assessment.measures, labels[place], colour, anchors))
    return traces


def _judged_first(incidents: Sequence[IncidentGroup], baselines: int) -> list[IncidentGroup]:
    """Those of the runs that are judged, then those of the baselines, which come first in the page's order of runs."""
    return sorted(incidents, key=lambda group: group.place < baselines)


def _of_run(incidents: Sequence[IncidentGroup], place: int) -> IncidentGroup | None:
    return next((group for group in incidents if group.place == place), None)


def _paths(sources: Sequence[str], runs: Sequence[Run]) -> Sequence[str]:
    return sources if len(sources) == len(runs) else [""] * len(runs)


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Names that occur twice get their number."""
    return tuple(name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names))
