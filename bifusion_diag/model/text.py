"""Text features of classes, for text queries: CLIP's text tower (Radford et al., ICML 2021), used once and let go."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import open_clip
import torch
from open_clip.transformer import text_global_pool
from torch import Tensor
from torch.nn import functional as F

from bifusion_diag.config.settings import ClipSettings
from bifusion_diag.model.clip_weights import architecture, build_text, text_width
from bifusion_diag.model.feature_cache import FeatureCache, raw_bytes
from bifusion_diag.model.randomness import own_random_numbers

#: CLIP's "a photo of a {label}." (section 3.1.4) with the "in a scene" that OpenScene (Peng et al., CVPR 2023) puts
#: after ScanNet's class names.
TEMPLATE = "a photo of a {} in a scene."
_CHUNK = 64  # prompts at a time, to bound memory


def class_text_features(settings: ClipSettings, names: Sequence[str]) -> tuple[Tensor, str]:
    """Features of classes by their names: text that says "a photo of a ... in a scene.", as CLIP sees it.

    Random text towers draw from a generator of their own: text queries leave all other random numbers as they are.

    Args:
        settings: architecture, weights and width; the text tower is as many times narrower as the visual one.
        names: K class names.

    Returns:
        (K, E) float32, L2-normalised, E = 512 for ViT-B/16 at full width; and where the weights are from. While models
        are built on the device 'meta', to be counted, nothing is computed.

    Raises:
        UserError: as :func:`build_text`; a cache folder that cannot be written to.
    """
    shape = (len(names), text_width(settings))
    if torch.get_default_device().type == "meta":
        return torch.empty(shape), settings.weights
    with own_random_numbers("CLIP's text tower"), torch.no_grad():
        clip, provenance = build_text(settings)
        clip.eval().requires_grad_(False)
        tokens = tokenize(settings, names)
        cache = FeatureCache(0, settings.cache_folder)
        key = _key(clip, tokens) if cache.active else ""
        features = cache.fetch(key, shape, torch.float32, torch.device("cpu"), lambda: encode_text(clip, tokens))
    return features, provenance


def tokenize(settings: ClipSettings, names: Sequence[str]) -> Tensor:
    """The prompts of classes as token ids (K, context length), 0 after the end-of-text token."""
    length = architecture(settings)["text_cfg"].get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    tokens: Tensor = open_clip.SimpleTokenizer(context_length=length)([TEMPLATE.format(name) for name in names])
    return tokens


def encode_text(clip: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """Features (K, E) of token ids (K, L), L2-normalised; equal to open_clip's own ``encode_text``.

    The feature is the end-of-text token's, and under the causal mask no token sees those after it: the padding that
    every prompt has is left out.
    """
    mask = clip.attn_mask
    prunable = mask is not None and clip.text_pool_type == "argmax"  # end-of-text has the highest id
    used = int(tokens.argmax(1).max()) + 1 if prunable else tokens.shape[1]
    features = []
    for chunk in tokens[:, :used].split(_CHUNK):
        x = clip.token_embedding(chunk) + clip.positional_embedding[:used]
        x = clip.ln_final(clip.transformer(x, attn_mask=None if mask is None else mask[:used, :used]))
        x = text_global_pool(x, chunk, clip.text_pool_type, eos_token_id=clip.text_eos_id)
        projection = clip.text_projection
        x = projection(x) if isinstance(projection, torch.nn.Linear) else x @ projection
        features.append(F.normalize(x.float(), dim=1))
    return torch.cat(features)


def _key(clip: open_clip.CLIP, tokens: Tensor) -> str:
    """Names the weights, the prompts, and where they are computed."""
    sha = hashlib.sha256(repr(clip.transformer).encode())
    machine = (torch.__version__, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability())
    sha.update(repr((clip.transformer.resblocks[0].attn.num_heads, *machine)).encode())
    for name, weight in clip.state_dict().items():
        if not name.startswith("visual.") and weight.dim():
            sha.update(name.encode())
            sha.update(raw_bytes(weight).data)
    sha.update(raw_bytes(tokens).data)
    return sha.hexdigest()
