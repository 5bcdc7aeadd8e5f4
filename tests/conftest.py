"""Fixtures shared by all tests."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning OpenMP threads starve a shared machine

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _own_folder_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in an empty folder with fixed seeds."""
    monkeypatch.chdir(tmp_path)
    np.random.seed(0)
    try:
        import torch
    except ImportError:
        return
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_frames() -> Path:
    """The folder of real RGB-D frames that may lie beside the project."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "rgbd"
    if not folder.is_dir():
        pytest.skip("real RGB-D frames: the folder shared/data/rgbd is not beside this project")
    return folder
