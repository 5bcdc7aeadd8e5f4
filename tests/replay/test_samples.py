"""The guilty sample is the one that was spoilt, and nobody is guilty where nobody was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.samples import sample_shares
from bifusion_diag.replay.step import Training


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))


def cnn() -> nn.Module:
    """BatchNorm over whole images, dropout, and at the end over one value a channel and sample."""
    return nn.Sequential(
        nn.Unflatten(1, (3, 2, 2)),
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(16, 4),
    )


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.1, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Unflatten(1, (1, 12)), encoder, nn.Flatten(), nn.Linear(12, 4))


class Task:
    """Classification that a model has learnt; batches are {"x", "y", "file"}."""

    def __init__(self, make: Any, size: int = 8, learn: int = 200) -> None:
        torch.manual_seed(0)
        self.size = size
        self.centres = torch.randn(4, 12) * 2
        self.model = make()
        self.training = Training(self.model, self.step)
        optimizer = torch.optim.Adam(self.model.parameters(), 1e-2)
        for _ in range(learn):
            optimizer.zero_grad()
            self.training.loss(self.batch(32)).total.backward()
            optimizer.step()
        optimizer.zero_grad()

    def step(self, batch: Any) -> dict[str, Tensor]:
        logits = self.model(batch["x"])
        return {"class": F.cross_entropy(logits, batch["y"]), "size": 1e-4 * logits.square().mean()}

    def batch(self, size: int | None = None) -> dict[str, Any]:
        y = torch.randint(4, (size or self.size,))
        return {
            "x": self.centres[y] + 0.3 * torch.randn(len(y), 12),
            "y": y,
            "file": [f"{i}.png" for i in range(len(y))],
        }

    def find(self, batch: Any, kind: str, contrast: bool = True) -> Any:
        before = StepNotes(self.model, 3, self.batch()) if contrast else None
        return sample_shares(self.training, StepNotes(self.model, 4, batch), kind, contrast=before)


@pytest.fixture(scope="module", params=[mlp, cnn, transformer])
def learnt(request: Any) -> Task:
    return Task(request.param)


@pytest.fixture(params=[2, 5, 8, 40])
def task(learnt: Task, request: Any) -> Task:
    if request.param < 8 and any(isinstance(module, nn.BatchNorm1d) for module in learnt.model.modules()):
        pytest.skip("BatchNorm over a handful of values: healthy batches differ as much as spoilt ones")
    torch.manual_seed(request.param)
    task = copy.copy(learnt)
    task.size, task.model = request.param, copy.deepcopy(learnt.model)
    task.training = Training(task.model, task.step)
    return task


def guilty(finding: Any) -> list[int]:
    return [share.index for share in finding.shares]


def test_a_sample_with_one_nan(task):
    batch = task.batch()
    batch["x"][1, 3] = torch.nan
    finding = task.find(batch, "nonfinite-loss")
    assert guilty(finding) == [1], finding
    assert finding.shares[0].name == "1.png"
    assert "its input x holds 1 values that are not finite" in finding.shares[0].why
    assert "without it the step is finite" in finding.shares[0].why


@pytest.mark.parametrize("kind", ["loss-spike", "gradient-spike"])
def test_a_sample_with_a_wrong_label(task, kind):
    batch = task.batch()
    batch["y"][1] = (batch["y"][1] + 1) % 4
    finding = task.find(batch, kind)
    assert guilty(finding) == [1], finding


def test_a_sample_with_a_huge_input(task):
    batch = task.batch()
    batch["x"][0] *= -1000
    finding = task.find(batch, "gradient-spike")
    assert guilty(finding) == [0], finding
    assert guilty(task.find(batch, "input-outlier")) == [0]


@pytest.mark.parametrize("kind", ["loss-spike", "gradient-spike"])
def test_a_batch_whose_labels_are_all_wrong_has_no_single_guilty_sample(task, kind):
    batch = task.batch()
    batch["y"] = (batch["y"] + 1) % 4
    finding = task.find(batch, kind)
    assert guilty(finding) == [], finding


@pytest.mark.parametrize("kind", ["loss-spike", "gradient-spike", "nonfinite-loss", "input-outlier"])
def test_a_healthy_batch_has_none(task, kind):
    finding = task.find(task.batch(), kind)
    assert guilty(finding) == [], finding
    assert finding.reason


def test_spoilt_weights_are_no_samples_fault(task):
    with torch.no_grad():
        list(task.model.parameters())[-1][0] = torch.nan
    finding = task.find(task.batch(), "nonfinite-loss")
    assert (guilty(finding), finding.reason) == ([], "the last healthy batch is bad at these weights too")
    with torch.no_grad():
        list(task.model.parameters())[-1][0] = 1000.0
    assert guilty(task.find(task.batch(), "loss-spike")) == []
