"""The 2D branch: the visual tower of CLIP (Radford et al., ICML 2021), as open_clip builds it.

Legend: B scenes · V views a scene · D width of the tower · h, w grid of patches · T tokens of an image, 1 + h·w.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from bifusion_diag.config.settings import ClipSettings
from bifusion_diag.model.clip_tuning import tune
from bifusion_diag.model.clip_weights import build_visual
from bifusion_diag.model.feature_cache import FeatureCache, raw_bytes
from bifusion_diag.model.outputs import ClipTokens


class ClipVisual(nn.Module):
    """CLIP's visual tower, always in eval mode. Frozen, but for what the settings let learn.

    Its parts, from the embedding to the final LayerNorm, are a frozen prefix and a tail that learns: the tail begins at
    the first part with a parameter that requires a gradient at the moment. What the prefix makes of an image never
    changes, so it is computed once and kept (:class:`FeatureCache`); it runs without gradient. Where nothing learns,
    which is the default, the prefix is the whole tower.

    Images are computed one by one: what stands beside an image in its batch must not change a bit of its tokens, for a
    cache, a resumed run and a replayed step would then differ from the first.

    Args:
        settings: architecture, weights, width and heads of the tower, what learns, and the cache.

    Attributes:
        provenance: which weights these are: ``random``, an open_clip tag, or a file's name with the start of its
            SHA-256.
        cache: the tokens that are kept.

    Raises:
        UserError: unknown architecture or weights, a download that failed, a file that does not fit the tower, more
            blocks to tune than there are, a cache folder that cannot be written to.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, settings: ClipSettings) -> None:
        super().__init__()
        self.visual, self.provenance = build_visual(settings)
        self.width = settings.width
        self.register_buffer("mean", torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1), persistent=False)
        tune(self.visual, settings)
        self.eval()
        self.cache = FeatureCache(settings.cache_memory, settings.cache_folder)
        self._known: tuple[Any, ...] = ()  # what the cache's tensors were computed with
        self._digest = b""  # of the same, for the folder

    def train(self, mode: bool = True) -> ClipVisual:
        """Stay in eval mode: what is frozen has no training behaviour, and what learns shall have none either."""
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
        parts = _parts(self.visual)
        learns = [any(p.requires_grad for p in part.parameters) for part in parts]
        depth = learns.index(True) if True in learns else len(parts)
        prefix, tail = parts[:depth], parts[depth:]
        with torch.no_grad():
            if self.cache.active:
                self._know(prefix)
            # concatenation copies: nobody gets hold of what the cache keeps
            states = torch.cat([self._frozen(image, prefix) for image in images.flatten(0, 1)]) if prefix else None
        if tail:
            ready = self.prepare(images).split(1) if states is None else states.split(1)
            with parametrize.cached():  # a low-rank update is added once a step, not once an image
                states = torch.cat([_through(tail, one) for one in ready])
        assert states is not None
        height, width = self.visual.grid_size
        grid = states[:, 1:].unflatten(1, (height, width)).permute(0, 3, 1, 2).contiguous()
        return ClipTokens(tokens=grid, pooled=states[:, 0])

    def _frozen(self, image: Tensor, prefix: list[_Part]) -> Tensor:
        """What the frozen parts make of an image (3, H, W): (1, T, D), kept or computed."""

        def compute() -> Tensor:
            return _through(prefix, self.prepare(image[None]))

        if not self.cache.active:
            return compute()
        key = hashlib.sha256(self._digest)
        key.update(f"{image.dtype} {tuple(image.shape)}".encode())
        key.update(raw_bytes(image).data)
        return self.cache.fetch(key.hexdigest(), self._shape(), self._dtype(), image.device, compute)

    def _know(self, prefix: list[_Part]) -> None:
        """See whether anything has changed that the cached tokens depend on: which weights are frozen and what they
        are, where and how the tokens are computed."""
        weights = [p for part in prefix for p in part.parameters]
        known = (
            self.mean.device,
            self._dtype(),
            torch.get_num_threads(),
            torch.get_float32_matmul_precision(),
            *((p.data_ptr(), p._version) for p in weights),
        )
        if known == self._known:
            return
        self.cache.forget()
        if self.cache.folder is not None:
            self._digest = self._digest_of(prefix, weights)
        self._known = known

    def _digest_of(self, prefix: list[_Part], weights: list[nn.Parameter]) -> bytes:
        """Of all that the bits of the prefix's output depend on, but for the image: weights, computation, machine.

        No list of libraries and processors is complete, so the tokens of a test image are taken in, as computed here
        and now: a machine on which they differ by a bit has other keys.
        """
        sha = hashlib.sha256()
        heads = [block.attn.num_heads for block in self.visual.transformer.resblocks]
        facts = (repr(self.visual), heads, len(prefix), self.visual.image_size, self._dtype())
        machine = (torch.__version__, self.mean.device.type, torch.get_num_threads())
        sha.update(repr((*facts, *machine)).encode())
        for tensor in (*weights, self.mean, self.std):
            sha.update(raw_bytes(tensor).data)
        pattern = (torch.arange(3 * 300 * 400, device=self.mean.device) * 97 % 251).to(torch.uint8)
        sha.update(raw_bytes(_through(prefix, self.prepare(pattern.view(1, 3, 300, 400)))).data)
        return sha.digest()

    def _shape(self) -> tuple[int, int, int]:
        height, width = self.visual.grid_size
        return (1, 1 + height * width, self.width)

    def _dtype(self) -> torch.dtype:
        """Of the tokens."""
        kind = self.mean.device.type
        dtype: torch.dtype = self.visual.class_embedding.dtype
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype


class _Part(NamedTuple):
    """A step on the way from the prepared image to the final tokens."""

    run: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]


def _parts(visual: VisionTransformer) -> list[_Part]:
    """The tower's parts in order: the embedding, each block, the final LayerNorm. The projection is not used."""
    embedding = [visual.class_embedding, visual.positional_embedding]
    embedding += [*visual.conv1.parameters(), *visual.ln_pre.parameters()]
    modules = (*visual.transformer.resblocks, visual.ln_post)
    return [_Part(visual._embeds, embedding), *(_Part(module, list(module.parameters())) for module in modules)]


def _through(parts: list[_Part], x: Tensor) -> Tensor:
    for part in parts:
        x = part.run(x)
    return x
