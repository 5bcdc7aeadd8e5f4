"""What other projects' checkpoints hold, listed from reading their sources: names, shapes and order of definition.

Nothing here knows this project's names. ESAM: ``oneformer3d/{mink_unet,geo_aware_pool,query_decoder}.py`` with
``configs/ESAM_CA/ESAM_sv_scannet200_CA.py``. OneFormer3D: the same files, without the pooling, with
``configs/oneformer3d_1xb4_scannet200.py``. Mask3D: ``models/{res16unet,mask3d}.py`` with ``conf/model/mask3d.yaml``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

Entry = tuple[str, tuple[int, ...]]

PLANES_34C = (32, 64, 128, 256, 256, 128, 96, 96)
LAYERS_34C = (2, 3, 4, 6, 2, 2, 2, 2)
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Sizes:
    """Widths of a model; ``small`` is a quarter, as this project's scale."""

    divisor: int = 1

    @property
    def planes(self) -> tuple[int, ...]:
        return tuple(width // self.divisor for width in PLANES_34C)

    @property
    def first(self) -> int:
        return 32 // self.divisor

    @property
    def out(self) -> int:
        return self.planes[-1]

    def of(self, width: int) -> int:
        return width // self.divisor


def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Iterator[Entry]:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def layer_norm(name: str, width: int) -> Iterator[Entry]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def mlp(name: str, inputs: int, hidden: int, outputs: int) -> Iterator[Entry]:
    """Sequential(Linear, ReLU, Linear)."""
    yield from linear(f"{name}.0", inputs, hidden)
    yield from linear(f"{name}.2", hidden, outputs)


def attention(name: str, width: int) -> Iterator[Entry]:
    """torch.nn.MultiheadAttention."""
    yield f"{name}.in_proj_weight", (3 * width, width)
    yield f"{name}.in_proj_bias", (3 * width,)
    yield f"{name}.out_proj.weight", (width, width)
    yield f"{name}.out_proj.bias", (width,)


def minkowski_norm(name: str, width: int) -> Iterator[Entry]:
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.bn.{leaf}", (width,)
    yield f"{name}.bn.num_batches_tracked", ()


def res16unet34c(name: str, sizes: Sizes, final: int | None = None) -> Iterator[Entry]:
    """``final``: outputs of the classifier that OneFormer3D and Mask3D keep, None where it is commented out (ESAM)."""

    def block(stage: str, inputs: int, width: int, count: int) -> Iterator[Entry]:
        for place in range(count):
            before = inputs if place == 0 else width
            yield f"{name}{stage}.{place}.conv1.kernel", (27, before, width)
            yield from minkowski_norm(f"{name}{stage}.{place}.norm1", width)
            yield f"{name}{stage}.{place}.conv2.kernel", (27, width, width)
            yield from minkowski_norm(f"{name}{stage}.{place}.norm2", width)
            if before != width:
                yield f"{name}{stage}.{place}.downsample.0.kernel", (before, width)
                yield from minkowski_norm(f"{name}{stage}.{place}.downsample.1", width)

    planes, width = sizes.planes, sizes.first
    yield f"{name}conv0p1s1.kernel", (125, 3, width)
    yield from minkowski_norm(f"{name}bn0", width)
    for scale in range(4):
        stride = 2**scale
        yield f"{name}conv{scale + 1}p{stride}s2.kernel", (8, width, width)
        yield from minkowski_norm(f"{name}bn{scale + 1}", width)
        yield from block(f"block{scale + 1}", width, planes[scale], LAYERS_34C[scale])
        width = planes[scale]
    skips = (planes[2], planes[1], planes[0], sizes.first)
    for scale in range(4):
        stride = 2 ** (4 - scale)
        yield f"{name}convtr{scale + 4}p{stride}s2.kernel", (8, width, planes[4 + scale])
        yield from minkowski_norm(f"{name}bntr{scale + 4}", planes[4 + scale])
        inputs = planes[4 + scale] + skips[scale]
        yield from block(f"block{scale + 5}", inputs, planes[4 + scale], LAYERS_34C[4 + scale])
        width = planes[4 + scale]
    if final is not None:
        yield f"{name}final.kernel", (planes[7], final)
        yield f"{name}final.bias", (1, final)


def geo_aware_pooling(width: int) -> Iterator[Entry]:
    yield from linear("pool.pts_proj1.0", 3, width)
    yield from layer_norm("pool.pts_proj1.1", width)
    yield from linear("pool.pts_proj1.3", width, width)
    yield from layer_norm("pool.pts_proj1.4", width)
    yield from linear("pool.pts_proj2.0", 2 * width, width)
    yield from layer_norm("pool.pts_proj2.1", width)
    yield from linear("pool.pts_proj2.3", width, 1, bias=False)


def query_decoder(
    sizes: Sizes, *, layers: int, classes: int, points: bool, score: bool = False, box: bool = False
) -> Iterator[Entry]:
    """``points``: ESAM's, which has a second mask head for points. Both have 200 semantic classes."""
    width, hidden, inputs = sizes.of(256), sizes.of(1024), sizes.out
    yield from linear("decoder.input_proj.0", inputs, width)
    yield from layer_norm("decoder.input_proj.1", width)
    yield from mlp("decoder.query_proj", inputs, width, width)
    for layer in range(layers):
        yield from attention(f"decoder.cross_attn_layers.{layer}.attn", width)
        yield from layer_norm(f"decoder.cross_attn_layers.{layer}.norm", width)
    for layer in range(layers):
        yield from attention(f"decoder.self_attn_layers.{layer}.attn", width)
        yield from layer_norm(f"decoder.self_attn_layers.{layer}.norm", width)
    for layer in range(layers):
        yield from linear(f"decoder.ffn_layers.{layer}.net.0", width, hidden)
        yield from linear(f"decoder.ffn_layers.{layer}.net.3", hidden, width)
        yield from layer_norm(f"decoder.ffn_layers.{layer}.norm", width)
    yield from layer_norm("decoder.out_norm", width)
    yield from mlp("decoder.out_cls", width, width, classes + 1)
    if score:
        yield from mlp("decoder.out_score", width, width, 1)
    yield from mlp("decoder.x_mask", inputs, width, width)
    if points:
        yield from mlp("decoder.x_pts_mask", 3 + inputs, width, width)
    if box:
        yield from mlp("decoder.out_reg", width, width, 6)
    yield from linear("decoder.out_sem", width, 201)


def esam(sizes: Sizes, *, score: bool = False, box: bool = False) -> Iterator[Entry]:
    """ESAM_sv_scannet200_CA; with a score and a box head as other configurations of it have them."""
    yield from res16unet34c("backbone.", sizes)
    yield from geo_aware_pooling(sizes.out)
    yield from query_decoder(sizes, layers=3, classes=1, points=True, score=score, box=box)


def oneformer3d(sizes: Sizes) -> Iterator[Entry]:
    """oneformer3d_1xb4_scannet200."""
    yield from res16unet34c("backbone.", sizes, final=sizes.out)
    yield from query_decoder(sizes, layers=6, classes=198, points=False)


def mask3d(sizes: Sizes) -> Iterator[Entry]:
    """Mask3D on ScanNet200, one shared decoder of four scales, as its LightningModule stores it."""
    width, hidden = 128 // sizes.divisor, sizes.of(1024)
    yield from res16unet34c("model.backbone.", sizes, final=200)
    yield "model.mask_features_head.kernel", (sizes.out, width)
    yield "model.mask_features_head.bias", (1, width)
    for layer in (0, 2):
        yield f"model.query_projection.layers.{layer}.weight", (width, width, 1)
        yield f"model.query_projection.layers.{layer}.bias", (width,)
    yield from mlp("model.mask_embed_head", width, width, width)
    yield from linear("model.class_embed_head", width, 201)
    yield "model.pos_enc.gauss_B", (3, width // 2)
    for scale in range(4):
        yield from attention(f"model.cross_attention.0.{scale}.multihead_attn", width)
        yield from layer_norm(f"model.cross_attention.0.{scale}.norm", width)
    for scale in range(4):
        yield from attention(f"model.self_attention.0.{scale}.self_attn", width)
        yield from layer_norm(f"model.self_attention.0.{scale}.norm", width)
    for scale in range(4):
        yield from linear(f"model.ffn_attention.0.{scale}.linear1", width, hidden)
        yield from linear(f"model.ffn_attention.0.{scale}.linear2", hidden, width)
        yield from layer_norm(f"model.ffn_attention.0.{scale}.norm", width)
    for scale, channels in enumerate(sizes.planes[-5:-1]):
        yield from linear(f"model.lin_squeeze.0.{scale}", channels, width)
    yield from layer_norm("model.decoder_norm", width)
    yield "criterion.empty_weight", (201,)


LISTINGS = {"esam": esam, "oneformer3d": oneformer3d, "mask3d": mask3d}


@pytest.fixture(scope="session")
def listing() -> Callable[..., dict[str, tuple[int, ...]]]:
    """Names and shapes of a project's checkpoint: ``listing("esam", divisor=4, box=True)``."""

    def make(project: str, divisor: int = 1, **heads: bool) -> dict[str, tuple[int, ...]]:
        return dict(LISTINGS[project](Sizes(divisor), **heads))

    return make


@pytest.fixture(scope="session")
def checkpoint(listing: Callable[..., dict[str, tuple[int, ...]]]) -> Callable[..., dict[str, Tensor]]:
    """The same with values: random, of a size that keeps activations near 1."""

    def make(project: str, divisor: int = 1, seed: int = 3, **heads: bool) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        state: dict[str, Tensor] = {}
        for name, shape in listing(project, divisor, **heads).items():
            leaf = name.rpartition(".")[2]
            if leaf == "num_batches_tracked":
                state[name] = torch.tensor(17)
            elif leaf == "running_var":
                state[name] = torch.rand(shape, generator=generator) + 0.5
            else:
                fan = max(1, shape[-1] if leaf.endswith("weight") else shape[0] * shape[-2] if len(shape) > 1 else 1)
                state[name] = torch.randn(shape, generator=generator) / fan**0.5
        return state

    return make
