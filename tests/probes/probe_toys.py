"""Small models of every kind of output, that share nothing with ours."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


@dataclasses.dataclass
class Boxed:
    value: Tensor
    note: str = "x"


class Sparse:
    def __init__(self, feats: Tensor) -> None:
        self.feats = feats


class Wrap(nn.Module):
    """A linear layer that returns its result in some container."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)

    def forward(self, x: Tensor) -> Any:
        y = x @ self.weight
        return {
            "tensor": y,
            "tuple": (y, 3),
            "pair": Pair(y, None),
            "dict": {"y": y, "more": [y.sin()]},
            "dataclass": Boxed(y),
            "sparse": Sparse(y),
        }[self.kind]


def content(output: Any) -> Tensor:
    """What the next module reads of an output."""
    if isinstance(output, dict):
        return output["y"] + output["more"][0]
    if isinstance(output, Boxed):
        return output.value
    if isinstance(output, Sparse):
        return output.feats
    return output if isinstance(output, Tensor) else output[0]


class Silent(nn.Module):
    """Returns None, and has a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> None:
        return None


KINDS = ("tensor", "tuple", "pair", "dict", "dataclass", "sparse")


class Zoo(nn.Module):
    """Every kind of output; modules called twice, frozen, unused, with a zero gradient; dropout and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList([Wrap(kind) for kind in KINDS])
        self.twice = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.silent = Silent()
        self.never = nn.Linear(2, 2)
        self.zero = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.3)
        self.inplace = nn.ReLU(inplace=True)
        self.free = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = content(step(x)).tanh()
        x = self.inplace(self.twice(self.twice(x)))
        x = self.drop(self.norm(self.frozen(x)))
        self.silent(x)
        return ((x + self.zero(x) * 0.0) * self.free).square().mean()


class Gate(NamedTuple):
    fused: Tensor
    alpha: Tensor


class View(NamedTuple):
    camera_xyz: Tensor
    in_front: Tensor
    inside: Tensor
    visible: Tensor
    valid: Tensor


class Encoded(NamedTuple):
    f2d: Tensor | None
    f3d: Tensor
    valid: Tensor | None
    alpha: Tensor | None = None


class Loss(NamedTuple):
    total: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, float]
    matches: list[tuple[Tensor, Tensor]] | None = None
    objects: list[int] | None = None


class Give(nn.Module):
    """Returns what it is given."""

    def forward(self, output: Any) -> Any:
        return output
