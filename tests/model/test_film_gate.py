"""FiLM and LiteFusionGate against their formulas."""

from __future__ import annotations

import torch

from bifusion_diag.config.settings import GateSettings
from bifusion_diag.model.film import FiLM
from bifusion_diag.model.gate import LiteFusionGate


def test_film_starts_as_the_identity_and_follows_its_formula() -> None:
    film = FiLM(64, 32, 8)
    encoding, f2d, f3d = torch.randn(5, 64), torch.randn(5, 8), torch.randn(5, 8)
    for before, after in zip((f2d, f3d), film(encoding, f2d, f3d), strict=True):
        assert torch.equal(before, after)

    for parameter in film.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    first, _, last = film.mlp
    hidden = encoding @ first.weight.T + first.bias
    hidden = hidden / (1 + torch.exp(-hidden))
    signal = hidden @ last.weight.T + last.bias
    gamma, beta = signal[:, :8], signal[:, 8:]
    for before, after in zip((f2d, f3d), film(encoding, f2d, f3d), strict=True):
        torch.testing.assert_close(after, (1 + gamma) * before + beta)


def test_gate_follows_its_formula_scene_by_scene() -> None:
    gate = LiteFusionGate(GateSettings(hidden=16), 8, early_share=0.0)
    counts = (6, 0, 4)
    f2d, f3d = torch.randn(10, 8), torch.randn(10, 8)
    valid = torch.rand(10) > 0.4
    found = gate(f2d, f3d, valid, counts, torch.rand(len(f2d), 3))

    first, _, last = gate.point_mlp
    channel = gate.channel
    for i in range(10):
        pair = torch.cat([f2d[i], f3d[i]])
        raw = torch.sigmoid(last.weight @ torch.relu(first.weight @ pair + first.bias) + last.bias)
        torch.testing.assert_close(found.alpha[i], raw * valid[i] + 0.1 * ~valid[i])
    mixed = found.alpha * f2d + (1 - found.alpha) * f3d
    for scene, part in ((0, slice(0, 6)), (2, slice(6, 10))):
        weight = torch.sigmoid(channel.weight @ mixed[part].mean(0) + channel.bias)
        torch.testing.assert_close(found.channel_weight[scene], weight)
        torch.testing.assert_close(found.fused[part], weight * mixed[part])
    assert found.alpha.shape == (10, 1)
    assert found.channel_weight.shape == (3, 8)

    found.fused.sum().backward()  # the empty scene must not spoil the gradient
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in gate.parameters())


def test_a_scene_with_nan_leaves_the_others_alone() -> None:
    gate = LiteFusionGate(GateSettings(hidden=16), 8, early_share=0.0)
    f2d, f3d = torch.randn(10, 8), torch.randn(10, 8)
    f3d[2] = torch.nan
    found = gate(f2d, f3d, torch.ones(10, dtype=torch.bool), (5, 5), torch.rand(len(f2d), 3))
    assert torch.isnan(found.fused[:5]).any()
    assert torch.isfinite(found.fused[5:]).all()


def test_a_short_run_visits_the_early_phase_too() -> None:
    gate = LiteFusionGate(GateSettings(hidden=16), 8, early_share=3000 / 33000)
    phases = []
    for step in range(3):
        gate.set_progress(step, 3)
        phases.append(gate.early)
    assert phases == [True, False, False]


def test_early_phase_is_one_half_and_frozen() -> None:
    gate = LiteFusionGate(GateSettings(hidden=16), 8, early_share=3000 / 33000)
    f2d, f3d = torch.randn(6, 8), torch.randn(6, 8)
    valid = torch.tensor([True, True, False, True, False, True])
    gate.set_progress(8, 99)
    early = gate(f2d, f3d, valid, (6,), torch.rand(len(f2d), 3))
    assert early.alpha[:, 0].tolist() == torch.where(valid, 0.5, 0.1).tolist()
    early.fused.sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in gate.point_mlp.parameters())
    assert gate.channel.weight.grad is not None

    gate.set_progress(9, 99)  # 3000 of 33000 steps are 9 of 99
    late = gate(f2d, f3d, valid, (6,), torch.rand(len(f2d), 3))
    assert (late.alpha[valid] != 0.5).all()
    late.fused.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gate.point_mlp.parameters())


def test_gate_is_about_a_tenth_of_a_million() -> None:
    gate = LiteFusionGate(GateSettings(), 256, early_share=0.0)
    point = (512 * 64 + 64) + (64 + 1)
    channel = 256 * 256 + 256
    assert sum(p.numel() for p in gate.parameters()) == point + channel == 98_689
