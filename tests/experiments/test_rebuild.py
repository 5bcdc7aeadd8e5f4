"""Our own runs are built again from a capsule's settings, in a new process to the bit."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bifusion_diag.config import Settings, load_settings
from bifusion_diag.data import BatchLoader
from bifusion_diag.experiments.rebuild import is_own, rebuild, settings_of
from bifusion_diag.model.build import build_model
from bifusion_diag.replay.capsules.capsule import CapsuleWriter, read_capsule
from bifusion_diag.replay.capsules.execute import replay_capsule
from bifusion_diag.replay.incident import Incident, Trigger
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Training
from bifusion_diag.training.determinism import make_deterministic
from bifusion_diag.training.evaluation import training_source
from bifusion_diag.training.faults import Faults
from bifusion_diag.training.optim import build_optimizer, learning_rate, set_learning_rate
from bifusion_diag.training.stages import StageSwitch, stages_of

TINY = (
    "training.batch_size=2", "training.device=cpu", "training.threads=1", "data.scenes=3", "data.max_points=600",
    "data.image_height=48", "data.image_width=64", "data.superpoint_size=0.5", "training.steps=3",
)  # fmt: skip
NEW_PROCESS = (
    "import sys; from bifusion_diag.experiments.rebuild import rebuild;"
    "from bifusion_diag.replay.capsules.capsule import read_capsule;"
    "from bifusion_diag.replay.capsules.execute import replay_capsule\n"
    "for folder in sys.argv[1:]:\n"
    "    capsule = read_capsule(folder); found = replay_capsule(capsule, rebuild(capsule))\n"
    "    print(found.identical, found.compared, found.difference, *found.reasons, sep=' | ')"
)


def capsule_of_a_run(settings: Settings, folder: Path, step: int = 2) -> str:
    """The capsule of a step of a run as the trainer trains it."""
    make_deterministic(settings.training.seed, settings.training.threads)
    loader = BatchLoader(training_source(settings), settings.data, batch_size=2, seed=settings.training.seed)
    model = build_model(settings).train()
    optimizer = build_optimizer(model, settings.optim)
    faults = Faults(settings.training.inject, model, optimizer, batch_size=2)
    stages = StageSwitch(model, stages_of(settings), settings.training.steps)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    writer = CapsuleWriter(
        3,
        "1 GB",
        settings=settings.model_dump(mode="json"),
        rebuilt=frozenset(name for name, p in model.named_parameters() if id(p) not in held),
    )
    writer.open(model, folder)
    training = Training(model, lambda batch: model(batch).loss, (optimizer,))
    for number in range(step + 1):
        model.set_progress(number, settings.training.steps)
        stages.enter(number)
        set_learning_rate(optimizer, learning_rate(settings.optim, number, settings.training.steps), clip_scale=1.0)
        faults.before_step(number)
        batch = faults.batch(number, loader.batch(number))
        with faults.context(number):
            notes = StepNotes(model, number, batch)
            loss = training.loss(batch)
            training.backward(loss)
            if number == step:
                incident = Incident(number, "nonfinite-loss", (Trigger("nonfinite-loss", "a test"),))
                written, note = writer.write(incident, training, notes, None)
                assert written is not None, note
                return written
            optimizer.step()
            optimizer.zero_grad()
    raise AssertionError


def tiny(preset: str, *overrides: str) -> Settings:
    return load_settings(preset, scale="small", overrides=[*TINY, *overrides])


def in_a_new_process(*folders: str) -> list[list[str]]:
    command = [sys.executable, "-c", NEW_PROCESS, *folders]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [line.split(" | ") for line in result.stdout.splitlines()]


@pytest.fixture(autouse=True)
def _flags() -> Any:
    """What make_deterministic switches is switched back."""
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def test_a_run_of_the_native_engine_is_bit_identical_in_a_new_process() -> None:
    """In the last of its stages, with CLIP's frozen weights left out, dropout, a fault in the forward and one in the
    batch."""
    faults = 'training.inject=["nan-output@2", "nan-color@2"]'
    folder = capsule_of_a_run(tiny("bifusion", "model.decoder.dropout=0.1", faults), Path("incidents"))
    found = in_a_new_process(folder)
    assert found[0][0] == "True", found
    names = list(read_capsule(folder).content["model"]["rebuilt"]["names"])
    assert names
    assert all(name.startswith("encoder.clip.") for name in names)


@pytest.mark.skipif(importlib.util.find_spec("MinkowskiEngine") is None, reason="MinkowskiEngine is not installed")
def test_a_run_of_minkowski_at_one_thread_is_bit_identical_in_a_new_process() -> None:
    try:
        folder = capsule_of_a_run(tiny("baseline-5cm", "model.sparse_engine=minkowski"), Path("minkowski"))
    except ValueError as error:
        pytest.skip(str(error))
    assert in_a_new_process(folder)[0][0] == "True"


def test_the_model_is_that_of_the_step() -> None:
    """Its stage and its schedules are the step's before anything is restored."""
    settings = tiny("bifusion")
    capsule = read_capsule(capsule_of_a_run(settings, Path("run"), step=0))
    training = rebuild(capsule)
    learns = {name for name, p in training.model.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("encoder.clip.", "encoder.film.", "encoder.backbone.")) for name in learns)
    assert any(name.startswith("encoder.head3d.") for name in learns)
    assert settings_of(capsule) == settings
    assert is_own(capsule.settings)
    assert not is_own({"lr": 1})


def test_a_fault_of_another_rank_is_not_this_ones() -> None:
    capsule = read_capsule(capsule_of_a_run(tiny("baseline-5cm"), Path("run"), step=0))
    settings = capsule.settings
    settings["training"]["inject"] = ["rank-spike@0:1"]
    for rank, identical in ((0, True), (1, False)):
        content = {**capsule.content, "settings": settings, "rank": rank}
        other = dataclasses.replace(capsule, content=content)
        found = replay_capsule(other, rebuild(other))
        assert found.identical is identical
