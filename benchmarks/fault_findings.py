"""What the findings say about a fault that is known: the right rule, the right place, and a remedy that cures it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fault_cases import CASES, Job
from benchmarks.fault_run import Outcome
from bifusion_diag.diagnosis import Finding, assess_run
from bifusion_diag.experiments.rebuild import is_own
from bifusion_diag.experiments.what_if import UserCode, WhatIf, save, try_remedies
from bifusion_diag.record import load_run
from bifusion_diag.replay.capsules.capsule import Capsule, read_capsule
from bifusion_diag.replay.capsules.execute import training_of
from bifusion_diag.replay.step import Training
from bifusion_diag.replay.trials.what_if import AS_IT_WAS, Trial

ENTRY = "benchmarks.fault_run:build"
TRIAL_STEPS = 4  # after the bad one
HARMLESS = 1.1  # a loss at most so many times the lowest of all trials has not been harmed

_SEEN = ("nonfinite-loss", "nonfinite-output")  # NaN that is written into a tensor has no mechanism to be found
_LABELS = ("incident-wrong-labels",)
_INPUT = ("incident-nonfinite-input", "incident-poisoned-buffers", "data-nonfinite", "projection-nonfinite")
# a gradient that a user's hook has replaced; clipping takes one NaN to all weights
_HOOKED = ("incident-gradient-scaled", "nonfinite-gradient", "incident-nan-through-clipping")
_OUTLIER = ("incident-input-outlier",)
_CUT = ("incident-detached",)
_SCALED = ("incident-gradient-scaled",)
_MOMENTS = ("incident-corrupt-optimizer-state",)
_ALTERED = ("incident-gradient-scaled", "incident-gradients-not-cleared", "incident-detached", "incident-dead-units")

#: Fault, or "workload/fault" → the rules whose finding is right about it, by what was done to the training.
RIGHT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("nan-output", "inf-output", "infinite-activation"), (*_SEEN, "incident-module-output-jump")),
    **dict.fromkeys(("scale-output", "activation-x10000", "sharp-logits"), ("incident-module-output-jump",)),
    **dict.fromkeys(("log-zero", "log-of-empty-channel"), ("incident-log-of-zero",)),
    **dict.fromkeys(("exp-overflow", "naive-softmax"), ("incident-exp-overflow",)),
    "huge-scores": ("incident-exp-overflow", "incident-module-output-jump"),  # queries and keys × 1e30
    **dict.fromkeys(("masked-softmax", "empty-sequence"), ("incident-masked-softmax-row", "attention-masked-rows")),
    **dict.fromkeys(("zero-output", "zeroed-features"), ("incident-dead-units", "incident-module-output-jump")),  # × 0
    **dict.fromkeys(("sqrt-zero", "root-of-zero-loss"), ("incident-sqrt-at-zero",)),
    **dict.fromkeys(("nan-gradient", "nan-gradient-hook", "parameter-hook-nan"), _HOOKED),
    "custom-backward": ("incident-custom-function",),
    **dict.fromkeys(("scale-gradient", "gradient-x1000", "branch-gradient-x1000"), _SCALED),
    **dict.fromkeys(
        ("zero-gradient", "embedding-gradient-0"), (*_CUT, "incident-dead-units", "incident-gradient-scaled")
    ),
    **dict.fromkeys(("detach", "stem-detached", "layer-detached", "branch-detached"), _CUT),
    **dict.fromkeys(("nan-term", "zero-over-zero"), ("incident-division-by-zero", "incident-empty-selection")),
    **dict.fromkeys(("scale-term", "term-x1000"), ("incident-loss-term-jump",)),
    **dict.fromkeys(("empty-match", "nothing-labelled"), ("incident-empty-selection", "empty-match")),
    "empty-cloud": ("incident-empty-selection", "incident-division-by-zero"),
    **dict.fromkeys(("flip-term", "term-turned"), ("incident-loss-term-jump",)),
    **dict.fromkeys(("low-temperature", "cold-temperature"), ("incident-loss-term-jump", "temperature-gain")),
    **dict.fromkeys(("nan-color", "nan-depth", "lost-pose", "nan-pixel", "nan-point", "gamma-of-negative"), _INPUT),
    **dict.fromkeys(("outlier-color", "outlier-point", "hot-pixel", "far-point"), _OUTLIER),
    "target-in-pixels": (*_OUTLIER, *_LABELS),
    **dict.fromkeys(("wrong-labels", "all-labels-wrong", "wrong-label", "labels-shuffled"), _LABELS),
    **dict.fromkeys(("targets-shuffled", "off-by-one-targets"), _LABELS),
    **dict.fromkeys(("swapped-images", "images-swapped"), _LABELS),
    "empty-crop": ("incident-tiny-sample", "incident-few-row-batchnorm", *_OUTLIER),
    "size-of-zero": ("incident-log-of-zero",),
    "class-out-of-range": ("incident-raised", "labels-out-of-range"),
    **dict.fromkeys(("high-lr", "lr-x1000"), ("incident-lr-jump",)),
    **dict.fromkeys(("zero-lr", "heads-lr-0", "branch-lr-0"), ("incident-zero-lr",)),
    **dict.fromkeys(("nan-moment", "nan-momentum", "zero-second-moment", "second-moment-0"), _MOMENTS),
    **dict.fromkeys(
        ("not-in-optimizer", "left-out-of-optimizer", "branch-not-in-optimizer"), ("incident-not-in-optimizer",)
    ),
    **dict.fromkeys(("frozen", "frozen-block", "frozen-layer", "frozen-encoder"), ("incident-frozen",)),
    **dict.fromkeys(("scale-weights", "weights-x100"), ("incident-weights-changed-outside",)),
    "nan-weight": ("incident-nonfinite-weights", "incident-weights-changed-outside", "nonfinite-weight"),
    **dict.fromkeys(
        ("nan-buffer", "infinite-running-variance"), ("incident-poisoned-buffers", "incident-weights-changed-outside")
    ),
    **dict.fromkeys(
        ("nan-grad-element", "inf-grad-element", "nan-before-clipping", "inf-before-clipping"),
        ("incident-nan-through-clipping",),
    ),
    **dict.fromkeys(("huge-gradient", "norm-overflow"), ("incident-overflowed-norm", "incident-gradient-scaled")),
    **dict.fromkeys(("lost-gradient", "zero_grad-too-early"), _ALTERED),
    "gate-saturated": ("incident-gate-saturated", "gate-saturated", "incident-weights-changed-outside"),
    **dict.fromkeys(("rank-nan",), _INPUT),
    "rank-spike": ("incident-loss-term-jump",),
    "images/nan-term": ("incident-log-of-zero",),  # the log of a negative number
    "rank-desync": ("incident-rank-desync",),
}


@dataclass(frozen=True)
class Score:
    """What the findings of a case are worth; None: not judged.

    Attributes:
        rule: of the worst finding about the incident's step; "" = none.
        rule_right: it is one of :data:`RIGHT`.
        module_right: it names the faulty module, or one inside it.
        term_right: it names the faulty term.
        remedy: the best change that was tried; "" = none helps.
        restored: with it the steps after the bad one are updates of finite gradients without a spike, the weights stay
            finite, and the loss ends no higher than without; None: so it was without it, with about as low a loss.
        named: the finding names this remedy as settings (our own runs only).
    """

    rule: str
    rule_right: bool
    module_right: bool | None = None
    term_right: bool | None = None
    remedy: str = ""
    restored: bool | None = None
    named: bool | None = None


def score(outcome: Outcome, *, remedies: bool) -> Score:
    """Judge the findings of a case's record; with `remedies`, try these on its capsule first."""
    tried = _tried(outcome) if remedies and outcome.capsule is not None else None
    found = finding_about(outcome)
    best = None if tried is None else _best(tried)
    return Score(
        rule="" if found is None else found.rule,
        rule_right=found is not None and found.rule in right_rules(outcome.truth.name),
        module_right=_module_right(outcome, found),
        term_right=None if outcome.truth.term is None else found is not None and found.term == outcome.truth.term,
        remedy="" if best is None else best.change.name,
        restored=None if tried is None else _is_restored(tried, best),
        named=None
        if tried is None or tried.remedy is None or not is_own(tried.capsule.settings)
        else found is not None and found.tried and dict(found.remedy or {}) == dict(tried.remedy.change.patch),
    )


def right_rules(name: str) -> tuple[str, ...]:
    """The rules that are right about a case, "workload/fault"."""
    return RIGHT.get(name) or RIGHT[name.split("/")[1]]


def finding_about(outcome: Outcome) -> Finding | None:
    """What a reader reads first about the incident's step."""
    if outcome.step is None or outcome.record is None:
        return None
    findings = assess_run(load_run(Path(outcome.record))).findings
    about = (f for f in findings if f.steps is not None and f.steps[0] <= outcome.step <= f.steps[1])
    return next(about, None)


def _module_right(outcome: Outcome, found: Finding | None) -> bool | None:
    if not outcome.truth.modules:
        return None
    blamed = None if found is None else found.module
    return blamed is not None and any(
        blamed == name or (name != "" and blamed.startswith(f"{name}.")) for name in outcome.truth.modules
    )


def _tried(outcome: Outcome) -> WhatIf:
    """Every remedy that may help, as ``bifusion-diag replay CAPSULE --what-if auto`` tries them."""
    capsule = read_capsule(str(outcome.capsule))
    code = None
    if not is_own(capsule.settings):
        code = _user_code(capsule)
    result = try_remedies(capsule, ["auto"], steps=TRIAL_STEPS, code=code)
    save(result)  # beside the capsule, where the report finds it
    return result


def _user_code(capsule: Capsule) -> UserCode:
    """A user's loop: it counts its steps in the model, and loads a batch for each."""
    job = Job(CASES[capsule.settings["case"]])
    built: list[Training] = []

    def build() -> Training:
        built.append(training_of(ENTRY, capsule))
        return built[-1]

    def batches(step: int) -> Any:
        built[-1].model.iteration = step  # type: ignore[assignment]
        return job.batch(step)

    return UserCode(build, batches)


def _best(tried: WhatIf) -> Trial | None:
    return tried.helps[0] if tried.helps else None


def _as_it_was(tried: WhatIf) -> Trial:
    return next(trial for trial in tried.trials if trial.change.name == AS_IT_WAS)


def _is_restored(tried: WhatIf, best: Trial | None) -> bool | None:
    before = _as_it_was(tried)
    if _is_stable(before):
        low = min((trial.loss for trial in tried.trials if trial.loss is not None), default=math.inf)
        if before.loss is not None and before.loss <= low * HARMLESS:
            return None  # nothing to be restored
    if best is None or not _is_stable(best) or best.loss is None:
        return False
    return before.loss is None or best.loss <= before.loss


def _is_stable(trial: Trial) -> bool:
    """After the bad step there are updates, of finite gradients and without a spike, and the state ends finite."""
    after = [step for step in trial.steps[1:] if step.updated]
    finite = bool(after) and all(math.isfinite(step.grad_norm) for step in after)
    calm = not any(step.spike for step in trial.steps[1:])
    return finite and calm and not trial.error and not trial.bad_state
