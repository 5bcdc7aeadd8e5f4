"""The share of an alignment loss's gradient that is let through, and its slope: against what the loss was told."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bifusion_diag.config.settings import ClipAlignSettings
from bifusion_diag.model.losses.clip_align import clip_align_loss
from bifusion_diag.model.outputs import EncoderOutput
from bifusion_diag.probes import FlowProbe, Monitor
from bifusion_diag.probes.flow import compare

POINTS, WIDTH, SCENES = 300, 12, 3


def sides(target: str) -> tuple[EncoderOutput, Tensor, Tensor, Tensor]:
    """An encoder's output, the scene of each point, and the two sides that the loss compares."""
    generator = torch.Generator().manual_seed(3)

    def draw(rows: int, length: float) -> Tensor:
        x = F.normalize(torch.randn(rows, WIDTH, generator=generator), dim=1) * length
        return x.requires_grad_()

    f2d, f3d, fused, whole = draw(POINTS, 0.8), draw(POINTS, 1.0), draw(POINTS, 1.7), draw(SCENES, 1.0)
    valid = torch.rand(POINTS, generator=generator) > 0.3
    output = EncoderOutput(fused=fused, f3d=f3d, f2d=f2d, valid=valid, global2d=whole)
    first, second = (f2d, f3d) if target == "point" else (whole, fused)
    return output, torch.arange(POINTS) % SCENES, first, second


@pytest.mark.parametrize("target", ["point", "global"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize(("formula", "swapped"), [("as_declared", False), ("as_written", True)])
def test_the_measured_share_is_what_the_formula_lets_through(
    target: str, share: float, formula: str, swapped: bool
) -> None:
    output, scene, first, second = sides(target)
    settings = ClipAlignSettings.model_validate(
        {"target": target, "gradient_flow": share, "gradient_formula": formula, "temperature": 0.07}
    )
    term = clip_align_loss(output, scene, settings)
    arrived = torch.autograd.grad(term, [first, second], allow_unused=True)
    at_first = torch.zeros_like(first) if arrived[0] is None else arrived[0]
    rows = None if target == "point" else scene
    measured, gain, *norms = compare(first.detach(), second.detach(), at_first, arrived[1], rows)
    assert float(measured) == pytest.approx(1 - share if swapped else share, abs=1e-5)
    assert float(gain) <= 1 / 0.07 + 1e-3
    assert [float(norm) for norm in norms] == pytest.approx([float(at_first.norm()), float(arrived[1].norm())])


@pytest.mark.parametrize("temperature", [0.002, 0.07, 1.0])
def test_the_gain_is_the_slope_at_the_worst_pair(temperature: float) -> None:
    output, scene, first, second = sides("point")
    settings = ClipAlignSettings(gradient_flow=1.0, temperature=temperature)
    arrived = torch.autograd.grad(clip_align_loss(output, scene, settings), [first, second])
    gain = compare(first.detach(), second.detach(), *arrived, None, output.valid)[1]
    assert output.valid is not None
    cosine = F.cosine_similarity(first.double(), second.double(), dim=1)[output.valid]
    seen = torch.sigmoid(cosine.detach() / temperature)
    slope = (1 - seen) * seen / (seen + 1e-8) / temperature  # of −log(σ(cos/τ) + 1e-8), by hand
    assert float(gain) == pytest.approx(float(slope.max()), rel=1e-2)


def test_parallel_and_zero_vectors_have_no_slope() -> None:
    one = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    other = torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    found = compare(one, other, torch.zeros(3, 2), torch.ones(3, 2), None)
    assert math.isnan(float(found[0]))  # nothing that could be let through
    assert float(found[1]) == 0.0


class Aligned(nn.Module):
    """Two branches whose loss module is called with both."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.image, self.points, self.loss = nn.Linear(4, 6), nn.Linear(4, 6), Loss(share)

    def forward(self, x: Tensor) -> Tensor:
        """The loss."""
        found: Tensor = self.loss(self.image(x), self.points(x + 1))
        return found


class Loss(nn.Module):
    """−log σ(10 cos), with a share of the gradient to the first side."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The mean over the rows."""
        held = first * self.share + first.detach() * (1 - self.share)
        return -F.logsigmoid(10 * F.cosine_similarity(held, second, dim=1)).mean()


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_any_loss_module_that_is_called_with_two_sides_can_be_watched(share: float) -> None:
    model = Aligned(share)
    probe = FlowProbe(modules=["loss"], term="", sides=[("0", "1")], every=1)
    with Monitor(model, probes=[probe]) as monitor, monitor.step():
        model(torch.randn(16, 4)).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
    monitor.end_step()
    assert monitor.latest()["flow/share"] == pytest.approx(share, abs=1e-5)
    assert all(gradient is not None for gradient in gradients)


def test_the_extra_pass_leaves_the_gradients_as_they_are() -> None:
    torch.manual_seed(0)
    model, x = Aligned(0.3), torch.randn(16, 4)
    model(x).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    probe = FlowProbe(modules=["loss"], term="", sides=[("0", "1")], every=1)
    with Monitor(model, probes=["grads", probe]) as monitor, monitor.step():
        model(x).backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
