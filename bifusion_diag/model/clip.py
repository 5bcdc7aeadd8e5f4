"""The 2D branch: the frozen visual tower of CLIP (Radford et al., ICML 2021), as open_clip builds it.

Legend: B scenes · V views a scene · D width of the tower · h, w grid of patches.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from bifusion_diag.config.settings import ClipSettings
from bifusion_diag.errors import UserError, near_matches
from bifusion_diag.model.outputs import ClipTokens
from bifusion_diag.model.weight_files import listed, read_tensors

RANDOM = "random"
# open_clip.CLIP holds both towers. Where only the visual one is wanted, its text tower is made as small as it gets.
_NO_TEXT = {"layers": 1, "width": 64, "heads": 1, "vocab_size": 8, "context_length": 4}


class ClipVisual(nn.Module):
    """CLIP's visual tower: frozen, always in eval mode, without gradient unless some of its parameters ask for one.

    Args:
        settings: architecture, weights, and the tower's width and heads.

    Attributes:
        provenance: which weights these are: ``random``, an open_clip tag, or a file's name with the start of its
            SHA-256.

    Raises:
        UserError: unknown architecture or weights, a download that failed, a file that does not fit the tower.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, settings: ClipSettings) -> None:
        super().__init__()
        self.visual, self.provenance = _build(settings)
        self.width = settings.width
        self.register_buffer("mean", torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> ClipVisual:
        """Stay in eval mode: a frozen tower has no training behaviour."""
        return super().train(False)

    def prepare(self, images: Tensor) -> Tensor:
        """Images as the tower takes them.

        The whole frame is resized (not cropped), so that normalised pixel coordinates stay valid on the grid of tokens.

        Args:
            images: (..., 3, H, W) uint8.

        Returns:
            (n, 3, 224, 224) float32, normalised by CLIP's mean and standard deviation.
        """
        pixels = images.flatten(0, -4).to(torch.float32) / 255
        resized = F.interpolate(pixels, self.visual.image_size, mode="bilinear", align_corners=False, antialias=True)
        return (resized - self.mean) / self.std

    def forward(self, images: Tensor) -> ClipTokens:
        """Encode every view.

        Args:
            images: (B, V, 3, H, W) uint8.

        Returns:
            Spatial tokens (B·V, D, h, w) and the class token (B·V, D), both after the tower's final LayerNorm and
            before CLIP's projection to the space shared with text.
        """
        trainable = any(parameter.requires_grad for parameter in self.visual.parameters())
        with torch.set_grad_enabled(trainable and torch.is_grad_enabled()):
            last = self.visual.forward_intermediates(
                self.prepare(images),
                indices=1,
                normalize_intermediates=True,
                intermediates_only=True,
                output_extra_tokens=True,
            )
        return ClipTokens(
            tokens=last["image_intermediates"][0], pooled=last["image_intermediates_prefix"][0].squeeze(1)
        )


def _build(settings: ClipSettings) -> tuple[VisionTransformer, str]:
    """The visual tower with its weights, and their provenance."""
    config = _architecture(settings)
    if settings.weights == RANDOM:
        return _tower(config, quick_gelu=config.get("quick_gelu", False)), RANDOM
    _check_full_size(settings)
    path = Path(settings.weights)
    if path.is_file():
        tower = _tower(config, quick_gelu=config.get("quick_gelu", False))
        _load_file(tower, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return tower, f"{path.name} (sha256 {digest[:12]})"
    return _download(settings), settings.weights


def _architecture(settings: ClipSettings) -> dict[str, Any]:
    """open_clip's configuration of the architecture, with the width and heads that were asked for."""
    config = open_clip.get_model_config(settings.architecture)
    if config is None:
        raise UserError(
            f"model.clip.architecture: open_clip has no model {settings.architecture!r}."
            + near_matches(settings.architecture, open_clip.list_models())
        )
    vision = config["vision_cfg"]
    if not isinstance(vision.get("layers"), int) or "width" not in vision or vision.get("attentional_pool"):
        raise UserError(
            f"model.clip.architecture: the visual tower of {settings.architecture!r} is not a plain transformer, "
            "whose grid of tokens BiFusion reads; take a ViT such as 'ViT-B-16'."
        )
    if settings.width % settings.heads:
        raise UserError(f"model.clip: width {settings.width} is not a multiple of heads {settings.heads}.")
    config["vision_cfg"] = {**vision, "width": settings.width, "head_width": settings.width // settings.heads}
    return config


def _check_full_size(settings: ClipSettings) -> None:
    """Stored weights only fit the architecture's own width and heads."""
    vision = open_clip.get_model_config(settings.architecture)["vision_cfg"]
    width = vision["width"]
    heads = width // vision.get("head_width", open_clip.CLIPVisionCfg.head_width)
    if (settings.width, settings.heads) != (width, heads):
        raise UserError(
            f"model.clip.weights: {settings.weights!r} cannot be loaded into a tower of width {settings.width} with "
            f"{settings.heads} heads; {settings.architecture} has width {width} with {heads} heads. "
            "Use weights 'random', or clip.width and clip.heads of the architecture (--scale full)."
        )


def _tower(config: dict[str, Any], *, quick_gelu: bool) -> VisionTransformer:
    """A visual tower of random weights."""
    clip = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], _NO_TEXT, quick_gelu=quick_gelu)
    return clip.visual


def _download(settings: ClipSettings) -> VisionTransformer:
    """The visual tower of one of open_clip's published models."""
    architecture, tag = settings.architecture, settings.weights
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        raise UserError(
            f"model.clip.weights: {tag!r} is neither 'random', nor an existing file, nor a pretrained tag of "
            f"{architecture}." + near_matches(tag, [RANDOM, *tags])
        )
    published = open_clip.get_pretrained_cfg(architecture, tag)
    try:
        checkpoint = open_clip.download_pretrained(published)
    except Exception as error:  # whichever of urllib's, huggingface_hub's or its HTTP client's errors it is
        raise UserError(
            f"model.clip.weights: the download of {tag!r} for {architecture} failed ({type(error).__name__}: {error}). "
            "Give a local file instead, or 'random'."
        ) from error
    config = open_clip.get_model_config(architecture)
    clip = open_clip.CLIP(
        config["embed_dim"], config["vision_cfg"], config["text_cfg"], quick_gelu=published.get("quick_gelu", False)
    )
    open_clip.load_checkpoint(clip, checkpoint)
    return clip.visual


def _load_file(tower: VisionTransformer, path: Path) -> None:
    """Load a full CLIP state dict, or one of the visual tower alone, from a safetensors or torch file."""
    stored = read_tensors(path, "model.clip.weights")
    visual = {name.removeprefix("visual."): value for name, value in stored.items() if name.startswith("visual.")}
    weights = visual or stored
    own = tower.state_dict()
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
        raise UserError(f"model.clip.weights: {path} does not fit the visual tower; " + "; ".join(found) + ".")
    tower.load_state_dict(weights)
