"""Monitor.snapshot: α of a scene of any model, without a trace in its training."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bifusion_diag.errors import UserError
from bifusion_diag.probes import Monitor
from bifusion_diag.record import Snapshot, load_run

POINTS = 40


class Seen(NamedTuple):
    uv: Tensor
    valid: Tensor


class Weighed(NamedTuple):
    alpha: Tensor


class Camera(nn.Module):
    def forward(self, xyz: Tensor) -> Seen:
        return Seen(xyz[:, :2] * 10, xyz[:, 2] > 0)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.score = nn.Linear(3, 1)

    def forward(self, xyz: Tensor) -> Weighed:
        return Weighed(self.score(self.drop(self.norm(xyz))).sigmoid())


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.camera, self.gate = Camera(), Gate()

    def forward(self, xyz: Tensor) -> Tensor:
        self.camera(xyz)
        return self.gate(xyz).alpha.mean()


def train(out: Path, *, snapshots: bool) -> tuple[dict[str, Tensor], list[Snapshot | None]]:
    torch.manual_seed(3)
    model = Fused()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scene = torch.randn(POINTS, 3)
    images = torch.zeros(3, 20, 20, dtype=torch.uint8)
    taken: list[Snapshot | None] = []
    with Monitor(model, optimizer, "all", out) as monitor:
        for _ in range(6):
            if snapshots:
                model.gate.drop.eval()  # modes are put back module by module
                taken.append(monitor.snapshot(lambda: model(scene), scene, images, name="mine"))
                assert (model.gate.norm.training, model.gate.drop.training) == (True, False)
                model.gate.drop.train()
            with monitor.step():
                loss = model(torch.randn(8, 3))
                loss.backward()
                optimizer.step()
            optimizer.zero_grad()
    return dict(model.state_dict()), taken


def test_a_snapshot_is_of_the_evaluated_model_and_leaves_no_trace(tmp_path: Path) -> None:
    plain, _ = train(tmp_path / "plain", snapshots=False)
    state, taken = train(tmp_path / "with", snapshots=True)
    assert [name for name in plain if not torch.equal(plain[name], state[name])] == []
    one, other = (load_run(tmp_path / name) for name in ("plain", "with"))
    for name in one.names("grads/"):
        np.testing.assert_array_equal(one.all_series[name].value, other.all_series[name].value, err_msg=name)
    assert [kind.kind for kind in one.events] == [kind.kind for kind in other.events]
    assert [shot.done for shot in other.snapshots] == [0, 1, 5]
    first = taken[0]
    assert first is not None
    torch.manual_seed(3)
    fresh = Fused().eval()
    scene = torch.randn(POINTS, 3)
    with torch.no_grad():
        alpha = fresh.gate(scene).alpha.flatten().double().numpy()
    valid = (scene[:, 2] > 0).numpy()
    assert first.numbers.mean_valid == pytest.approx(alpha[valid].mean(), rel=1e-6)
    assert first.numbers.mean_invalid == pytest.approx(alpha[~valid].mean(), rel=1e-6)
    assert (first.numbers.points, first.numbers.valid) == (POINTS, valid.sum())
    np.testing.assert_allclose(sorted(first.alpha), sorted(alpha), atol=5e-4)  # float16


def test_what_is_missing_or_does_not_fit_is_said() -> None:
    model, scene = Fused(), torch.randn(POINTS, 3)
    images = torch.zeros(1, 3, 20, 20, dtype=torch.uint8)
    with Monitor(model, probes=["losses"]) as monitor:
        with pytest.raises(UserError, match="no module of the model has returned uv and valid"):
            monitor.snapshot(lambda: model.gate(scene), scene, images)
        with pytest.raises(UserError, match="no module of the model has returned alpha"):
            monitor.snapshot(lambda: model.camera(scene), scene, images)
        with pytest.raises(UserError, match=r"xyz is \(39, 3\); expected \(40, 3\)"):
            monitor.snapshot(lambda: model(scene), scene[1:], images)
        with pytest.raises(UserError, match=r"images are \(2, 3, 20, 20\); expected \(1, 3, H, W\)"):
            monitor.snapshot(lambda: model(scene), scene, images.repeat(2, 1, 1, 1))
        with pytest.raises(UserError, match=r"pose is \(1, 3, 3\)"):
            monitor.snapshot(lambda: model(scene), scene, images, pose=torch.eye(3))
        with monitor.step(), pytest.raises(UserError, match="a step block is open"):
            monitor.snapshot(lambda: model(scene), scene, images)
        assert model.training
