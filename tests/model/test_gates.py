"""SimpleFusion against its formula, EnhancedFusionGate against loops over points and all pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bifusion_diag.config import load_settings
from bifusion_diag.config.settings import GateSettings
from bifusion_diag.model.gate import EnhancedFusionGate, LiteFusionGate, SimpleFusion, enhanced, make_gate
from bifusion_diag.model.outputs import GateOutput
from bifusion_diag.probes import Monitor

SMALL = GateSettings(hidden=4, heads=2, neighbours=3)
WIDTH = 6


@pytest.fixture(params=[1, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run with so many threads: additions that race would differ from run to run."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make_enhanced(settings: GateSettings = SMALL, width: int = WIDTH) -> EnhancedFusionGate:
    torch.manual_seed(0)
    return EnhancedFusionGate(settings, width, early_share=0.0).double()


def make_inputs(counts: tuple[int, ...], width: int = WIDTH) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f2d, f3d, valid, xyz in float64."""
    n = sum(counts)
    f2d, f3d = torch.randn(2, n, width, dtype=torch.float64)
    return f2d.requires_grad_(), f3d.requires_grad_(), torch.rand(n) > 0.3, torch.rand(n, 3, dtype=torch.float64)


def layer_norm(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    return (x - x.mean()) / (x.var(correction=0) + norm.eps).sqrt() * norm.weight + norm.bias


def context_by_hand(gate: EnhancedFusionGate, features: Tensor, counts: tuple[int, ...], xyz: Tensor) -> Tensor:
    """The attention's output, point by point and head by head, with neighbours from all pairs."""
    part = gate.attention
    x = torch.stack([layer_norm(row, part.norm) for row in features])
    heads, depth = part.heads, features.shape[1] // 2 // part.heads
    rows, first = [], 0
    for count in counts:
        for i in range(first, first + count):
            others = [j for j in range(first, first + count) if j != i]
            near = sorted(others, key=lambda j, i=i: float((xyz[j] - xyz[i]).norm()))[: part.neighbours]
            far = max((float((xyz[j] - xyz[i]).norm()) for j in near), default=1.0)
            value = []
            for h in range(heads):
                own = slice(h * depth, (h + 1) * depth)
                query = (part.query.weight @ x[i] + part.query.bias)[own]
                liked = (part.direction.weight @ x[i] + part.direction.bias)[3 * h : 3 * h + 3]
                scores = [
                    (query @ (part.key.weight @ x[j] + part.key.bias)[own] + liked @ (xyz[j] - xyz[i]) / far)
                    / math.sqrt(depth)
                    for j in near
                ]
                total = sum(score.exp() for score in scores)
                terms = [
                    score.exp() / total * (part.value.weight @ x[j] + part.value.bias)[own]
                    for score, j in zip(scores, near, strict=True)
                ]
                value.append(sum(terms, start=torch.zeros(depth, dtype=torch.float64)))
            attended = part.out.weight @ torch.cat(value) + part.out.bias
            norm, widen, _, narrow = part.feed_forward
            hidden = widen.weight @ layer_norm(attended, norm) + widen.bias
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            rows.append(attended + narrow.weight @ hidden + narrow.bias)
        first += count
    return torch.stack(rows)


@pytest.mark.parametrize("counts", [(9, 0, 5), (2, 1, 4)])  # also fewer neighbours than asked for, and none
@pytest.mark.parametrize("chunk", [4096, 2])
def test_enhanced_follows_its_formula(counts: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enhanced, "_CHUNK", chunk)
    gate = make_enhanced()
    f2d, f3d, valid, xyz = make_inputs(counts)
    found = gate(f2d, f3d, valid, counts, xyz)

    features = torch.cat([f2d, f3d], 1)
    context = context_by_hand(gate, features, counts, xyz)
    first, _, last = gate.point_mlp
    for i in range(sum(counts)):
        hidden = torch.relu(first.weight @ torch.cat([features[i], context[i]]) + first.bias)
        raw = torch.sigmoid(last.weight @ hidden + last.bias)
        torch.testing.assert_close(found.alpha[i], raw if valid[i] else torch.tensor([0.1], dtype=torch.float64))
    mixed = found.alpha * f2d + (1 - found.alpha) * f3d
    start = 0
    for scene, count in enumerate(counts):
        part = slice(start, start + count)
        if count:
            weight = torch.sigmoid(gate.channel.weight @ mixed[part].mean(0) + gate.channel.bias)
            torch.testing.assert_close(found.channel_weight[scene], weight)
            torch.testing.assert_close(found.fused[part], weight * mixed[part])
        start += count


def test_enhanced_gradients_pass_gradcheck() -> None:
    gate, counts = make_enhanced(), (5, 1, 3)
    f2d, f3d, _, xyz = make_inputs(counts)
    valid = torch.ones(9, dtype=torch.bool)

    def fused(f2d: Tensor, f3d: Tensor) -> Tensor:
        return gate(f2d, f3d, valid, counts, xyz).fused

    assert torch.autograd.gradcheck(fused, (f2d, f3d))


def test_enhanced_repeats_bit_by_bit(threads: int) -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(1)
        gate = EnhancedFusionGate(GateSettings(hidden=8), 32, early_share=0.0)
        f2d, f3d = torch.randn(2, 3000, 32).requires_grad_()
        # rows that everyone is a neighbour of, so that many additions meet in one place
        xyz = torch.rand(3000, 3).round(decimals=1)
        out = gate(f2d, f3d, torch.ones(3000, dtype=torch.bool), (2000, 1000), xyz)
        out.fused.sin().sum().backward()
        return [out.fused, out.alpha, *(parameter.grad for parameter in gate.parameters())]

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


def test_enhanced_keeps_no_gathered_neighbours_for_the_backward_pass() -> None:
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    n, k, width = 500, 8, 16
    gate = EnhancedFusionGate(GateSettings(hidden=4, neighbours=k), width, early_share=0.0)
    f2d, f3d = torch.randn(2, n, width).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = gate(f2d, f3d, torch.ones(n, dtype=torch.bool), (n,), torch.rand(n, 3))
    assert max(saved) < n * k * width
    out.fused.sum().backward()
    assert all(parameter.grad is not None for parameter in gate.parameters())


def test_enhanced_survives_coincident_points() -> None:
    gate = make_enhanced()
    f2d, f3d, valid, _ = make_inputs((7,))
    out = gate(f2d, f3d, valid, (7,), torch.ones(7, 3, dtype=torch.float64))
    out.fused.sum().backward()
    assert torch.isfinite(out.fused).all()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in gate.parameters())


def test_enhanced_keeps_scenes_apart() -> None:
    gate = make_enhanced()
    f2d, f3d, valid, xyz = make_inputs((6, 6))
    xyz[6:] = xyz[:6]  # at the same places
    before = gate(f2d, f3d, valid, (6, 6), xyz)
    spoilt = f3d.detach().clone()
    spoilt[2] = torch.nan
    after = gate(f2d, spoilt, valid, (6, 6), xyz)
    assert torch.equal(after.fused[6:], before.fused[6:])
    assert torch.isnan(after.fused[:6]).any()


def test_enhanced_is_held_at_one_half_early_with_all_that_makes_alpha_frozen() -> None:
    gate = EnhancedFusionGate(SMALL, WIDTH, early_share=0.1)
    f2d, f3d, xyz = torch.randn(8, WIDTH), torch.randn(8, WIDTH), torch.rand(8, 3)
    valid = torch.arange(8) % 2 == 0
    gate.set_progress(0, 20)
    early = gate(f2d, f3d, valid, (8,), xyz)
    assert early.alpha[:, 0].tolist() == torch.where(valid, 0.5, 0.1).tolist()
    assert {name.partition(".")[0] for name, p in gate.named_parameters() if p.requires_grad} == {"channel"}
    gate.set_progress(2, 20)
    gate(f2d, f3d, valid, (8,), xyz).fused.sin().sum().backward()
    # A bias of all keys shifts every score of a point alike, and softmax does not see it: its gradient is rounding.
    assert [n for n, p in gate.named_parameters() if p.grad is None or not p.grad.any()] in ([], ["attention.key.bias"])


def test_enhanced_has_ten_times_the_parameters_of_lite() -> None:
    def size(gate: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in gate.parameters())

    c, hidden, heads = 256, 256, 8
    attention = 2 * (2 * c) + 3 * (2 * c * c + c) + (2 * c * 3 * heads + 3 * heads) + (c * c + c)
    feed_forward = 2 * c + (c * 2 * c + 2 * c) + (2 * c * c + c)
    rest = (3 * c * hidden + hidden) + (hidden + 1) + (c * c + c)
    full = EnhancedFusionGate(GateSettings(), c, early_share=0.0)
    assert size(full) == attention + feed_forward + rest == 999_449
    saving = 1 - size(LiteFusionGate(GateSettings(), c, early_share=0.0)) / size(full)
    assert round(saving, 2) == 0.90  # 003: LiteFusionGate saves 90 %


def test_simple_is_the_mean_where_a_view_sees_the_point() -> None:
    f2d, f3d = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    valid = torch.tensor([True, False, True, False, False])
    found = SimpleFusion()(f2d, f3d, valid, (3, 2), torch.rand(5, 3))
    for i in range(5):
        assert torch.equal(found.fused[i], (f2d[i] + f3d[i]) / 2 if valid[i] else f3d[i])
    assert found.alpha[:, 0].tolist() == [0.5, 0, 0.5, 0, 0]
    assert found.channel_weight.tolist() == [[1.0] * 4] * 2
    torch.testing.assert_close(found.fused, found.alpha * f2d + (1 - found.alpha) * f3d)  # as a gate's α says
    found.fused.sum().backward()
    assert f2d.grad is not None
    assert f3d.grad is not None
    assert f2d.grad[:, 0].tolist() == [0.5, 0, 0.5, 0, 0]
    assert f3d.grad[:, 0].tolist() == [0.5, 1, 0.5, 1, 1]


@pytest.mark.parametrize(
    ("fusion", "kind"), [("lite", LiteFusionGate), ("simple", SimpleFusion), ("enhanced", EnhancedFusionGate)]
)
def test_a_gate_is_made_by_name_and_the_gate_probe_reads_it(fusion: str, kind: type) -> None:
    settings = load_settings("bifusion", scale="small", overrides=[f"model.fusion={fusion}"]).model
    model = torch.nn.Module()
    model.gate = make_gate(settings, early_share=0.0)
    assert type(model.gate) is kind
    f2d, f3d = torch.randn(2, 6, settings.common_width)
    valid = torch.arange(6) < 4
    with Monitor(model, probes=["gate"]) as monitor:
        with monitor.step():
            out: GateOutput = model.gate(f2d, f3d, valid, (6,), torch.rand(6, 3))
        monitor.end_step()
        row = monitor.latest()
    assert row["gate/mean"] == pytest.approx(out.alpha.mean().item())
    assert row["gate/nonfinite"] == 0
