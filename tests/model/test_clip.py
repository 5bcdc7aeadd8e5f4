"""The CLIP tower: frozen, equal to open_clip's own forward, and honest about its weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bifusion_diag.config.settings import ClipSettings
from bifusion_diag.errors import UserError
from bifusion_diag.model import clip as clip_module
from bifusion_diag.model.clip import ClipVisual

NARROW = ClipSettings(width=32, heads=2)


@pytest.fixture
def narrow() -> ClipVisual:
    return ClipVisual(NARROW)


@pytest.fixture
def small_architecture(monkeypatch: pytest.MonkeyPatch) -> ClipSettings:
    """An architecture small enough to store and load in a test, known to open_clip under its own name."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    }
    config["text_cfg"] = {"layers": 1, "width": 32, "heads": 2, "vocab_size": 8, "context_length": 4}
    known = open_clip.get_model_config
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: dict(config) if name == "tiny" else known(name))
    return ClipSettings(architecture="tiny", width=32, heads=2)


def stored_clip() -> open_clip.CLIP:
    config = open_clip.get_model_config("tiny")
    return open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])


def test_full_tower_has_the_documented_size() -> None:
    with torch.device("meta"):  # counting needs no numbers
        tower = clip_module._tower(clip_module._architecture(ClipSettings()), quick_gelu=False)
    assert sum(p.numel() for p in tower.parameters()) == 86_192_640
    assert tower.grid_size == (14, 14)


def test_tokens_equal_open_clips_own_forward(narrow: ClipVisual) -> None:
    images = torch.randint(0, 256, (2, 3, 3, 30, 40), dtype=torch.uint8)
    found = narrow(images)
    assert found.tokens.shape == (6, 32, 14, 14)
    assert found.pooled.shape == (6, 32)
    tower = narrow.visual
    tower.output_tokens = True
    projected, tokens = tower(narrow.prepare(images))
    torch.testing.assert_close(found.tokens, tokens.transpose(1, 2).reshape(6, 32, 14, 14))
    torch.testing.assert_close(found.pooled @ tower.proj, projected)


def test_whole_frame_is_resized_and_normalised_as_clip_expects(narrow: ClipVisual) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    images = torch.from_numpy(frame).permute(2, 0, 1)[None, None]
    resized = np.asarray(Image.fromarray(frame).resize((224, 224), Image.Resampling.BILINEAR), dtype=np.float64) / 255
    want = (resized - np.array(open_clip.OPENAI_DATASET_MEAN)) / np.array(open_clip.OPENAI_DATASET_STD)
    # Pillow rounds to whole grey levels: half a level is 0.002 / 0.26
    np.testing.assert_allclose(narrow.prepare(images)[0].permute(1, 2, 0).numpy(), want, atol=0.016)


def test_tower_is_frozen_and_always_in_eval_mode(narrow: ClipVisual) -> None:
    narrow.train()
    assert not any(module.training for module in narrow.modules())
    assert not any(p.requires_grad for p in narrow.parameters())
    images = torch.zeros(1, 1, 3, 16, 16, dtype=torch.uint8)
    assert not narrow(images).tokens.requires_grad
    narrow.visual.ln_post.weight.requires_grad_()
    assert narrow(images).tokens.requires_grad
    assert narrow.provenance == "random"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole CLIP", "visual tower"])
def test_local_file_gives_its_weights(small_architecture: ClipSettings, suffix: str, whole: bool) -> None:
    source = stored_clip()
    state = (source if whole else source.visual).state_dict()
    path = Path("weights" + suffix)
    if suffix == ".pt":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    else:
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    loaded = ClipVisual(small_architecture.model_copy(update={"weights": str(path)}))
    for name, value in source.visual.state_dict().items():
        assert torch.equal(loaded.visual.state_dict()[name], value), name
    assert loaded.provenance.startswith(f"weights{suffix} (sha256 ")


def test_file_that_does_not_fit_names_the_keys(small_architecture: ClipSettings) -> None:
    state = {name: value.contiguous() for name, value in stored_clip().visual.state_dict().items()}
    state["stray"] = state.pop("proj")
    state["conv1.weight"] = torch.zeros(32, 3, 4, 4)
    save_file(state, "bad.safetensors")
    with pytest.raises(UserError) as caught:
        ClipVisual(small_architecture.model_copy(update={"weights": "bad.safetensors"}))
    message = str(caught.value)
    assert "missing: proj" in message
    assert "unexpected: stray" in message
    assert "conv1.weight (32, 3, 4, 4) instead of (32, 3, 8, 8)" in message


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pt"])
def test_unreadable_file_is_named(small_architecture: ClipSettings, name: str) -> None:
    Path(name).write_bytes(b"not weights")
    with pytest.raises(UserError, match=f"{name} is not a readable"):
        ClipVisual(small_architecture.model_copy(update={"weights": name}))


def test_file_without_tensors_is_named(small_architecture: ClipSettings) -> None:
    torch.save({"epoch": 3}, "empty.pt")
    with pytest.raises(UserError, match=r"empty\.pt holds no state dict"):
        ClipVisual(small_architecture.model_copy(update={"weights": "empty.pt"}))


def test_unknown_weights_and_architecture_list_near_matches() -> None:
    with pytest.raises(UserError, match="Did you mean 'openai'"):
        ClipVisual(ClipSettings(weights="openia"))
    with pytest.raises(UserError, match="Did you mean 'ViT-B-16'"):
        ClipVisual(ClipSettings(architecture="ViT-B16"))
    with pytest.raises(UserError, match="not a plain transformer"):
        ClipVisual(ClipSettings(architecture="RN50"))
    with pytest.raises(UserError, match="not a multiple of heads"):
        ClipVisual(ClipSettings(width=100, heads=12))


def test_narrow_tower_takes_random_weights_only() -> None:
    with pytest.raises(UserError, match="ViT-B-16 has width 768 with 12 heads"):
        ClipVisual(NARROW.model_copy(update={"weights": "openai"}))


def test_failed_download_says_so(small_architecture: ClipSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(cfg: dict) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: ["openai"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: {"hf_hub": "x/"})
    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(UserError, match=r"download of 'openai' for tiny failed \(OSError: no route to host\)"):
        ClipVisual(small_architecture.model_copy(update={"weights": "openai"}))


def test_published_weights_are_loaded_with_their_activation(
    small_architecture: ClipSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = stored_clip()
    save_file({name: value.contiguous() for name, value in source.state_dict().items()}, "published.safetensors")
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: ["openai"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: {"quick_gelu": True})
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: "published.safetensors")
    loaded = ClipVisual(small_architecture.model_copy(update={"weights": "openai"}))
    assert loaded.provenance == "openai"
    assert torch.equal(loaded.visual.proj, source.visual.proj)
    activation = loaded.visual.transformer.resblocks[0].mlp.gelu
    torch.testing.assert_close(activation(torch.tensor(1.3)), 1.3 * torch.tensor(1.702 * 1.3).sigmoid())
