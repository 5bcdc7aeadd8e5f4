"""``bifusion-diag replay`` of capsules: exit codes, what is printed, and what is said of bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bifusion_diag.replay.capsules.capsule import CapsuleWriter
from bifusion_diag.replay.incident import Cause, Incident, SampleShare, Trigger
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Training

Command = Callable[..., tuple[int, str]]

ENTRY = """
import torch
from torch import nn
from torch.nn import functional as F

def build(settings):
    model = nn.Sequential()
    for name, part in (("conv", nn.Conv2d(3, 4, 3)), ("norm", nn.BatchNorm2d(4)), ("pool", nn.AdaptiveAvgPool2d(1)),
                       ("flat", nn.Flatten()), ("head", nn.Linear(4, 3))):
        model.add_module(name, part)
    return model, lambda batch: F.cross_entropy(model(batch["image"] * settings["scale"]), batch["label"])

def other(settings):
    return build({"scale": 0.5})
"""
INCIDENT = Incident(
    7,
    "nonfinite-loss",
    (Trigger("nonfinite-loss", "loss term loss is NaN"), Trigger("nonfinite-gradient", "gradients too")),
    cause=Cause("norm", "forward", "aten.native_batch_norm", "user.py:12: x = self.norm(x)"),
    terms=("loss",),
    samples=(SampleShare(1, "b.png", "its input is NaN", ("no objects",)),),
    mechanism="nan-input",
    explanation="The second picture holds a NaN.",
    evidence={"rows": 4, "smallest variance": 1.5e-9},
    remedies=("drop-sample",),
)


@pytest.fixture
def capsule(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a users' step with one NaN in the second picture; its code is entry_of_cli.py in the current folder."""
    Path("entry_of_cli.py").write_text(ENTRY)
    monkeypatch.setattr(sys, "path", [str(Path.cwd()), *sys.path])
    sys.modules.pop("entry_of_cli", None)
    import entry_of_cli  # type: ignore[import-not-found]

    model, step = entry_of_cli.build({"scale": 1.0})
    image = torch.randn(4, 3, 6, 6)
    image[1, 0, 2, 2] = float("nan")
    notes = StepNotes(model, 7, {"image": image, "label": torch.tensor([0, 1, 2, 0])})
    writer = CapsuleWriter(1, "1 GB", settings={"scale": 1.0})
    writer.open(model, Path("run.incidents"))
    folder, note = writer.write(INCIDENT, Training(model, step), notes, None)
    assert folder is not None, note
    return Path(folder)


def test_a_capsule_is_replayed_and_told(command: Command, capsule: Path) -> None:
    code, text = command("replay", capsule, "--entry", "entry_of_cli:build")
    assert code == 0, text
    for words in (
        "step 7: loss term loss is NaN",
        "also          gradients too",
        "begins in     norm, forward, aten.native_batch_norm",
        "user.py:12: x = self.norm(x)",
        "1 (b.png): its input is NaN [no objects]",
        "The second picture holds a NaN.",
        "smallest variance: 1.5e-09",
        "bit-identical: 2 losses and 6 gradients",
        "loss nan",
    ):
        assert words in text
    assert "Traceback" not in text


def test_the_trace_shows_every_module_in_order_and_marks_where_it_began(command: Command, capsule: Path) -> None:
    code, text = command("replay", capsule, "--entry", "entry_of_cli.py:build", "--trace", "--probe", "grads")
    assert code == 0, text
    lines = [line.split() for line in text.splitlines()]
    rows = [line for line in lines if len(line) > 1 and ("BatchNorm2d" in line or "Conv2d" in line or "Linear" in line)]
    assert [row[:2] for row in rows] == [["conv", "Conv2d"], ["→", "norm"], ["head", "Linear"]]
    assert "1 bad" in " ".join(rows[0])
    assert "256 bad" in " ".join(rows[1])  # all of 4 pictures of 4 channels of 4 × 4: one NaN is in every mean
    assert "train/grad_norm" in text


def test_what_is_shown_is_written_as_json(command: Command, capsule: Path) -> None:
    code, text = command(
        "replay", capsule, "--entry", "entry_of_cli:build", "--no-backward", "--json", "out/shown.json"
    )
    assert code == 0, text
    shown = json.loads(Path("out/shown.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert (shown["replay"]["identical"], shown["replay"]["compared"]) == (True, "2 losses")
    assert shown["replay"]["losses"]["loss"] == "NaN"
    assert shown["incident"]["mechanism"] == "nan-input"


def test_a_step_that_differs_ends_with_one_and_says_what(command: Command, capsule: Path) -> None:
    """A NaN is equal to itself only to the bit, so it is the gradient of a finite step that differs here."""
    import entry_of_cli

    model, step = entry_of_cli.build({"scale": 1.0})
    batch = {"image": torch.randn(4, 3, 6, 6), "label": torch.tensor([0, 1, 2, 0])}
    writer = CapsuleWriter(1, "1 GB", settings={"scale": 1.0})
    writer.open(model, Path("other.incidents"))
    folder, _ = writer.write(INCIDENT, Training(model, step), StepNotes(model, 7, batch), None)
    code, text = command("replay", folder, "--entry", "entry_of_cli:other")
    assert code == 1, text
    assert "not bit-identical (2 losses and 6 gradients): first loss loss" in text
    assert "run twice here, it gives the same bits both times" in text
    loss = F.cross_entropy(model(batch["image"]), batch["label"]).item()
    assert command("replay", folder, "--entry", "entry_of_cli:build")[0] == 0
    assert f"{loss:.4g}" in command("replay", folder, "--entry", "entry_of_cli:build")[1]


def test_bad_input_is_told_in_one_line(command: Command, capsule: Path) -> None:
    for arguments, words in (
        ((capsule,), "is not of a run of bifusion-diag train: give --entry module:function"),
        ((capsule, "--entry", "entry_of_cli"), "give module:function or file.py:function"),
        ((capsule, "--entry", "entry_of_cli:gone"), "has no function 'gone'"),
        ((capsule, "--entry", "entry_of_cli:build", "--probe", "grad"), "Did you mean 'grads'"),
        ((capsule, "--steps", "1:2"), "--steps and --out are of runs"),
        ((capsule.parent,), "holds 1 capsules: give one of them, such as run.incidents/000007"),
        (("missing", "--trace"), "--trace: of a capsule, and missing is none"),
    ):
        code, text = command("replay", *arguments)
        assert code == 2, text
        assert words in text
        assert "Traceback" not in text
    (capsule / "batch.safetensors").write_bytes(b"short")
    code, text = command("replay", capsule, "--entry", "entry_of_cli:build")
    assert (code, "batch.safetensors is not as it was written: it has 5 bytes" in text) == (2, True), text


def test_the_help_needs_no_torch() -> None:
    code = (
        "import sys; from bifusion_diag.cli.app import app; app(['replay', '--help'], standalone_mode=False);"
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
