"""``bifusion-diag replay run.json``: what it prints, writes and exits with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bifusion_diag.record import load_run

Command = Callable[..., tuple[int, str]]
SMALL = (
    "training.threads=1", "training.checkpoint_every=2", "training.fingerprint_every=1", "data.scenes=2",
    "data.max_points=600", "data.image_height=48", "data.image_width=64", "data.superpoint_size=0.5",
)  # fmt: skip


@pytest.fixture
def trained(command: Command) -> Path:
    """A run of four steps, without probes."""
    settings = [part for pair in SMALL for part in ("--set", pair)]
    options = ["--scale", "small", "--batch-size", 1, "--steps", 4]
    code, _ = command("train", "--model", "baseline-5cm", *options, *settings, "--out", "run.json")
    assert code == 0
    return Path("run.json")


def test_a_run_is_re_executed_and_its_new_record_goes_through_the_reports(command: Command, trained: Path) -> None:
    code, text = command("replay", trained, "--steps", "2:4", "--probe", "grads", "--probe", "updates")
    assert code == 0
    assert "re-executed steps 2 to 3 of run.json, from the checkpoint step-000002" in text
    assert "bit-identical: " in text
    assert "the pre-clip gradient norm of 2 steps, the weights at 3 of them" in text
    new = load_run("run.replay.json")
    assert list(new.steps) == [2, 3]
    assert new.names("grads/")
    assert new.names("updates/")
    assert command("report", "run.replay.json")[0] == 0
    assert Path("run.replay.report.html").is_file()
    assert command("compare", trained, "run.replay.json", "--html", "both.html")[0] == 0
    assert Path("both.html").is_file()
    assert load_run(trained).status == "completed"  # as it was


def test_a_difference_is_named_with_exit_code_1(command: Command, trained: Path) -> None:
    path = Path("run.checkpoints/step-000002/state.safetensors")
    tensors = load_file(path)
    for name, value in tensors.items():
        if name.startswith("model/") and name.endswith("weight"):
            tensors[name] = value * 1.001
    save_file(tensors, path)
    code, text = command("replay", trained, "--steps", "3:4", "--out", "second.json")
    assert code == 1
    assert "not identical. The first difference: the checkpoint's weights after 2 steps" in text
    assert "it may be because: run.checkpoints/step-000002: its file does not hold what was saved" in text
    assert load_run("second.json").status == "completed"


def test_bad_input_ends_with_exit_code_2(command: Command, trained: Path) -> None:
    for given, said in (
        (("--steps", "2"), "--steps 2: give the first step"),
        (("--steps", "a:b"), "--steps a:b: give the first step"),
        (("--steps", "3:9"), "the run has steps 0 to 3"),
        (("--probe", "gards"), "unknown probe 'gards'"),
        (("--out", "run.json"), "where the run itself is recorded"),
        (("--trace",), "--trace: of a capsule"),
    ):
        code, text = command("replay", trained, *given)
        assert (code, said in text) == (2, True), text
    code, text = command("replay", "none.json")
    assert (code, "none.json" in text) == (2, True)
