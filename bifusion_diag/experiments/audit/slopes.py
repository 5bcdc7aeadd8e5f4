"""Gains at the extremes, of the functions that this run uses: the temperature, the normalisation, the logarithm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bifusion_diag.diagnosis.phrase import say
from bifusion_diag.experiments.audit.bench import Bench
from bifusion_diag.experiments.audit.result import Cell, Draft, Section
from bifusion_diag.model.losses.clip_align import alignment

_GRID = 20_001  # cosines in [-1, 1]
_DOCUMENTED = (0.07, 0.1)  # 003's τ, and 002's smallest
_LENGTHS = (1.0, 1e-3, 1e-6, 1e-9, 1e-12, 0.0)
TEMPERATURE = "losses.clip_align.temperature"


def temperature(bench: Bench) -> Section:
    """|dL/dcos| of −log(σ(cos/τ) + 1e-8) over all cosines that there can be."""
    draft = Draft("temperature", "Temperature")
    own = bench.settings.losses.clip_align.temperature
    used = bench.fused and "clip_align" in bench.step.output.loss.terms
    rows: list[list[Cell]] = []
    for tau in dict.fromkeys((*_DOCUMENTED, own)):
        cosines, slopes = slope_of_cosine(tau)
        size = slopes.abs()
        top = int(size.argmax())
        at = {name: float(size[int((place + 1) / 2 * (_GRID - 1))]) for name, place in _PLACES.items()}
        rows.append([tau, float(size[top]), float(cosines[top]), 1 / tau, at["half"], at["one"], at["minus_one"]])
        key = f"{tau:g}"
        draft.number(f"{key}/largest", say("largest |dL/dcos| at τ {tau:g}", tau=tau), float(size[top]))
        draft.number(f"{key}/where", say("cosine where it is at τ {tau:g}", tau=tau), float(cosines[top]))
        draft.number(f"{key}/bound", say("bound 1/τ at τ {tau:g}", tau=tau), 1 / tau)
        draft.number(f"{key}/at_minus_half", say("|dL/dcos| at cosine −0.5, τ {tau:g}", tau=tau), at["half"])
        draft.number(
            f"{key}/at_one",
            say("|dL/dcos| at cosine 1, τ {tau:g}", tau=tau),
            at["one"],
            "",
            "002 expects ∞ here",
        )
        draft.number(
            f"{key}/pushes_apart",
            say("cosines at which the loss pushes features apart, τ {tau:g}", tau=tau),
            float((slopes > 0).sum()),
            "",
            "without negatives there are none: the failure to expect is collapse",
        )
    draft.table(
        "|dL/dcos| of clip_align", ("τ", "largest", "at cos", "1/τ", "at −0.5", "at 1", "at −1"), rows, shown=used
    )
    if used and 1 / own > bench.thresholds.temperature_gain:
        draft.report(
            "temperature-gain",
            "warning",
            say("τ {tau:g} multiplies the gradient of the cosine by up to {gain:.3g}", tau=own, gain=1 / own),
            "|dL/dcos| is at most 1/τ: bounded, and larger than with the documents' τ of 0.07.",
            *(
                one
                for one in draft.numbers
                if one.key in (f"temperature/{own:g}/largest", f"temperature/{own:g}/where")
            ),
            term="clip_align",
            remedy={TEMPERATURE: 0.1},
        )
    return draft.done()


_PLACES = {"half": -0.5, "one": 1.0, "minus_one": -1.0}


def slope_of_cosine(tau: float) -> tuple[Tensor, Tensor]:
    """dL/dcos of the run's own loss on a grid of cosines in [-1, 1], float32 as in training."""
    cosines = torch.linspace(-1, 1, _GRID, requires_grad=True)
    (slopes,) = torch.autograd.grad(alignment(cosines, tau).sum(), cosines)
    return cosines.detach(), slopes


def normalisation(bench: Bench) -> Section:
    """The gain of F.normalize down to the zero vector, and in half precision."""
    draft = Draft("normalisation", "Normalisation of small vectors")
    rows: list[list[Cell]] = []
    for length in _LENGTHS:
        gain = gain_of_normalize(length)
        draft.number(f"gain/{length:g}", say("gain of F.normalize at ‖x‖ = {length:g}", length=length), gain)
        rows.append([length, gain])
    draft.table("Gain of F.normalize", ("‖x‖", "gain"), rows, shown=False)
    for dtype in (torch.float16, torch.bfloat16):
        zero = F.normalize(torch.zeros(1, 4, dtype=dtype), dim=1)
        name = str(dtype).removeprefix("torch.")
        draft.number(
            f"nan/{name}",
            say("NaN elements of four when {dtype} normalises a zero vector", dtype=name),
            float(zero.isnan().sum()),
            "",
            "1e-12 is 0 in float16: 0/0",
        )
    draft.number(
        "log/zero",
        "value of log(0)",
        float(torch.zeros(()).log()),
        "",
        "−∞, and its derivative is ∞: 1e-8 stands inside",
    )
    smallest = alignment(torch.full((), -1.0), 1e-3)
    draft.number("log/guarded", "−log(σ(−1000) + 1e-8)", float(smallest), "", "bounded by 18.42")
    return draft.done()


def gain_of_normalize(length: float, width: int = 256) -> float:
    """Norm of the gradient behind F.normalize for a gradient of norm 1 across a vector of this length."""
    x = torch.zeros(1, width)
    x[0, 0] = length
    x.requires_grad_()
    across = torch.zeros(1, width)
    across[0, 1] = 1.0
    (gradient,) = torch.autograd.grad(F.normalize(x, dim=1), x, across)
    return float(gradient.norm())
