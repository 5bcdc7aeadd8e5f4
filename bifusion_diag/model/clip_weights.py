"""CLIP's two towers with their weights: random ones, a local file's, or those that open_clip publishes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from bifusion_diag.config.settings import ClipSettings
from bifusion_diag.errors import UserError, near_matches
from bifusion_diag.model.weight_files import file_digest, listed, read_tensors

RANDOM = "random"
_SETTING = "model.clip.weights"
# open_clip.CLIP holds both towers. Where only one is wanted, the other is made as small as it gets.
_NO_TEXT = {"layers": 1, "width": 64, "heads": 1, "vocab_size": 8, "context_length": 4}
_NO_VISION = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 32, "image_size": 32}


def build_visual(settings: ClipSettings) -> tuple[VisionTransformer, str]:
    """The visual tower and where its weights are from: ``random``, an open_clip tag, or a file's name with the start of
    its SHA-256.

    Raises:
        UserError: unknown architecture or weights, a download that failed, a file that does not fit the tower.
    """
    config = architecture(settings)
    path = _local_file(settings)
    if path is None and settings.weights != RANDOM:
        return _download(settings).visual, settings.weights
    tower = _assemble(config, text=_NO_TEXT).visual
    if path is None:
        return tower, RANDOM
    stored = read_tensors(path, _SETTING)
    visual = {name.removeprefix("visual."): value for name, value in stored.items() if name.startswith("visual.")}
    _load(tower, visual or stored, path, "visual tower")
    return tower, _named(path)


def build_text(settings: ClipSettings) -> tuple[open_clip.CLIP, str]:
    """The text tower, within a CLIP whose visual tower is a stub, and where its weights are from.

    It is as many times narrower than the architecture's own as the visual tower is; its heads keep their width.

    Raises:
        UserError: as :func:`build_visual`; a file that holds no text tower, a text tower that is not CLIP's own.
    """
    config = architecture(settings)
    if any(key.startswith("hf_") for key in config["text_cfg"]):
        raise UserError(
            f"model.clip.architecture: the text tower of {settings.architecture!r} is not CLIP's own transformer; text "
            "queries take an architecture such as 'ViT-B-16'."
        )
    path = _local_file(settings)
    if path is None and settings.weights != RANDOM:
        return _download(settings), settings.weights
    clip = _assemble(config, vision=_NO_VISION)
    if path is None:
        return clip, RANDOM
    own = [name for name in clip.state_dict() if not _is_no_text(name)]
    stored = {name.removeprefix("text."): value for name, value in read_tensors(path, _SETTING).items()}
    if "token_embedding.weight" not in stored:
        raise UserError(
            f"{_SETTING}: {path} holds the visual tower alone; text queries need both towers of CLIP. Give a file of "
            "the whole model, or switch text queries off."
        )
    _load(clip, {name: value for name, value in stored.items() if not _is_no_text(name)}, path, "text tower", own)
    return clip, _named(path)


def architecture(settings: ClipSettings) -> dict[str, Any]:
    """open_clip's configuration of the architecture, with the width and heads that were asked for.

    Raises:
        UserError: open_clip has no such model, or not one with a plain transformer.
    """
    config = open_clip.get_model_config(settings.architecture)
    if config is None:
        raise UserError(
            f"model.clip.architecture: open_clip has no model {settings.architecture!r}."
            + near_matches(settings.architecture, open_clip.list_models())
        )
    vision, text = config["vision_cfg"], config["text_cfg"]
    if not isinstance(vision.get("layers"), int) or "width" not in vision or vision.get("attentional_pool"):
        raise UserError(
            f"model.clip.architecture: the visual tower of {settings.architecture!r} is not a plain transformer, "
            "whose grid of tokens BiFusion reads; take a ViT such as 'ViT-B-16'."
        )
    if settings.width % settings.heads:
        raise UserError(f"model.clip: width {settings.width} is not a multiple of heads {settings.heads}.")
    narrow = {**vision, "width": settings.width, "head_width": settings.width // settings.heads}
    config = {**config, "vision_cfg": narrow}
    if settings.width != vision["width"] and "width" in text:
        heads = max(1, text["heads"] * settings.width // vision["width"])
        config["text_cfg"] = {**text, "heads": heads, "width": heads * (text["width"] // text["heads"])}
        config["text_embed_dim"] = max(1, config["embed_dim"] * settings.width // vision["width"])
    return config


def text_width(settings: ClipSettings) -> int:
    """Length of a text feature: 512 in ViT-B/16, and as many times less as the tower is narrower."""
    config = architecture(settings)
    width: int = config.get("text_embed_dim", config["embed_dim"])
    return width


def _local_file(settings: ClipSettings) -> Path | None:
    """The file that the weights are in, None where they are not in one. Stored weights must have the tower's size."""
    if settings.weights == RANDOM:
        return None
    vision = open_clip.get_model_config(settings.architecture)["vision_cfg"]
    width = vision["width"]
    heads = width // vision.get("head_width", open_clip.CLIPVisionCfg.head_width)
    if (settings.width, settings.heads) != (width, heads):
        raise UserError(
            f"{_SETTING}: {settings.weights!r} cannot be loaded into a tower of width {settings.width} with "
            f"{settings.heads} heads; {settings.architecture} has width {width} with {heads} heads. "
            "Use weights 'random', or clip.width and clip.heads of the architecture (--scale full)."
        )
    path = Path(settings.weights)
    return path if path.is_file() else None


def _assemble(
    config: dict[str, Any], *, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None
) -> open_clip.CLIP:
    """A CLIP of random weights, one of whose towers may be a stub."""
    width = config["embed_dim"] if vision is None else config.get("text_embed_dim", config["embed_dim"])
    return open_clip.CLIP(
        width, vision or config["vision_cfg"], text or config["text_cfg"], quick_gelu=config.get("quick_gelu", False)
    )


def _download(settings: ClipSettings) -> open_clip.CLIP:
    """One of open_clip's published models."""
    name, tag = settings.architecture, settings.weights
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        raise UserError(
            f"{_SETTING}: {tag!r} is neither 'random', nor an existing file, nor a pretrained tag of {name}."
            + near_matches(tag, [RANDOM, *tags])
        )
    published = open_clip.get_pretrained_cfg(name, tag)
    try:
        checkpoint = open_clip.download_pretrained(published)
    except Exception as error:  # whichever of urllib's, huggingface_hub's or its HTTP client's errors it is
        raise UserError(
            f"{_SETTING}: the download of {tag!r} for {name} failed ({type(error).__name__}: {error}). "
            "Give a local file instead, or 'random'."
        ) from error
    clip = _assemble(architecture(settings) | {"quick_gelu": published.get("quick_gelu", False)})
    open_clip.load_checkpoint(clip, checkpoint)
    return clip


def _load(
    module: nn.Module, weights: Mapping[str, Tensor], path: Path, what: str, names: Iterable[str] | None = None
) -> None:
    """Load the weights of these names, by default of all; name every one that does not fit."""
    state = module.state_dict()
    own = {name: state[name] for name in (state if names is None else names)}
    problems = {
        "missing": [name for name in own if name not in weights],
        "unexpected": [name for name in weights if name not in own],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own
            if name in weights and weights[name].shape != own[name].shape
        ],
    }
    found = [f"{kind}: {listed(names)}" for kind, names in problems.items() if names]
    if found:
        raise UserError(f"{_SETTING}: {path} does not fit the {what}; " + "; ".join(found) + ".")
    module.load_state_dict(weights, strict=names is None)


def _is_no_text(name: str) -> bool:
    """Whether an entry of a CLIP is of the visual tower, or a number that neither tower needs."""
    others = ("logit_scale", "logit_bias", "input_resolution", "context_length", "vocab_size", "attn_mask")
    return name.startswith("visual.") or name in others


def _named(path: Path) -> str:
    return f"{path.name} (sha256 {file_digest(path)[:12]})"
