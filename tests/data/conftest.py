"""Small scenes for the tests of the data room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bifusion_diag.data.scene import Scene


@pytest.fixture
def make_scene() -> Callable[..., Scene]:
    """Build a well-formed scene of ``count`` random points; any field can be given."""

    def make(count: int = 40, *, name: str = "small", views: int = 1, seed: int = 0, **fields: Any) -> Scene:
        rng = np.random.default_rng(seed)
        default: dict[str, Any] = {
            "points": np.concatenate([rng.random((count, 3)), rng.random((count, 3)) * 255], 1).astype(np.float32),
            "images": rng.integers(0, 256, (views, 3, 6, 8)).astype(np.uint8),
            "depth": np.ones((views, 6, 8), np.float32),
            "intrinsics": np.repeat(np.float32([[[8, 0, 3.5], [0, 8, 2.5], [0, 0, 1]]]), views, axis=0),
            "pose": np.repeat(np.eye(4, dtype=np.float32)[None], views, axis=0),
            "semantic": rng.integers(-1, 200, count),
            "instance": rng.integers(-1, 3, count),
            "superpoint": np.arange(count) % max(min(count, 7), 1),
            "labels": "test",
        }
        return Scene(name=name, **{**default, **fields})

    return make
