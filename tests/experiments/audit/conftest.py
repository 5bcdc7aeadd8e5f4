"""A tiny run to audit, its scenes, and whole audits of it that tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bifusion_diag.config import Settings, load_settings
from bifusion_diag.data import Scene, open_source
from bifusion_diag.experiments.audit import Audit, audit
from bifusion_diag.experiments.audit.bench import Bench

TINY: dict[str, Any] = {
    "training.batch_size": 2,
    "training.steps": 60,
    "training.device": "cpu",
    "data.scenes": 4,
    "data.views": 1,
    "data.point_views": 2,  # some points are out of view
    "data.max_points": 500,
    "data.image_height": 48,
    "data.image_width": 64,
    "data.superpoint_size": 0.5,
    "model.clip.architecture": "ViT-B-32",
}


class Scenes:
    """A source of given scenes."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self.scenes = list(scenes)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Scene:
        return self.scenes[index]

    def names(self) -> list[str]:
        return [scene.name for scene in self.scenes]

    def describe(self) -> dict[str, Any]:
        return {"kind": "test", "scenes": len(self), "labels": "ground truth (synthetic)"}


def tiny(preset: str = "bifusion", **values: Any) -> Settings:
    """Settings of the tiny run; `values` by dotted key, with "__" for the dots."""
    changed = {key.replace("__", "."): value for key, value in values.items()}
    return load_settings(preset, scale="small", values=TINY | changed)


@pytest.fixture(scope="session")
def scenes() -> list[Scene]:
    """Clean rooms."""
    source = open_source(tiny().data, seed=0)
    return [source[index] for index in range(len(source))]


@pytest.fixture
def bench(scenes: list[Scene]) -> Callable[..., Bench]:
    """Makes a bench: of a preset, with settings, and on scenes that were changed."""

    def make(preset: str = "bifusion", change: Callable[[Scene], Scene] | None = None, **values: Any) -> Bench:
        own = scenes if change is None else [change(scene) for scene in scenes]
        return Bench(tiny(preset, **values), source=Scenes(own))

    return make


@pytest.fixture(scope="session")
def clean() -> Audit:
    """Of the default preset."""
    return audit(tiny(), scenes=4)


@pytest.fixture(scope="session")
def fragile(scenes: list[Scene]) -> Audit:
    """Of the state that failed; one scene has lost its pose, one has a single object of one superpoint."""
    pose = scenes[0].pose.copy()
    pose[:] = -np.inf
    sizes = np.bincount(scenes[1].superpoint)
    single = np.where(scenes[1].superpoint == sizes.argmax(), 0, -1)
    flawed = [replace(scenes[0], pose=pose), replace(scenes[1], instance=single), *scenes[2:]]
    return audit(tiny("bifusion-fragile"), scenes=4, source=Scenes(flawed))
