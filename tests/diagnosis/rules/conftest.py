"""The folder's own helpers, importable by name: the suite is imported without packages."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from rule_runs import classifier, cross_entropy, train
from torch import Tensor, nn

from bifusion_diag.record.schema import Run


@pytest.fixture(scope="session")
def healthy() -> Run:
    """A run as it should be: two terms, clipping that seldom clips, mixed precision's scaler."""

    def losses(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {**cross_entropy(model, x, labels), "size": 0.05 * model(x).square().mean()}

    torch.manual_seed(0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return train(classifier(), 240, losses=losses, terms=20, clip=20.0, scaler=scaler)
