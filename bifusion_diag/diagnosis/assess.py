"""One run assessed, as pure data: what terminal, HTML and JSON show of it comes from here."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.diagnosis.criteria import Criterion, judge
from bifusion_diag.diagnosis.findings import Context, Finding, Unmeasured, apply_rules
from bifusion_diag.diagnosis.measures import Measures
from bifusion_diag.diagnosis.modules import ModuleGradient, module_gradients
from bifusion_diag.diagnosis.names import display_name, is_exact
from bifusion_diag.diagnosis.restrict import cut_run, measure_on
from bifusion_diag.diagnosis.rules import RULES
from bifusion_diag.diagnosis.rules.incidents import without_repeats
from bifusion_diag.diagnosis.thresholds import DEFAULT_THRESHOLDS, Thresholds
from bifusion_diag.diagnosis.validation import validation_limits
from bifusion_diag.diagnosis.verdict import Verdict, judge_run, with_ending
from bifusion_diag.errors import UserError
from bifusion_diag.record.schema import Run


@dataclass(frozen=True)
class RunAssessment:
    """What one run by itself shows.

    Attributes:
        name: of the run; two runs of a comparison have different ones.
        preset: of its model.
        status: how it ended.
        error: the error's text where it failed.
        steps: how many steps are assessed.
        step_range: the first and the last of them.
        measures: of these steps.
        criteria: of the documents.
        findings: worst first.
        unmeasured: rules that had no data.
        modules: gradients by module, in execution order.
        verdict: on the run by itself.
        limits: what has to be said beside its numbers; of a comparison, see there.
    """

    name: str
    preset: str
    status: str
    error: str | None
    steps: int
    step_range: tuple[int, int]
    measures: Measures
    criteria: tuple[Criterion, ...]
    findings: tuple[Finding, ...]
    unmeasured: tuple[Unmeasured, ...]
    modules: tuple[ModuleGradient, ...]
    verdict: Verdict
    limits: tuple[str, ...] = ()


def assess_run(run: Run, thresholds: Thresholds = DEFAULT_THRESHOLDS) -> RunAssessment:
    """Assess one run.

    Raises:
        UserError: the run recorded no step.
    """
    if not len(run.steps):
        raise UserError(
            f"run {run.header.name!r} recorded no step: there is nothing to report. Its status: {run.status}."
        )
    assessment = assess_part(run, display_name(run), run.steps, None, thresholds)
    reduced = () if is_exact(run) else ("The record is reduced: curves by module show buckets of several steps.",)
    return replace(assessment, limits=(*reduced, *validation_limits([("this run", run)])))


def assess_part(
    run: Run,
    name: str,
    steps: NDArray[np.int64],
    baseline: Run | None,
    thresholds: Thresholds,
    scales: tuple[float, ...] = (1.0, 1.0),
) -> RunAssessment:
    """Assess a run over some of its steps (K,), ascending.

    Args:
        run: assessed.
        name: to call it by.
        steps: of it.
        baseline: what it is compared with.
        thresholds: bounds.
        scales: how far a step of the baseline and one of the run go, on the axis on which they are compared.
    """
    measures = measure_on(run, steps)
    part = cut_run(run, steps)
    context = Context(part, measures, thresholds, baseline)
    found, unmeasured = apply_rules(context, RULES)
    findings = without_repeats(found)
    return RunAssessment(
        name=name,
        preset=run.header.preset,
        status=run.status,
        error=run.error,
        steps=int(steps.size),
        step_range=(int(steps[0]), int(steps[-1])),
        measures=measures,
        criteria=judge(part, measures, baseline, (scales[0], scales[1])),
        findings=findings,
        unmeasured=unmeasured,
        modules=module_gradients(part if part.names("grads/") else run),
        verdict=with_ending(judge_run(name, measures, steps, findings, thresholds, context.incidents), run),
    )
