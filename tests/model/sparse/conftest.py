"""What the tests of the sparse engine share."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bifusion_diag.model.sparse import Engine, make_engine
from bifusion_diag.model.sparse.native import NativeEngine

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


@pytest.fixture
def golden() -> Callable[[str], dict[str, Tensor]]:
    """Load a file of golden arrays as tensors."""

    def load(name: str) -> dict[str, Tensor]:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    return load


@pytest.fixture(params=["pairs", "columns", "minkowski"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Each engine in turn, the native one with each of its algorithms."""
    if request.param == "minkowski" and importlib.util.find_spec("MinkowskiEngine") is None:
        pytest.skip("MinkowskiEngine is not installed (`make minkowski`)")
    return make_engine("minkowski") if request.param == "minkowski" else NativeEngine(request.param)


@pytest.fixture
def minkowski() -> Engine:
    """The real MinkowskiEngine."""
    if importlib.util.find_spec("MinkowskiEngine") is None:
        pytest.skip("MinkowskiEngine is not installed (`make minkowski`)")
    return make_engine("minkowski")


@pytest.fixture
def some_voxels() -> Callable[..., Tensor]:
    """Random unique coordinates (batch, x, y, z) of two batch items, negative ones among them, in random order."""

    def draw(count: int, extent: int = 6, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        every = torch.tensor(list(itertools.product(range(2), *[range(-extent // 2, extent - extent // 2)] * 3)))
        return every[torch.randperm(len(every), generator=generator)[:count]].int()

    return draw


@pytest.fixture
def match_rows() -> Callable[[Tensor, Tensor], Tensor]:
    """Rows of the second coordinates in the order of the first."""

    def match(wanted: Tensor, have: Tensor) -> Tensor:
        row = {tuple(coord): index for index, coord in enumerate(have.tolist())}
        assert len(row) == len(have) == len(wanted)
        return torch.tensor([row[tuple(coord)] for coord in wanted.tolist()])

    return match
