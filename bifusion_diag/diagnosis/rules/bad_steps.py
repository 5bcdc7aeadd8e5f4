"""Rules of bad steps: a loss or a gradient that is not finite, a norm that jumps. Those that an incident explains are
left to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bifusion_diag.diagnosis.findings import Context, Evidence, Finding
from bifusion_diag.diagnosis.measures import LISTED_STEPS
from bifusion_diag.diagnosis.names import NORM, TOTAL
from bifusion_diag.diagnosis.origins import Origin, most_common_place
from bifusion_diag.diagnosis.phrase import join, say
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity, Reading
from bifusion_diag.diagnosis.rules.projection import LETS_THROUGH, SANITIZE
from bifusion_diag.diagnosis.rules.series import is_whole, smoothed_note
from bifusion_diag.diagnosis.spikes import FACTOR, MIN_PREVIOUS, WINDOW

LOSS_FACTOR = 1.5  # a loss above so many times its median of the steps before has risen


def nonfinite_loss(context: Context) -> list[Finding] | NotMeasured:
    """A loss term is NaN or infinite: one finding a term, and one of the total where no recorded term is."""
    if context.run.series(TOTAL) is None:
        return NotMeasured(say("{series} was not recorded", series=TOTAL))
    if (untraced := _untraced(context)) is not None:
        return untraced
    findings = []
    by_term: dict[str | None, list[Origin]] = {}
    for origin in context.origins:
        for name in origin.terms or ((None,) if _of_total(context, origin) else ()):
            by_term.setdefault(name, []).append(origin)
    for term, steps in by_term.items():
        remedy = None
        if context.settings.get("losses.instance.empty_match") == "nan" and (term or "").startswith("inst"):
            remedy = {"losses.instance.empty_match": "zero"}
        elif context.settings.get(SANITIZE) in LETS_THROUGH and _mostly_badly_projected(context, steps):
            remedy = {SANITIZE: "strict"}
        mechanism: str
        known = [finite for origin in steps if (finite := _is_finite(context, NORM, origin.step)) is not None]
        finite_norm = sum(known)
        if finite_norm:
            mechanism = say(
                "At {n} of {m} steps every gradient is finite all the same: the term is averaged over nothing or is "
                "cut off from the weights, and skipping the step would throw good gradients away.",
                n=finite_norm,
                m=len(known),
            )
        elif known:
            mechanism = "The gradient norm is non-finite at the same steps: the term reaches the weights."
        else:
            mechanism = "The record does not tell whether the gradients of these steps are finite."
        with_finite: Reading = (
            Quantity(finite_norm, "steps") if known else NotMeasured("no gradient norm of these steps")
        )
        findings.append(
            Finding(
                "nonfinite-loss",
                "error",
                say("Loss term {term} is non-finite", term=term)
                if term is not None
                else "The total loss is non-finite, and none of its recorded terms",
                (
                    *_steps_evidence(context, steps, TOTAL if term is None else f"loss/{term}/raw"),
                    Evidence("of these with a finite gradient norm", with_finite, NORM),
                ),
                join([mechanism, smoothed_note(context.run) or ""]),
                *_extent(steps),
                term=term,
                samples=steps[0].scenes,
                remedy=remedy,
                bad_steps=len(steps),
            )
        )
    return findings


def nonfinite_gradient(context: Context) -> list[Finding] | NotMeasured:
    """The loss is finite and the gradient is not: one finding a module where it starts."""
    norm = context.run.series(NORM)
    if norm is None:
        return NotMeasured(say("{series} was not recorded", series=NORM))
    if (untraced := _untraced(context)) is not None:
        return untraced
    started = [
        origin
        for origin in context.origins
        if origin.kind == "non-finite" and not origin.terms and not _of_total(context, origin)
    ]
    findings = []
    for module in dict.fromkeys(origin.module for origin in started):
        steps = [origin for origin in started if origin.module == module]
        title: str = "Non-finite gradient with a finite loss, first in a place that the record does not show"
        if module:
            title = say("Non-finite gradient with a finite loss, first in {module}", module=module)
        remedy = None
        if context.settings.get(SANITIZE) in LETS_THROUGH and _mostly_badly_projected(context, steps):
            remedy = {SANITIZE: "strict"}
        findings.append(
            Finding(
                "nonfinite-gradient",
                "error",
                title,
                _steps_evidence(context, steps, NORM),
                join(
                    [
                        "It arises in the backward pass. One non-finite element makes the total norm non-finite; "
                        "clipping by that norm then spreads it to every gradient, and an optimiser step to every "
                        "weight.",
                        "" if module else "Probe grads tells the place.",
                        smoothed_note(context.run) or "",
                    ]
                ),
                *_extent(steps),
                module=module,
                samples=steps[0].scenes,
                remedy=remedy,
                bad_steps=len(steps),
            )
        )
    return findings


def gradient_spike(context: Context) -> list[Finding] | NotMeasured:
    """Jumps of the gradient norm: one finding."""
    if isinstance(reading := context.reading("spikes"), NotMeasured):
        return reading
    steps = [origin for origin in context.origins if origin.kind == "spike"]
    if not steps:
        return []
    place = most_common_place(steps)
    where = [origin.step for origin in steps]
    jump = _largest_jump(context, where)
    evidence = _steps_evidence(context, steps, NORM)
    mechanism = [_loss_at_spikes(context, where)]
    if jump is not None:
        evidence += (
            Evidence("largest gradient norm of these steps", Quantity(jump.norm), NORM),
            Evidence("median of the steps before it", Quantity(jump.before), NORM),
        )
        mechanism.append(_AS_LARGE if jump.as_large_at_first else "")
    module = None
    if place is not None:
        module, count = place
        growths = [origin.growth or 0.0 for origin in steps if origin.module == module]
        growth = max(growths)
        evidence += (
            Evidence(
                say("largest growth in {module}", module=module), Quantity(growth, "×"), f"grads/{module}/param_norm"
            ),
        )
        what = (
            "At {count} of {all}, {module} is the first module of the backward pass whose gradient jumps."
            if min(growths) > FACTOR
            else "At {count} of {all}, {module} is the first module of the backward pass whose gradient jumps, or the "
            "one whose gradient grew most."
            if growth > FACTOR
            else "At {count} of {all}, {module} is the module whose gradient grew most; no module's grew more than "
            "{factor} ×."
        )
        mechanism.append(say(what, count=count, all=len(steps), module=module, factor=f"{FACTOR:g}"))
    return [
        Finding(
            "gradient-spike",
            "note" if jump is not None and jump.as_large_at_first else "warning",
            "The gradient norm jumps",
            evidence,
            join(mechanism),
            *_extent(steps),
            module=module,
            samples=steps[0].scenes,
            bad_steps=len(steps),
        )
    ]


_AS_LARGE = (
    "The run began with norms as large as these, and trained: they are long only beside those of a loss that has "
    "become small."
)


class _Jump(NamedTuple):
    """The largest norm of some spikes."""

    norm: float
    before: float  # median of the window before it
    as_large_at_first: bool  # the median of the run's first steps is no smaller


def _largest_jump(context: Context, steps: Sequence[int]) -> _Jump | None:
    """None where the record is reduced."""
    norm = context.run.series(NORM)
    if norm is None or not norm.exact:
        return None
    place = max(np.searchsorted(norm.steps, steps).tolist(), key=lambda at: float(norm.value[at]))
    largest, before = float(norm.value[place]), norm.value[max(0, place - WINDOW) : place]
    first = norm.value[:MIN_PREVIOUS]
    began = float(np.median(first[np.isfinite(first)])) if np.isfinite(first).any() else 0.0
    as_large = is_whole(context.run) and place >= MIN_PREVIOUS and began >= largest
    return _Jump(largest, float(np.median(before[np.isfinite(before)])), as_large)


def _of_total(context: Context, origin: Origin) -> bool:
    """Whether the total loss of a bad step is non-finite and no term that was recorded is, such as of a log without."""
    return origin.kind == "non-finite" and not origin.terms and _is_finite(context, TOTAL, origin.step) is False


def _is_finite(context: Context, name: str, step: int) -> bool | None:
    """Whether a value is finite; None where the record doesn't tell."""
    series = context.run.series(name)
    if series is None:
        return None
    here = np.flatnonzero((series.steps <= step) & (step <= series.last))
    if not here.size or series.missing[here[0]]:
        return None
    nonfinite = series.nonfinite[here[0]]
    return None if 0 < nonfinite < series.rows[here[0]] else bool(nonfinite == 0)


def _untraced(context: Context) -> NotMeasured | None:
    """Why bad steps that are known have no origin, where that is so."""
    if context.measures.bad and not context.measures.origins:
        return NotMeasured("there are bad steps, but the record is reduced and holds no origins of them")
    return None


def _loss_at_spikes(context: Context, steps: Sequence[int]) -> str:
    """What the total loss does at these steps, in words; "" where the record doesn't tell."""
    total = context.run.series(TOTAL)
    if total is None:
        return ""
    if not total.exact:
        return "The loss is finite at these steps."
    risen = 0
    for step in steps:
        place = int(np.searchsorted(total.steps, step))
        before = total.value[max(0, place - WINDOW) : place]
        before = before[np.isfinite(before)]
        risen += bool(before.size and total.value[place] > LOSS_FACTOR * np.median(before))
    if not risen:
        return "The loss is finite at these steps and does not rise with the gradient norm."
    return say(
        "The loss is finite at these steps; at {risen} of {all} it rises too, to more than {factor} × its median of "
        "the {window} steps before.",
        risen=risen,
        all=len(steps),
        factor=f"{LOSS_FACTOR:g}",
        window=WINDOW,
    )


def _mostly_badly_projected(context: Context, origins: Sequence[Origin]) -> bool:
    """Whether at least half of these steps also have non-finite camera coordinates."""
    series = [context.run.series(f"projection/{name}") for name in ("nan", "inf")]
    bad = {int(step) for one in series if one is not None for step in one.steps[one.max > 0]}
    return 2 * sum(origin.step in bad for origin in origins) >= len(origins)


def _extent(origins: Sequence[Origin]) -> tuple[tuple[int, int], int]:
    return (origins[0].step, origins[-1].step), len(origins)


def _steps_evidence(context: Context, origins: Sequence[Origin], series: str) -> tuple[Evidence, ...]:
    measures = context.measures
    all_listed = max(len(measures.nonfinite), len(measures.spikes)) < LISTED_STEPS
    traced = len(measures.origins)
    label = "steps" if all_listed else say("steps, of the {traced} bad ones that were traced", traced=traced)
    return (
        Evidence(label, Quantity(len(origins), "steps"), series),
        Evidence("first step", Quantity(origins[0].step, "step"), series),
    )
