"""CLIP's weights in local files, as open_clip's users have them."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from bifusion_diag.config.settings import ClipSettings
from bifusion_diag.errors import UserError
from bifusion_diag.model.clip import ClipVisual

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"layers": 1, "width": 32, "heads": 2, "vocab_size": 8, "context_length": 4},
}


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> open_clip.CLIP:
    """A CLIP of an architecture small enough for a test, which open_clip knows as "tiny"."""
    known = open_clip.get_model_config
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: dict(CONFIG) if name == "tiny" else known(name))
    return open_clip.CLIP(CONFIG["embed_dim"], CONFIG["vision_cfg"], CONFIG["text_cfg"])


def load(path: str) -> ClipVisual:
    return ClipVisual(ClipSettings(architecture="tiny", width=32, heads=2, weights=path))


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy", "checkpoint"])
@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "DataParallel"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole CLIP", "visual tower"])
def test_every_form_gives_the_visual_towers_weights(
    source: open_clip.CLIP, whole: bool, prefix: str, kind: str
) -> None:
    state = (source if whole else source.visual).state_dict()
    state = {f"{prefix}{name}": value.contiguous() for name, value in state.items()}
    if kind == "safetensors":
        save_file(state, "weights")
    else:
        content = {"epoch": 3, "name": "run", "state_dict": state, "optimizer": {}} if kind == "checkpoint" else state
        torch.save(content, "weights", _use_new_zipfile_serialization=kind != "legacy")
    loaded = load("weights").visual.state_dict()
    assert loaded.keys() == source.visual.state_dict().keys()
    assert [name for name, value in source.visual.state_dict().items() if not torch.equal(loaded[name], value)] == []


def test_a_whole_clip_of_another_size_is_reported(source: open_clip.CLIP) -> None:
    torch.save(
        open_clip.CLIP(16, {**CONFIG["vision_cfg"], "layers": 3, "patch_size": 4}, CONFIG["text_cfg"]).state_dict(),
        "c.pt",
    )
    with pytest.raises(UserError) as caught:
        load("c.pt")
    message = str(caught.value)
    assert message.startswith("model.clip.weights: c.pt does not fit the visual tower; ")
    assert "transformer.resblocks.2.ln_1.weight" in message
    assert "conv1.weight (32, 3, 4, 4) instead of (32, 3, 8, 8)" in message


def test_weights_of_another_library_are_reported(source: open_clip.CLIP) -> None:
    del source
    torch.save({"vision_model.embeddings.class_embedding": torch.zeros(32)}, "transformers.bin")
    with pytest.raises(
        UserError, match=r"missing: class_embedding, .* more; unexpected: vision_model\.embeddings\.class"
    ):
        load("transformers.bin")
    assert Path("transformers.bin").is_file()
