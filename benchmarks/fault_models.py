"""Three small trainings as users write them, on data that can be learnt: images, sequences, and two modalities fused.

They know nothing of bifusion_diag. Each gives its losses in another way: the loop computes them of the model's output
(images), the model returns a dict of `loss_*` (sequences), or an object with terms, weights and total (fusion).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block with BatchNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(y)))


class Detector(nn.Module):
    """A CNN that says which blob an image shows, and where."""

    def __init__(self, width: int = 16, classes: int = 8) -> None:
        super().__init__()
        self.iteration = 0
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.classifier = nn.Linear(width, classes)
        self.locator = nn.Linear(width * 16, 2)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.blocks(self.stem(image))
        return self.classifier(x.amax((2, 3))), 0.5 + self.locator(F.adaptive_avg_pool2d(x, 4).flatten(1))


class Attention(nn.Module):
    """Causal self-attention over the first `length` tokens of a sequence."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.drop = heads, nn.Dropout(dropout)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = self.scale(q @ k.transpose(-1, -2))
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        padding = torch.arange(tokens)[None, :] >= length[:, None]
        weights = self.softmax(scores.masked_fill(future | padding[:, None, None], float("-inf")))
        return self.drop(self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, width)))

    def scale(self, scores: Tensor) -> Tensor:
        return scores * (self.out.in_features / self.heads) ** -0.5

    def softmax(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)


class Layer(nn.Module):
    """A pre-norm transformer layer; `path_drop` is its chance to be left out in training."""

    def __init__(self, width: int, dropout: float, path_drop: float) -> None:
        super().__init__()
        self.path_drop = path_drop
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, 4, dropout)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        if self.training and self.path_drop and torch.rand(()) < self.path_drop:
            return x
        x = x + self.attention(self.norm1(x), length)
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class LanguageModel(nn.Module):
    """A small causal language model, with a penalty on the logits' size."""

    def __init__(
        self, width: int = 48, words: int = 32, tokens: int = 20, dropout: float = 0.0, path_drop: float = 0.0
    ):
        super().__init__()
        self.iteration = 0
        self.embed = nn.Embedding(words, width)
        self.position = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.layers = nn.ModuleList(Layer(width, dropout, path_drop) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x = self.embed(batch["tokens"]) + self.position[: batch["tokens"].shape[1]]
        for layer in self.layers:
            x = layer(x, batch["length"])
        logits = self.head(self.norm(x))
        nll = F.cross_entropy(logits.transpose(1, 2), batch["target"], reduction="none", ignore_index=-100)
        labelled = batch["target"] >= 0
        return {
            "loss_next": (nll.sum(1) / labelled.sum(1)).mean(),
            "loss_z": 1e-3 * logits.logsumexp(-1).square().mean(),
        }


class Fused(NamedTuple):
    """What the gate gives."""

    fused: Tensor
    alpha: Tensor  # (B, 1)


class Gate(nn.Module):
    """α · image + (1 − α) · points."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.held = False  # at ½
        self.mlp = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, image: Tensor, points: Tensor) -> Fused:
        alpha = image.new_full((len(image), 1), 0.5)
        if not self.held:
            alpha = torch.sigmoid(self.mlp(torch.cat([image, points], 1)))
        return Fused(alpha * image + (1 - alpha) * points, alpha)


class PointEncoder(nn.Module):
    """A PointNet on standardised clouds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.point = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width))
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, points: Tensor) -> Tensor:
        centred = points - points.mean(1, keepdim=True)  # an empty cloud is padded with zeros
        y: Tensor = self.norm(self.out(self.point(centred / centred.std((1, 2), keepdim=True)).amax(1)))
        return y


@dataclass
class Pairs:
    """Images and point clouds of the same objects."""

    image: Tensor  # (B, 3, 16, 16)
    points: Tensor  # (B, P, 3)
    label: Tensor  # (B,)
    size: Tensor  # (B,) of the object
    names: list[str]


@dataclass
class Losses:
    """As many frameworks' criteria return them."""

    total: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, float]


class FusionNet(nn.Module):
    """Two encoders, a gate, three losses."""

    def __init__(self, width: int = 32, classes: int = 6) -> None:
        super().__init__()
        self.iteration = 0
        self.temperature = 0.1
        self.weights = {"class": 1.0, "align": 0.3, "size": 0.5}
        self.image_encoder = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.GroupNorm(4, width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 2, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, width), nn.LayerNorm(width),
        )  # fmt: skip
        self.point_encoder = PointEncoder(width)
        self.gate = Gate(width)
        self.classifier = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))
        self.size_head = nn.Linear(3 + width, 1)

    def forward(self, batch: Pairs) -> Losses:
        image, points = self.image_encoder(batch.image), self.point_encoder(batch.points)
        fused = self.gate(image, points).fused
        similarity = F.normalize(image, dim=1) @ F.normalize(points, dim=1).T / self.temperature
        same = (batch.label[:, None] == batch.label[None]).float()
        spread = batch.points.std(1)
        size = self.size_head(torch.cat([spread, fused], 1))[:, 0]
        terms = {
            "class": F.cross_entropy(self.classifier(fused), batch.label),
            "align": -(same / same.sum(1, keepdim=True) * similarity.log_softmax(1)).sum(1).mean(),
            "size": F.smooth_l1_loss(size, batch.size.log()),
        }
        total = sum((self.weights[name] * term for name, term in terms.items()), start=fused.new_zeros(()))
        return Losses(total, terms, dict(self.weights))


class Task(NamedTuple):
    """A training.

    Attributes:
        model: with an attribute `iteration`, which the loop sets.
        optimizer: of all its parameters.
        batch: step → batch.
        loss: batch → what a step function returns.
        told: the loop tells the Monitor its losses, as no module returns them.
        clip: largest gradient norm.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Callable[[int], Any]
    loss: Callable[[Any], Any]
    told: bool = False
    clip: float = 10.0


def images(seed: int = 0, batch_size: int = 12, noise: float = 0.1) -> Task:
    """The CNN with SGD: a class is a colour, a place is where the blob lies."""
    torch.manual_seed(seed)
    model = Detector()
    heads = [*model.classifier.parameters(), *model.locator.parameters()]
    trunk = [*model.stem.parameters(), *model.blocks.parameters()]
    groups = [{"params": trunk, "name": "trunk"}, {"params": heads, "name": "heads"}]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, weight_decay=1e-4)
    axis = torch.linspace(0, 1, 32)

    def batch(step: int, size: int = batch_size) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed * 100_003 + step)
        label = torch.randint(8, (size,), generator=g)
        centre = 0.2 + 0.6 * torch.rand(size, 2, generator=g)
        bits = torch.stack([label & 1, label >> 1 & 1, label >> 2 & 1], 1).float() * 2 - 1
        far = (axis[None, :, None] - centre[:, 0, None, None]) ** 2 + (axis[None, None] - centre[:, 1, None, None]) ** 2
        blob = torch.exp(-far / 0.02)
        image = bits[:, :, None, None] * blob[:, None] + noise * torch.randn(size, 3, 32, 32, generator=g)
        return {"image": image, "label": label, "centre": centre, "file": [f"{step:04d}_{i}.png" for i in range(size)]}

    def loss(data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        logits, place = model(data["image"])
        terms = {"class": F.cross_entropy(logits, data["label"]), "place": F.smooth_l1_loss(place, data["centre"])}
        return terms["class"] + terms["place"], terms

    return Task(model, optimizer, batch, loss, told=True)


def sequences(seed: int = 0, batch_size: int = 12, dropout: float = 0.0, path_drop: float = 0.0) -> Task:
    """The language model with AdamW and warm-up: the next token is an affine map of the last, one time in ten noise."""
    torch.manual_seed(seed)
    model = LanguageModel(dropout=dropout, path_drop=path_drop)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)

    def batch(step: int, size: int = batch_size) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed * 100_003 + step)
        rows = torch.randint(32, (size, 21), generator=g)
        for place in range(1, 21):
            follows = (5 * rows[:, place - 1] + 7) % 32
            noisy = torch.rand(size, generator=g) < 0.1
            rows[:, place] = torch.where(noisy, rows[:, place], follows)
        length = torch.randint(12, 21, (size,), generator=g)
        target = rows[:, 1:].masked_fill(torch.arange(20)[None] >= length[:, None], -100)
        return {"tokens": rows[:, :-1], "target": target, "length": length}

    return Task(model, optimizer, batch, model, clip=1.0)


def fusion(seed: int = 0, batch_size: int = 12) -> Task:
    """Images and clouds of six shapes, with AdamW and a lower rate for the image branch."""
    torch.manual_seed(seed)
    model = FusionNet()
    image = list(model.image_encoder.parameters())
    others = [p for name, p in model.named_parameters() if not name.startswith("image_encoder.")]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": image, "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.01)
    shapes = torch.randn(6, 24, 3, generator=torch.Generator().manual_seed(1))
    looks = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(2))

    def batch(step: int, size: int = batch_size) -> Pairs:
        g = torch.Generator().manual_seed(seed * 100_003 + step)
        label = torch.randint(6, (size,), generator=g)
        scale = 0.5 + torch.rand(size, generator=g)
        points = shapes[label] * scale[:, None, None] + 0.05 * torch.randn(size, 24, 3, generator=g)
        image = looks[label] + 0.3 * torch.randn(size, 3, 16, 16, generator=g)
        lost = torch.rand(size, generator=g)  # an image in four shows nothing, a cloud in four is noise: α chooses
        image[lost < 0.25] -= looks[label[lost < 0.25]]
        cloud = (lost > 0.75).nonzero()[:, 0]
        points[cloud] = scale[cloud, None, None] * torch.randn(len(cloud), 24, 3, generator=g)
        return Pairs(image, points, label, scale, [f"object_{step:04d}_{i}" for i in range(size)])

    return Task(model, optimizer, batch, model, clip=5.0)


TASKS: dict[str, Callable[..., Task]] = {"images": images, "sequences": sequences, "fusion": fusion}
