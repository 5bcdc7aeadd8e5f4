"""Small runs for the tests of the training room."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from bifusion_diag.config import Settings, load_settings
from bifusion_diag.record import Run
from bifusion_diag.training import start_training

TINY = (
    "training.batch_size=1",
    "data.scenes=3",
    "data.max_points=600",
    "data.image_height=48",
    "data.image_width=64",
    "data.superpoint_size=0.5",
)


@pytest.fixture
def tiny() -> Callable[..., Settings]:
    """Settings of a run that takes seconds."""

    def make(preset: str, *overrides: str, steps: int = 4) -> Settings:
        return load_settings(preset, scale="small", overrides=[*TINY, f"training.steps={steps}", *overrides])

    return make


@pytest.fixture
def quiet() -> Console:
    """A console that nobody reads."""
    return Console(file=io.StringIO())


@pytest.fixture
def train(tiny: Callable[..., Settings], quiet: Console, tmp_path: Path) -> Callable[..., Run]:
    """Train a tiny run and get its record."""

    def run(preset: str, *overrides: str, name: str = "run", steps: int = 4, probes: tuple[str, ...] = ()) -> Run:
        return start_training(
            tiny(preset, *overrides, steps=steps), tmp_path / f"{name}.json", probes=probes, console=quiet
        )

    return run
