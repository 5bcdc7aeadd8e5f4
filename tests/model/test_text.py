"""Text features: open_clip's own, computed once, and without a trace in the other random numbers."""

from __future__ import annotations

from copy import deepcopy

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from bifusion_diag.config import load_settings
from bifusion_diag.config.settings import ClipSettings
from bifusion_diag.data.scannet200 import CLASS_NAMES
from bifusion_diag.errors import UserError
from bifusion_diag.model import text as text_module
from bifusion_diag.model.build import build_model
from bifusion_diag.model.clip_weights import build_text
from bifusion_diag.model.text import class_text_features, encode_text, tokenize

NAMES = ("chair", "fire extinguisher", "tv", "bathroom stall door")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> ClipSettings:
    """An architecture small enough to build and store in a test, known to open_clip under its own name."""
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 16, "patch_size": 16},
        "text_cfg": {"layers": 2, "width": 32, "heads": 4, "vocab_size": 49408, "context_length": 77},
    }
    known = open_clip.get_model_config
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: deepcopy(config) if name == "tiny" else known(name))
    return ClipSettings(architecture="tiny", width=64, heads=4)


def own_features(clip: open_clip.CLIP, names: tuple[str, ...] = NAMES) -> torch.Tensor:
    """As open_clip computes them: every prompt padded to 77 tokens."""
    tokens = open_clip.get_tokenizer("ViT-B-16")([f"a photo of a {name} in a scene." for name in names])
    assert tokens.shape == (len(names), 77)
    with torch.no_grad():
        return clip.eval().encode_text(tokens, normalize=True)


def whole_clip(seed: int = 3) -> open_clip.CLIP:
    torch.manual_seed(seed)
    config = open_clip.get_model_config("tiny")
    return open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])


def stored(clip: open_clip.CLIP, path: str) -> str:
    save_file({name: value.contiguous() for name, value in clip.state_dict().items()}, path)
    return path


def test_features_without_the_padding_are_open_clips_own(tiny: ClipSettings) -> None:
    clip, _ = build_text(tiny)
    clip.eval()
    with torch.no_grad():
        found = encode_text(clip, tokenize(tiny, NAMES))
    torch.testing.assert_close(found, own_features(clip), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(NAMES)))
    assert (found @ found.T).fill_diagonal_(0).max() < 0.999  # the names are told apart


def test_only_the_padding_is_left_out(tiny: ClipSettings) -> None:
    clip, _ = build_text(tiny)
    lengths: list[int] = []
    clip.transformer.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    names = ("chair", "chair!")  # "!" is token 0, as the padding is
    with torch.no_grad():
        found = encode_text(clip.eval(), tokenize(tiny, names))
    assert lengths == [12]  # start, a, photo, of, a, chair, !, in, a, scene, ., end
    torch.testing.assert_close(found, own_features(clip, names), rtol=0, atol=1e-6)


def test_many_classes_go_through_in_parts(tiny: ClipSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = class_text_features(tiny, NAMES)
    monkeypatch.setattr(text_module, "_CHUNK", 3)
    torch.testing.assert_close(class_text_features(tiny, NAMES)[0], whole, rtol=0, atol=1e-6)


def test_random_towers_repeat_by_seed_and_leave_the_other_random_numbers_as_they_are(tiny: ClipSettings) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, provenance = class_text_features(tiny, NAMES)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)  # where in the run they are asked for makes no difference
    second, _ = class_text_features(tiny, NAMES)
    assert torch.equal(first, second)
    assert (first.shape, first.dtype, first.requires_grad, provenance) == ((4, 24), torch.float32, False, "random")
    torch.manual_seed(6)
    assert not torch.equal(class_text_features(tiny, NAMES)[0], first)


@pytest.mark.parametrize("prefix", ["", "text."])
def test_a_local_file_of_both_towers_gives_its_features(tiny: ClipSettings, prefix: str) -> None:
    clip = whole_clip()
    if prefix:
        state = {n: v for n, v in clip.state_dict().items() if not n.startswith("visual.") and n != "logit_scale"}
        state = {prefix + name: value for name, value in state.items()}
        state |= {n: v for n, v in clip.state_dict().items() if n.startswith("visual.") or n == "logit_scale"}
        save_file({name: value.contiguous() for name, value in state.items()}, "both.safetensors")
    else:
        stored(clip, "both.safetensors")
    settings = tiny.model_copy(update={"weights": "both.safetensors"})
    torch.manual_seed(5)
    before = torch.get_rng_state()
    features, provenance = class_text_features(settings, NAMES)
    torch.testing.assert_close(features, own_features(clip), rtol=0, atol=1e-6)
    assert provenance.startswith("both.safetensors (sha256 ")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_file_of_the_visual_tower_alone_is_an_error_that_says_so(tiny: ClipSettings) -> None:
    state = whole_clip().visual.state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, "visual.safetensors")
    with pytest.raises(UserError, match=r"visual\.safetensors holds the visual tower alone; text queries need both"):
        class_text_features(tiny.model_copy(update={"weights": "visual.safetensors"}), NAMES)


def test_a_file_of_another_text_tower_names_the_keys(tiny: ClipSettings) -> None:
    clip = whole_clip()
    clip.text_projection = torch.nn.Parameter(torch.zeros(32, 25))
    stored(clip, "other.safetensors")
    with pytest.raises(UserError, match=r"does not fit the text tower.*text_projection \(32, 25\) instead of \(32, 24"):
        class_text_features(tiny.model_copy(update={"weights": "other.safetensors"}), NAMES)


def test_published_weights_serve_the_text_as_well(tiny: ClipSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = whole_clip()
    stored(clip, "published.safetensors")
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: ["laion2b_s34b_b88k"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: {})
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: "published.safetensors")
    features, provenance = class_text_features(tiny.model_copy(update={"weights": "laion2b_s34b_b88k"}), NAMES)
    torch.testing.assert_close(features, own_features(clip), rtol=0, atol=1e-6)
    assert provenance == "laion2b_s34b_b88k"


def test_another_kind_of_text_tower_is_an_error() -> None:
    with pytest.raises(UserError, match="not CLIP's own transformer"):
        class_text_features(ClipSettings(architecture="roberta-ViT-B-32", width=768, heads=12), NAMES)


def test_the_folder_keeps_them_by_weights_and_names(tiny: ClipSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []

    def counted(clip: open_clip.CLIP, tokens: torch.Tensor) -> torch.Tensor:
        computed.append(len(tokens))
        return encode_text(clip, tokens)

    monkeypatch.setattr(text_module, "encode_text", counted)
    settings = tiny.model_copy(update={"cache_folder": "kept"})
    torch.manual_seed(0)
    first, again = class_text_features(settings, NAMES)[0], class_text_features(settings, NAMES)[0]
    assert torch.equal(first, again)
    class_text_features(settings, NAMES[:3])
    torch.manual_seed(1)
    class_text_features(settings, NAMES)
    assert computed == [4, 3, 4]


def test_at_small_scale_the_text_tower_is_a_quarter_wide() -> None:
    clip, _ = build_text(ClipSettings(width=192, heads=3))
    assert clip.transformer.width == 128
    assert clip.transformer.resblocks[0].attn.num_heads == 2
    assert class_text_features(ClipSettings(width=192, heads=3), NAMES)[0].shape == (4, 128)


def test_counting_computes_nothing() -> None:
    with torch.device("meta"):
        features, _ = class_text_features(ClipSettings(), CLASS_NAMES)
    assert (features.shape, features.device.type) == ((200, 512), "meta")


def test_text_queries_and_low_rank_updates_leave_all_other_random_weights_as_they_are() -> None:
    states = []
    for overrides in ((), ("model.decoder.text_queries=true", "model.clip.tune=lora")):
        torch.manual_seed(0)
        states.append(build_model(load_settings("bifusion", scale="small", overrides=overrides)).state_dict())
    plain, both = (
        {name.replace("parametrizations.", "").replace(".original", ""): v for name, v in state.items()}
        for state in states
    )
    assert plain.keys() < both.keys()
    assert [name for name in plain if not torch.equal(plain[name], both[name])] == []
