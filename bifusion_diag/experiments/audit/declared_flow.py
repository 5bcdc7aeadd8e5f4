"""`clip_align.gradient_flow`: the share of the gradient that is declared, and the share that arrives.

Measured on the real graph: the gradient of clip_align in the weights of the 2D branch, under this run's settings and
with nothing limited.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bifusion_diag.config.settings import ClipAlignSettings
from bifusion_diag.diagnosis.phrase import say
from bifusion_diag.diagnosis.quantity import NotMeasured
from bifusion_diag.experiments.audit.bench import Bench, gradient_norms, part_of
from bifusion_diag.experiments.audit.gradient_flow import of_part
from bifusion_diag.experiments.audit.result import Draft, Section
from bifusion_diag.model.losses.clip_align import clip_align_loss, limit_gradient
from bifusion_diag.model.outputs import EncoderOutput

FLOW = "losses.clip_align.gradient_flow"
PARTS_2D = ("encoder.clip", "encoder.spatial_head", "encoder.global_head")
DOCUMENTED = (0.05, 0.02)  # 003's and 002's "share"
_WHY = {
    "as_written": "The share is on the wrong factor: 0.95*f + 0.05*f.detach() lets 95 % through and detaches 5 %.",
    "around": "The limit is at the global token. The fused feature on the other side is made of the 2D features at the "
    "points too, and through it the gradient arrives in full. Target 'point' limits the only way there is, as its "
    "other side is 3D alone.",
    "other": "The gradient takes a way that is not limited.",
}


def documents_formula(features: Tensor, share: float) -> Tensor:
    """As document 003 writes it for a share of 5 %: ``0.95*f + 0.05*f.detach()``."""
    return (1 - share) * features + share * features.detach()


def declared_flow(bench: Bench) -> Section:
    """Declared against measured gradient flow."""
    draft = Draft("declared_flow", "Declared and measured gradient flow")
    settings = bench.settings.losses.clip_align
    if not bench.fused:
        return Section(draft.id, draft.title, not_measured="the model has no 2D side")
    encoder = bench.step.output.predictions.encoder
    assert encoder.f2d is not None
    for share in DOCUMENTED:
        for name, form in (("documents_formula", documents_formula), ("ours", limit_gradient)):
            draft.number(
                f"{name}/{share:g}",
                say(
                    "share that {form} lets through for a declared {share:.0%}",
                    form="0.95*f + 0.05*f.detach()"
                    if name == "documents_formula" and share == DOCUMENTED[0]
                    else "(1-r)*f + r*f.detach()"
                    if name == "documents_formula"
                    else "r*f + (1-r)*f.detach()",
                    share=share,
                ),
                _share_of(form, encoder.f2d, share),
            )
    declared = draft.number("declared", "share declared for clip_align", settings.gradient_flow)
    active = "clip_align" in bench.step.output.loss.terms
    reached = _reached(bench, encoder, settings)
    unlimited = settings.model_copy(update={"gradient_flow": 1.0, "gradient_formula": "as_declared"})
    whole = _reached(bench, encoder, unlimited)
    for part, norm in whole.items():
        draft.number(
            part,
            say("share of clip_align's gradient that arrives in {place}", place=part),
            reached[part] / norm if norm else NotMeasured("clip_align does not reach it"),
        )
    both = [math.hypot(*norms.values()) for norms in (reached, whole)]
    measured = draft.number(
        "measured",
        "share of clip_align's gradient that arrives in the weights of the 2D side",
        both[0] / both[1] if both[1] else NotMeasured("clip_align reaches nothing of the 2D side"),
    )
    if not active or not both[1] or abs(both[0] / both[1] - settings.gradient_flow) <= bench.thresholds.flow_error:
        return draft.done()
    written = settings.gradient_formula == "as_written"
    around = settings.target == "global" and not written
    draft.report(
        "declared-vs-measured-flow",
        "warning",
        say(
            "clip_align declares {declared:.0%} of its gradient for the 2D side, and {measured:.0%} arrives",
            declared=settings.gradient_flow,
            measured=both[0] / both[1],
        ),
        _WHY["as_written" if written else "around" if around else "other"],
        declared,
        measured,
        module="encoder.spatial_head",
        term="clip_align",
        remedy={"losses.clip_align.gradient_formula": "as_declared"}
        if written
        else {"losses.clip_align.target": "point"}
        if around
        else None,
    )
    return draft.done()


def _share_of(form: object, features: Tensor, share: float) -> float:
    """What a form lets through of the gradient of the sum of real features."""
    leaf = features.detach().requires_grad_()
    assert callable(form)
    (gradient,) = torch.autograd.grad(form(leaf, share).sum(), leaf)
    return float(gradient.double().norm() / leaf.numel() ** 0.5)


def _reached(bench: Bench, encoder: EncoderOutput, settings: ClipAlignSettings) -> dict[str, float]:
    """Norm of clip_align's gradient in the weights of each part of the 2D branch."""
    weights = {name: p for name, p in bench.learning.items() if part_of(name) in PARTS_2D}
    criterion = bench.model.criterion
    loss = clip_align_loss(encoder, bench.batch.scene_index, settings, criterion.normalize2d, criterion.normalize3d)
    norms = gradient_norms(loss, weights)
    return {part: of_part(norms, part) or 0.0 for part in dict.fromkeys(map(part_of, weights))}
