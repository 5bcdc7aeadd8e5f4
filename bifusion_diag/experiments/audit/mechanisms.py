"""How a step goes bad, shown on this run's own model, clipping and optimiser: the mechanisms of docs/mechanisms.md that
need no long training to be seen.

Legend: N points · M scenes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from bifusion_diag.data import Batch, collate
from bifusion_diag.diagnosis.phrase import say
from bifusion_diag.diagnosis.quantity import NotMeasured
from bifusion_diag.errors import UserError
from bifusion_diag.experiments.audit.bench import Bench
from bifusion_diag.experiments.audit.result import Cell, Draft, Section
from bifusion_diag.model.losses import Criterion
from bifusion_diag.training.optim import clip_gradient

_CLOSE_UP = 12  # points of a close-up
_HUGE = 1e20  # a finite gradient element whose square float32 cannot hold
_SIZE = 10_000  # weights of the optimiser's demonstration


def mechanisms(bench: Bench) -> Section:
    """One number or two a mechanism. They say what would happen, not what does: no findings."""
    draft = Draft("mechanisms", "Mechanisms, on this run's own code")
    _clipping(draft, bench)
    _poisoned_buffers(draft)
    _empty_selection(draft, bench)
    _few_rows(draft, bench)
    rows: list[list[Cell]] = [
        [number.title, "not measured" if isinstance(number.reading, NotMeasured) else number.reading.value]
        for number in draft.numbers
    ]
    draft.table("Mechanisms", ("what", "measured"), rows)
    return draft.done()


def _clipping(draft: Draft, bench: Bench) -> None:
    """One NaN, and one huge element, among the gradients of an AdamW step with this run's clipping."""
    limit = bench.settings.optim.clip_grad
    for name, value in (("nan", math.nan), ("overflow", _HUGE)):
        weights = nn.Parameter(torch.zeros(_SIZE))
        optimizer = torch.optim.AdamW([weights], lr=bench.settings.optim.lr, weight_decay=0.0)
        weights.grad = torch.full((_SIZE,), 1e-3)
        weights.grad[0] = value
        clipped = clip_gradient([weights], limit)
        optimizer.step()
        if name == "nan":
            draft.number(
                "nan/gradients",
                "one NaN gradient element and clipping: share of gradients that are NaN afterwards",
                _share(weights.grad.isnan()),
                "",
                "nan-through-clipping",
            )
            draft.number("nan/weights", "and of the weights after AdamW's step", _share(weights.detach().isnan()))
        else:
            draft.number(
                "overflow/coefficient",
                "one element of 1e20: clip coefficient of the float32 norm",
                float(clipped.coefficient),
                "",
                "overflowed-norm: the step is silently lost",
            )
            moved = weights.detach() != 0
            draft.number("overflow/moved", "and the share of weights that AdamW moves", _share(moved))


def _poisoned_buffers(draft: Draft) -> None:
    """One NaN row of an input into BatchNorm in train mode."""
    norm = nn.BatchNorm1d(8)
    rows = torch.randn(64, 8)
    rows[0] = math.nan
    norm(rows)
    assert norm.running_mean is not None
    draft.number(
        "buffers",
        "NaN in one row of 64: share of BatchNorm's running means that are NaN after the forward",
        _share(norm.running_mean.isnan()),
        "",
        "poisoned-buffers: skipping the step does not help",
    )


def _empty_selection(draft: Draft, bench: Bench) -> None:
    """The run's own losses on its own predictions, where no scene has an object that a query lies inside."""
    settings = bench.settings
    # Without learnable or text queries: those may be matched with any object.
    decoder = settings.model.decoder
    if decoder.learnable_queries or decoder.text_queries or settings.losses.instance.matcher != "sparse":
        reason = NotMeasured("this matcher always finds a query")
        draft.number("empty/nan_terms", "loss terms that are NaN after an empty match", reason)
        return
    batch = _unmatchable(bench.batch)
    for way in ("nan", "zero"):
        instance = settings.losses.instance.model_copy(update={"empty_match": way})
        losses = settings.losses.model_copy(update={"instance": instance})
        criterion = Criterion(losses, decoder, fused=settings.model.uses_clip)
        criterion.set_progress(settings.training.steps - 1, settings.training.steps)
        loss = criterion.to(bench.device)(bench.step.output.predictions, batch)
        bad = [name for name, term in loss.terms.items() if not bool(torch.isfinite(term))]
        draft.number(
            f"empty/{way}/nan_terms",
            say("no query matches any object: loss terms that are NaN (empty_match={way})", way=way),
            len(bad),
            "terms",
        )
        if not loss.total.requires_grad:
            continue
        bench.say("backward of an empty match")
        gradients = torch.autograd.grad(loss.total, list(bench.learning.values()), retain_graph=True, allow_unused=True)
        broken = sum(int((~torch.isfinite(g)).sum()) for g in gradients if g is not None)
        draft.number(
            f"empty/{way}/nan_gradients",
            say("and gradient elements that are not finite (empty_match={way})", way=way),
            broken,
            "",
            "empty-selection: the loss is NaN, and every gradient is finite",
        )


def _unmatchable(batch: Batch) -> Batch:
    """The batch with one object a scene, of a single point: of no superpoint does it have more than half."""
    instance = torch.full_like(batch.instance, -1)
    sizes = torch.bincount(batch.superpoint, minlength=sum(batch.superpoint_counts))
    large = sizes[batch.superpoint] >= 3
    for scene in range(batch.batch_size):
        points = ((batch.scene_index == scene) & large).nonzero()
        if len(points):
            instance[points[0]] = 0
    values = {**vars(batch), "instance": instance}
    return Batch(**values)


def _few_rows(draft: Draft, bench: Bench) -> None:
    """The gradient of a close-up: BatchNorm in train mode over a handful of voxels."""
    usual = bench.measured[-1].norm
    draft.number("rows/usual", "gradient norm of the batch in the last phase", usual)
    try:
        batch = close_up(bench)
        step = bench.forward(batch)
    except UserError as error:
        draft.number("rows/close_up", "gradient norm of a close-up", NotMeasured(str(error)))
        return
    draft.number(
        "rows/fewest",
        say("rows of the coarsest BatchNorm for a close-up of {points} points", points=len(batch.xyz)),
        min(step.sights.rows.values(), default=0),
        "rows",
    )
    bench.say("backward of a close-up")
    loss = step.output.loss.total
    gradients = torch.autograd.grad(loss, list(bench.learning.values()), allow_unused=True)
    squares = [float(g.double().square().sum()) for g in gradients if g is not None]
    draft.number("rows/loss", "its loss", float(loss.detach()))
    draft.number(
        "rows/close_up",
        "its gradient norm",
        math.sqrt(math.fsum(squares)),
        "",
        "few-row-batchnorm: the loss is normal, the gradient is not",
    )


def close_up(bench: Bench, points: int = _CLOSE_UP) -> Batch:
    """The batch's first scene, cut down to the few points around one of them."""
    index = bench.loader.scene_indices(0)[0]
    scene = bench.source[index]
    finite = np.isfinite(scene.points[:, :3]).all(axis=1)
    if not finite.any():
        raise UserError(f"scene '{scene.name}' has no point")
    centre = scene.points[finite][0, :3]
    distance = np.where(finite, np.linalg.norm(scene.points[:, :3] - centre, axis=1), np.inf)
    near = scene.take(np.sort(np.argsort(distance, kind="stable")[:points]))
    return collate([near], [near.points[:, :3]]).to(bench.device)


def _share(true: Tensor) -> float:
    return float(true.float().mean())
