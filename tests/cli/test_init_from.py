"""``--init-from`` on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bifusion_diag.config import load_settings
from bifusion_diag.model.build import build_model

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def backbone() -> Path:
    """A U-Net of the baseline's small size alone, with one tensor missing, one mis-shaped and one too many."""
    state = build_model(load_settings("baseline", scale="small")).encoder.backbone.state_dict()
    del state["bn0.bn.weight"]
    state["bn1.bn.weight"] = torch.ones(3)
    torch.save({"state_dict": state | {"final.kernel": torch.zeros(24, 20)}}, "unet.pth")
    return Path("unet.pth")


def test_params_shows_what_of_a_file_fits(command: Command, backbone: Path) -> None:
    small = ("--model", "baseline", "--set", "scale=small")
    code, text = command("params", *small, "--init-from", backbone)
    assert code == 0, text
    rows = {line.split("  ")[0]: " ".join(line.split()) for line in text.splitlines()}
    assert "unet.pth: Res16UNet" in text
    assert rows["missing"] == "missing 1 encoder.backbone.bn0.bn.weight"
    assert rows["mis-shaped"] == "mis-shaped 1 encoder.backbone.bn1.bn.weight (3,) for (8,)"
    assert rows["unexpected"] == "unexpected 1 final.kernel"
    assert rows["stays fresh"].startswith("stays fresh 91 pool.position.0.weight, ")


@pytest.mark.parametrize("name", ["train", "params"])
def test_a_file_that_does_not_fit_exits_2_and_nothing_is_written(command: Command, name: str, backbone: Path) -> None:
    Path("broken.pth").write_bytes(b"<html>")
    out = ("--out", "run.json", "--steps", "1") if name == "train" else ()
    wide = ("--set", "model.backbone.init_dim=12", "--set", "model.backbone.planes=[12,12,12,12,12,12,12,12]")
    for file, message, extra in (
        ("broken.pth", "broken.pth is not a readable", ()),
        ("none.pth", "there is no such file", ()),
        (backbone, "nothing of unet.pth (Res16UNet) fits this model; of another shape: ", wide),
    ):
        arguments = (name, "--model", "baseline", "--set", "scale=small", *extra, *out, "--init-from", file)
        code, text = command(*arguments)
        assert (code, message in text, "Traceback" in text) == (2, True, False), text
    assert {path.name for path in Path.cwd().iterdir()} == {"broken.pth", "unet.pth"}


def test_a_resumed_run_takes_no_other_weights(command: Command) -> None:
    code, text = command("train", "--resume", "--out", "run.json", "--init-from", "x.pth")
    assert (code, "give nothing else but --out" in text) == (2, True)
