"""The CLIP tower: frozen, equal to open_clip's own forward, and honest about its weights."""

from __future__ import annotations

from copy import deepcopy as copied
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bifusion_diag.config.settings import ClipSettings
from bifusion_diag.errors import UserError
from bifusion_diag.model.clip import ClipVisual
from bifusion_diag.model.clip_weights import build_visual
from bifusion_diag.model.outputs import ClipTokens

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
        tower = build_visual(ClipSettings())[0]
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


class Passes:
    """Counts how often the tower really computes an image."""

    def __init__(self, clip: ClipVisual) -> None:
        self.count = 0
        clip.visual.conv1.register_forward_hook(self._add)

    def _add(self, *_: object) -> None:
        self.count += 1


def some_images(views: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, views, 3, 30, 40), dtype=torch.uint8, generator=generator)


def tower(settings: ClipSettings = NARROW, **changes: object) -> ClipVisual:
    torch.manual_seed(0)
    return ClipVisual(settings.model_copy(update=changes))


def assert_equal(one: ClipTokens, other: ClipTokens) -> None:
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.pooled, other.pooled)


def test_the_images_beside_an_image_change_no_bit_of_its_tokens() -> None:
    clip, images = tower(cache_memory=0.0), some_images(5)
    together = clip(images)
    for view in range(5):
        alone = clip(images[:, view : view + 1])
        assert torch.equal(alone.tokens[0], together.tokens[view])
        assert torch.equal(alone.pooled[0], together.pooled[view])


def test_kept_tokens_are_the_computed_ones_to_the_bit_and_computed_once() -> None:
    plain, clip, images = tower(cache_memory=0.0), tower(), some_images()
    passes, plain_passes = Passes(clip), Passes(plain)
    for _ in range(3):
        assert_equal(clip(images), plain(images))
    assert (passes.count, plain_passes.count) == (3, 9)
    assert_equal(clip(images.flip(1)[:, :2]), plain(images.flip(1)[:, :2]))
    assert passes.count == 3


def test_images_that_differ_in_shape_alone_are_not_taken_for_one_another() -> None:
    clip, images = tower(), some_images(1)
    turned = images.reshape(1, 1, 3, 40, 30)
    assert not torch.equal(clip(images).tokens, clip(turned).tokens)
    assert_equal(clip(turned), tower(cache_memory=0.0)(turned))


def test_nobody_can_change_what_is_kept() -> None:
    clip, images = tower(), some_images(1)  # one image: nothing to concatenate
    first = clip(images)
    kept = ClipTokens(first.tokens.clone(), first.pooled.clone())
    for _ in range(2):
        found = clip(images)
        assert_equal(found, kept)
        found.tokens.fill_(torch.nan)
        found.pooled.fill_(torch.nan)


@pytest.mark.parametrize("folder", [None, "kept"])
def test_new_weights_make_new_tokens(folder: str | None) -> None:
    clip, images = tower(cache_folder=folder), some_images()
    before = clip(images)
    with torch.no_grad():
        clip.visual.transformer.resblocks[3].mlp.c_fc.weight.mul_(1.5)
    changed = clip(images)
    assert not torch.equal(changed.tokens, before.tokens)
    clip.load_state_dict(tower().state_dict())
    assert_equal(clip(images), before)


def test_a_folder_serves_later_runs_of_the_same_tower_alone() -> None:
    images = some_images()
    first = tower(cache_folder="kept")(images)
    again = tower(cache_folder="kept")
    passes = Passes(again)
    assert_equal(again(images), first)
    assert passes.count == 1  # the test image that stands for the machine
    torch.manual_seed(1)
    other_weights = ClipVisual(NARROW.model_copy(update={"cache_folder": "kept"}))
    other_heads = tower(NARROW.model_copy(update={"heads": 4}), cache_folder="kept")
    for other in (other_weights, other_heads):
        passes = Passes(other)
        assert not torch.equal(other(images).tokens, first.tokens)
        assert passes.count == 4


def test_a_machine_that_computes_other_bits_has_other_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    images = some_images()
    first = tower(cache_folder="kept")(images)
    elsewhere = tower(cache_folder="kept")
    epsilon = 1 + 2**-23
    elsewhere.visual.ln_post.register_forward_hook(lambda module, inputs, output: output * epsilon)
    passes = Passes(elsewhere)
    assert not torch.equal(elsewhere(images).tokens, first.tokens)
    assert passes.count == 4


def test_weights_that_the_test_image_does_not_tell_apart_have_entries_of_their_own() -> None:
    def blind(clip: ClipVisual) -> Passes:
        passes = Passes(clip)
        clip.visual.ln_post.register_forward_hook(lambda *io: io[2] if passes.count > 1 else torch.zeros_like(io[2]))
        return passes

    images = some_images()
    counts, tokens = [], []
    for scale in (1.0, 1.0, 1.5):
        clip = tower(cache_folder="kept")
        with torch.no_grad():
            clip.visual.transformer.resblocks[3].mlp.c_fc.weight.mul_(scale)
        passes = blind(clip)
        tokens.append(clip(images).tokens)
        counts.append(passes.count)
    assert counts == [4, 1, 4]
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])


def test_tokens_kept_in_inference_mode_serve_training() -> None:
    clip, images = tower(tune="blocks", tune_blocks=1), some_images()
    with torch.inference_mode():
        clip(images)
    clip(images).tokens.sum().backward()
    assert clip.visual.ln_post.bias.grad is not None


def test_a_copy_of_the_model_has_a_memory_of_its_own() -> None:
    clip, images = tower(), some_images()
    first = clip(images)
    copy = copied(clip)
    passes = Passes(copy)
    assert_equal(copy(images), first)
    assert passes.count == 3
