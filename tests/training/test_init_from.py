"""Runs that begin with the weights of a file: they have them, record them, and resume without the file."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from bifusion_diag.config import Settings
from bifusion_diag.errors import UserError
from bifusion_diag.model.build import build_model
from bifusion_diag.model.weight_files import file_digest
from bifusion_diag.record import Run
from bifusion_diag.training import Trainer, resume_training

Train = Callable[..., Run]
MakeSettings = Callable[..., Settings]


def newest_state(folder: Path, name: str) -> Path:
    return sorted((folder / f"{name}.checkpoints").glob("step-*"))[-1] / "state.safetensors"


def test_a_run_begins_where_an_earlier_one_ended(train: Train, tiny: MakeSettings, tmp_path: Path) -> None:
    train("baseline-5cm", name="earlier", steps=2)
    earlier = newest_state(tmp_path, "earlier")
    console = Console(file=io.StringIO(), width=300)
    settings = tiny("baseline-5cm", f"model.init_from={earlier}", "training.seed=7", steps=1)
    trainer = Trainer(settings, tmp_path / "later.json", [], [], console)
    held = {
        name.removeprefix("model/"): value for name, value in load_file(earlier).items() if name.startswith("model/")
    }
    state = trainer.model.state_dict()
    assert state.keys() == held.keys()
    assert all(torch.equal(state[name], value) for name, value in held.items())
    facts = trainer.run().provenance["initial_weights"]
    assert (facts["kind"], facts["sha256"]) == ("bifusion-diag checkpoint", file_digest(earlier))
    assert (facts["tensors"], facts["missing"], facts["first_names"]) == (len(held), 0, {})
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert (
        f"initial weights: state.safetensors (bifusion-diag checkpoint): {facts['parameters']:,} parameters" in printed
    )


def test_loading_changes_no_random_number_of_the_run(train: Train, tmp_path: Path, tiny: MakeSettings) -> None:
    torch.manual_seed(0)
    torch.save(build_model(tiny("baseline-5cm")).state_dict(), "seed0.pt")
    plain = train("baseline-5cm", name="plain", steps=2)
    loaded = train("baseline-5cm", "model.init_from=seed0.pt", name="loaded", steps=2)
    for name in ("loss/total", "train/grad_norm"):  # the run's seed is 0 too: the file holds what it begins with anyway
        assert plain.series(name).value.tolist() == loaded.series(name).value.tolist()  # type: ignore[union-attr]
    assert "initial_weights" not in plain.provenance


def test_a_resumed_run_needs_the_file_no_more(train: Train, tiny: MakeSettings, quiet: Console, tmp_path: Path) -> None:
    torch.manual_seed(5)  # other weights than the run's own, CLIP's among them
    torch.save(build_model(tiny("bifusion")).state_dict(), "whole.pt")
    overrides = ("model.init_from=whole.pt",)
    whole = train("bifusion", *overrides, name="whole", steps=3)
    facts = whole.provenance["initial_weights"]
    assert 0 < facts["frozen, other in the file"] < facts["frozen"]  # biases and norms begin the same
    trainer = Trainer(tiny("bifusion", *overrides, steps=3), tmp_path / "parts.json", [], [], quiet)
    step = trainer._step

    def interrupted_at_1(number: int, display: object) -> None:
        step(number, display)
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)

    trainer._step = interrupted_at_1
    assert trainer.run().status == "interrupted"
    Path("whole.pt").unlink()
    second = resume_training(tmp_path / "parts.json", console=quiet)
    assert (second.status, second.provenance["initial_weights"]) == ("completed", facts)
    np.testing.assert_array_equal(second.series("loss/total").value, whole.series("loss/total").value)  # type: ignore[union-attr]
    one, other = (load_file(newest_state(tmp_path, name)) for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_file_that_does_not_fit_ends_before_anything_is_written(
    tiny: MakeSettings, quiet: Console, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"model\.init_from: none\.pth: there is no such file"):
        Trainer(tiny("baseline-5cm", "model.init_from=none.pth"), tmp_path / "run.json", [], [], quiet)
    assert list(tmp_path.iterdir()) == []
