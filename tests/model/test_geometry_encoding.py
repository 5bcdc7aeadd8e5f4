"""The 64 signals against their closed form, point by point."""

from __future__ import annotations

import numpy as np
import torch

from bifusion_diag.model.geometry_encoding import SIGNALS, GeometricEncoding, camera_rotation
from bifusion_diag.model.outputs import Projection


def closed_form(xyz: np.ndarray, scene: np.ndarray, superpoint: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    rows = []
    for i in range(len(xyz)):
        room, part = xyz[scene == scene[i]], xyz[superpoint == superpoint[i]]
        low, high = room.min(0), room.max(0)
        diagonal = np.linalg.norm(high - low) or 1.0
        p = (xyz[i] - (low + high) / 2) / diagonal
        waves = [f(x * 2**w * np.pi) for f in (np.sin, np.cos) for w in range(8) for x in p]
        size = (part.max(0) - part.min(0)) / diagonal
        rows.append([*p, *size, *rotation[i].reshape(9), (xyz[i, 2] - low[2]) / diagonal, *waves])
    return np.array(rows)


def test_signals_equal_their_closed_form_in_every_scene() -> None:
    xyz = torch.randn(60, 3, dtype=torch.float64) * torch.tensor([3.0, 2.0, 1.0]) + torch.tensor([10.0, -4.0, 2.0])
    xyz[59] += 1000  # the last scene is this single point: no extent
    scene = torch.tensor([0] * 35 + [1] * 24 + [3])  # scene 2 is empty
    superpoint = torch.tensor([i % 4 for i in range(35)] + [4 + i % 3 for i in range(24)] + [7])
    rotation = torch.linalg.qr(torch.randn(60, 3, 3, dtype=torch.float64))[0]
    encode = GeometricEncoding().double()
    found = encode(xyz, scene, superpoint, scenes=4, superpoints=8, rotation=rotation)
    assert found.shape == (60, SIGNALS) == (60, 64)
    want = closed_form(xyz.numpy(), scene.numpy(), superpoint.numpy(), rotation.numpy())
    np.testing.assert_allclose(found.detach().numpy(), want, atol=1e-11)

    found.square().sum().backward()
    assert encode.log_w.grad is not None
    assert torch.isfinite(encode.log_w.grad).all()


def test_frequencies_learn_through_gradcheck() -> None:
    xyz = torch.randn(5, 3, dtype=torch.float64)
    encode = GeometricEncoding().double()
    index = torch.zeros(5, dtype=torch.int64)

    def signals(log_w: torch.Tensor) -> torch.Tensor:
        call = {"scenes": 1, "superpoints": 1, "rotation": torch.eye(3).double().expand(5, 3, 3)}
        return torch.func.functional_call(encode, {"log_w": log_w}, (xyz, index, index), call)

    assert torch.autograd.gradcheck(signals, (torch.arange(8.0, dtype=torch.float64, requires_grad=True) / 4,))


def test_camera_rotation_is_the_chosen_views_or_the_identity() -> None:
    pose = torch.randn(2, 2, 4, 4)
    pose[1, 1] = -torch.inf
    n = 4
    flags = torch.ones(n, 2, dtype=torch.bool)
    projection = Projection(
        camera_xyz=torch.zeros(n, 2, 3),
        uv=torch.zeros(n, 2, 2),
        in_front=flags,
        inside=flags,
        visible=flags,
        view=torch.tensor([1, 0, 1, 0]),
        valid=torch.tensor([True, False, True, True]),
    )
    found = camera_rotation(pose, projection, torch.tensor([0, 0, 1, 1]))
    identity = torch.eye(3)
    for row, want in zip(found, (pose[0, 1, :3, :3], identity, identity, pose[1, 0, :3, :3]), strict=True):
        torch.testing.assert_close(row, want, rtol=0, atol=0)
