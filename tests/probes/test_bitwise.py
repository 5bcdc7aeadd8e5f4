"""Twenty steps of our own models, bare and measured by all probes: every bit they leave is the same."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from watching import hooks_of, same, state_of

from bifusion_diag.config import load_settings
from bifusion_diag.data import BatchLoader
from bifusion_diag.model.build import build_model
from bifusion_diag.probes import PROBES, Monitor
from bifusion_diag.record import load_run
from bifusion_diag.training.determinism import make_deterministic
from bifusion_diag.training.evaluation import training_source
from bifusion_diag.training.optim import build_optimizer

TINY = (
    "training.batch_size=1",
    "data.scenes=3",
    "data.max_points=300",
    "data.image_height=32",
    "data.image_width=48",
    "data.superpoint_size=0.5",
    "training.steps=20",
)
PRESETS = ("baseline-5cm", "bifusion")


def train(preset: str, out: Path | None, *, steps: int = 20, amp: bool = False, parts: int = 1) -> dict[str, Any]:
    """Train, measured if there is a place for the record. Returns all that is left of it.

    Args:
        amp: forwards in bfloat16.
        parts: forwards and backwards a step.
    """
    settings = load_settings(preset, scale="small", overrides=TINY)
    make_deterministic(settings.training.seed, 1)
    loader = BatchLoader(training_source(settings), settings.data, batch_size=1, seed=settings.training.seed)
    model = build_model(settings).train()
    optimizer = build_optimizer(model, settings.optim)
    monitor = None if out is None else Monitor(model, optimizer, probes="all", out=out).__enter__()
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        model.set_progress(step, steps)
        block = None if monitor is None else monitor.step()
        if block is not None:
            block.__enter__()
        for part in range(parts):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
                loss = model(loader.batch(parts * step + part)).loss.total / parts
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if block is not None:
            block.__exit__(None, None, None)
    if monitor is not None:
        monitor.__exit__(None, None, None)
    assert not hooks_of(model, [optimizer])
    return {
        "model": state_of(model),
        "optimizer": optimizer.state_dict(),
        "losses": losses,
        "streams": [random.getstate(), np.random.get_state()[1], torch.get_rng_state()],
    }


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"amp": True}, id="bf16", marks=pytest.mark.slow),
        pytest.param({"parts": 2}, id="accumulated", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("preset", PRESETS)
def test_training_leaves_the_same_bits(preset: str, options: dict[str, Any], tmp_path: Path) -> None:
    bare = train(preset, None, **options)
    assert all(torch.isfinite(loss) for loss in bare["losses"])
    assert same(bare, train(preset, tmp_path / "run.json", **options))
    run = load_run(tmp_path / "run.json")
    assert run.steps.tolist() == list(range(20))
    assert not [event for event in run.events if event.kind == "probe"]
    found = {name.split("/")[0] for name in run.all_series} | {name.split("/")[0] for name in run.histograms}
    assert {"grads", "loss"} <= found <= {"train"} | {probe.prefix for probe in PROBES.values()}


def test_the_comparison_can_fail() -> None:
    one = train("baseline-5cm", None, steps=1)
    for path in (("model", "weights"), ("model", "gradients"), ("model", "buffers")):
        other = train("baseline-5cm", None, steps=1)
        assert same(one, other)
        tensors = [x for x in other[path[0]][path[1]].values() if x is not None and x.is_floating_point()]
        bits = tensors[-1].view(torch.int32).flatten()
        bits[0] ^= 1  # the last bit of one number
        assert not same(one, other)
    other = train("baseline-5cm", None, steps=1)
    other["streams"][2] = other["streams"][2].clone()
    other["streams"][2][-1] ^= 1
    assert not same(one, other)
