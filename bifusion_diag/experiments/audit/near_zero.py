"""Zero vectors that this configuration normalises, and what becomes of their gradient on the real batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bifusion_diag.diagnosis.phrase import join, say
from bifusion_diag.experiments.audit.bench import Bench
from bifusion_diag.experiments.audit.result import Cell, Draft, Number, Section

_EXPLODES = 1e6  # gain from which a gradient behind it would be no gradient any more
NORMALIZE = "model.projection.normalize"


class _Gain(NamedTuple):
    """One normalisation on the real batch."""

    rows: int
    zero: int  # rows that are exactly zero
    near: int  # rows shorter than the threshold near_zero_norm, zero ones among them
    incoming: float  # largest gradient of such a row at the output
    outgoing: float  # and at the input


def near_zero(bench: Bench) -> Section:
    """Count the vectors, and follow the gradient of the total through each normalisation."""
    draft = Draft("near_zero", "Zero vectors into normalisations")
    found = _gains(bench)
    rows: list[list[Cell]] = []
    for name, gain in found.items():
        rows.append([name, gain.rows, gain.zero, gain.near, gain.incoming, gain.outgoing])
        zero = draft.number(
            f"{name}/zero",
            say("zero vectors that {name} is given", name=name),
            gain.zero,
            "rows",
            say("of {rows}", rows=gain.rows),
        )
        if not gain.near:
            continue
        into = draft.number(
            f"{name}/incoming", say("largest gradient of such a row behind {name}", name=name), gain.incoming
        )
        out = draft.number(f"{name}/outgoing", say("and before {name}", name=name), gain.outgoing)
        if gain.outgoing > _EXPLODES * max(gain.incoming, torch.finfo(torch.float32).tiny):
            _report(draft, bench, name, gain, (zero, into, out))
    columns = ("normalisation", "rows", "zero", "near zero", "gradient behind", "before")
    draft.table(
        "Vectors into normalisations, and the largest gradient of a near-zero one",
        columns,
        rows,
        shown=any(gain.near for gain in found.values()),
    )
    return draft.done()


def _report(draft: Draft, bench: Bench, name: str, gain: _Gain, evidence: tuple[Number, ...]) -> None:
    arrives = max((one.norm for one in bench.measured), default=0.0)
    norm = draft.number("arrives", "largest gradient norm of the whole model, over all phases", arrives)
    after = name == "encoder.normalize2d" and bench.settings.model.projection.normalize == "after_sampling"
    harm = not arrives < _EXPLODES
    draft.report(
        "near-zero-norm",
        "error" if harm else "warning",
        say("{name} divides {count} zero vectors by 1e-12", name=name, count=gain.zero)
        if gain.zero
        else say("{name} divides {count} vectors shorter than 1e-4", name=name, count=gain.near),
        join(
            [
                "The 2D features of points out of view are zero, and this run normalises them afterwards."
                if after
                else "",
                say(
                    "Their gradient is {incoming:.3g} behind the normalisation and {outgoing:.3g} before it.",
                    incoming=gain.incoming,
                    outgoing=gain.outgoing,
                ),
                "It reaches the weights."
                if harm
                else "On this batch what lies before discards it: the norm of the whole gradient is usual. A vector "
                "that is nearly zero without being masked, or half precision, and it reaches the weights.",
            ]
        ),
        *evidence,
        norm,
        module=name,
        remedy={NORMALIZE: "before_sampling"} if after else None,
    )


def _gains(bench: Bench) -> dict[str, _Gain]:
    """The gradient of the total in what goes in and comes out of each normalisation, in the last phase."""
    step = bench.step
    places = [
        (name, before, after)
        for name, calls in step.sights.normalised.items()
        for before, after in calls
        if before.dim() == 2 and before.requires_grad
    ]
    total = step.output.loss.total
    if not places or not total.requires_grad:
        return {}
    ends: list[Tensor] = [end for _, before, after in places for end in (before, after)]
    gradients = torch.autograd.grad(total, ends, retain_graph=True, allow_unused=True)
    found: dict[str, _Gain] = {}
    for place, (name, before, _) in enumerate(places):
        lengths = before.detach().norm(dim=1)
        near = lengths < bench.thresholds.near_zero_norm
        gain = _Gain(
            rows=len(lengths),
            zero=int((lengths == 0).sum()),
            near=int(near.sum()),
            incoming=_largest(gradients[2 * place + 1], near),
            outgoing=_largest(gradients[2 * place], near),
        )
        same = found.get(name)
        found[name] = (
            gain
            if same is None
            else _Gain(
                *(a + b for a, b in zip(gain[:3], same[:3], strict=True)),
                *(max(a, b) for a, b in zip(gain[3:], same[3:], strict=True)),
            )
        )
    return found


def _largest(gradient: Tensor | None, rows: Tensor) -> float:
    if gradient is None or not rows.any():
        return 0.0
    return float(gradient.detach()[rows].norm(dim=1).max())
