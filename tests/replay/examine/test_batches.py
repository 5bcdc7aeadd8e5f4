"""Batches of every kind are cut to what a loader would have given of the chosen samples."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from bifusion_diag.errors import UserError
from bifusion_diag.replay.examine.batches import cut, sample_names, sample_notes, tensors_of

N = 4


class Named(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Data:
    image: Tensor
    meta: dict[str, Any]
    scale: float = 2.0


class Own:
    """A batch that knows how it is cut."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows

    @property
    def batch_size(self) -> int:
        return len(self.rows)

    def select(self, chosen: list[int]) -> Own:
        return Own([self.rows[i] for i in chosen])


X = torch.arange(N * 6.0).reshape(N, 6)
Y = torch.arange(N)
SIZES = (2, 1, 3, 2)
INDEX = torch.arange(N).repeat_interleave(torch.tensor(SIZES))
ROWS = torch.arange(8.0).reshape(8, 1) * 10


def boxes(i: int) -> dict[str, Any]:
    return {"boxes": torch.full((i + 1, 4), float(i)), "labels": torch.arange(i + 1), "image_id": torch.tensor(100 + i)}


#: Name → a batch of the given samples, as a loader makes it.
MAKERS: dict[str, Any] = {
    "tensor": lambda s: X[s],
    "pair": lambda s: (X[s], Y[s]),
    "list of parts": lambda s: [X[s], Y[s]],
    "two views": lambda s: [X[s].reshape(-1, 2, 3), X[s].reshape(-1, 2, 3) + 1],
    "mapping": lambda s: {"x": X[s], "y": Y[s], "class_weights": torch.ones(7), "epoch": 3, "size": (480, 640)},
    "named tuple": lambda s: Named(X[s], Y[s]),
    "dataclass": lambda s: Data(X[s], {"y": Y[s], "names": [f"n{i}" for i in s]}),
    "object": lambda s: types.SimpleNamespace(x=X[s], y=Y[s]),
    "arrays": lambda s: (X[s].numpy(), Y[s].numpy()),
    "images and targets": lambda s: ([torch.full((3, 8 + i, 9), float(i)) for i in s], [boxes(i) for i in s]),
    "list of samples": lambda s: [{"image": torch.full((3, 9, 9), float(i)), "name": f"n{i}", **boxes(i)} for i in s],
    "pairs of samples": lambda s: [(torch.full((3, 9, 9), float(i)), i) for i in s],
    "index of rows": lambda s: {
        "coord": torch.cat([ROWS[i == INDEX] for i in s]),
        "feat": torch.cat([ROWS[i == INDEX] + 1 for i in s]),
        "batch": torch.cat([torch.full((SIZES[i],), new) for new, i in enumerate(s)]),
        "label": Y[s],
    },
    "offsets": lambda s: {
        "coord": torch.cat([ROWS[i == INDEX] for i in s]),
        "offset": torch.tensor([SIZES[i] for i in s]).cumsum(0),
        "name": [f"n{i}" for i in s],
    },
    "own": lambda s: Own(list(s)),
    "own inside": lambda s: {"scene": Own(list(s)), "y": Y[s]},
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "__dict__"):
        return type(a) is type(b) and same(vars(a), vars(b))
    return bool(a == b)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("chosen", [[2], [0, 3], [3, 1, 0], [1, 1, 2], [0, 1, 2, 3]], ids=str)
def test_the_batch_of_some_samples_is_what_a_loader_gives_of_them(kind, chosen):
    make = MAKERS[kind]
    parts = cut(make([0, 1, 2, 3]))
    assert parts.size == N
    assert same(parts.pick(chosen), make(chosen))


@pytest.mark.parametrize("kind", ["images and targets", "list of samples"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_few_images_are_not_taken_for_their_channels(kind, size):
    samples = list(range(size))
    parts = cut(MAKERS[kind](samples))
    assert parts.size == size
    assert same(parts.pick([size - 1]), MAKERS[kind]([size - 1]))


def test_micro_batches_are_numbered_through_and_empty_ones_left_out():
    parts = cut([(X, Y), (X[:2] + 100, Y[:2])])
    assert parts.size == 6
    assert same(parts.pick([1, 4]), [(X[[1]], Y[[1]]), (X[[0]] + 100, Y[[0]])])
    assert same(parts.pick([5]), [(X[[1]] + 100, Y[[1]])])


def test_a_users_split_is_joined_again():
    parts = cut({"x": X, "n": 3}, lambda batch: [{"x": batch["x"][i : i + 1], "n": 3} for i in range(N)])
    assert parts.size == N
    assert same(parts.pick([2, 0]), {"x": X[[2, 0]], "n": 3})
    with pytest.raises(TypeError, match="objects of type object cannot be joined"):
        cut(X, lambda batch: [object(), object()]).pick([0, 1])
    with pytest.raises(UserError, match="it must return one batch a sample"):
        cut(X, lambda batch: [])


@pytest.mark.parametrize("batch", [None, 3, torch.tensor(1.0), {}, pytest.param(object(), id="object")], ids=repr)
def test_what_has_no_samples_cannot_be_cut(batch):
    with pytest.raises(UserError, match=r"batch of type \w+: give FlightRecorder\(split=...\)"):
        cut(batch)


@pytest.mark.parametrize(
    ("batch", "names"),
    [
        ({"x": X, "path": ["a", "b", "c", "d"]}, ["a", "b", "c", "d"]),
        ((X, Y, ["a", "b", "c", "d"]), ["a", "b", "c", "d"]),
        (MAKERS["images and targets"](range(N)), [f"image_id {100 + i}" for i in range(N)]),
        (MAKERS["list of samples"](range(N)), ["n0", "n1", "n2", "n3"]),
        ({"x": X, "index": Y + 7}, ["index 7", "index 8", "index 9", "index 10"]),
        (Data(X, {"file": ("a", "b", "c", "d")}), ["a", "b", "c", "d"]),
        ((X, Y), [None] * 4),
    ],
    ids=lambda value: type(value).__name__,
)
def test_samples_have_the_names_that_the_batch_gives_them(batch, names):
    assert sample_names(batch, N) == names


def test_names_and_notes_of_the_user_and_of_the_batch():
    assert sample_names((X, Y), N, lambda batch: [f"row {y}" for y in batch[1]]) == [f"row {i}" for i in range(N)]
    with pytest.raises(UserError, match=r"names\(batch\) returned 2 names; the batch has 4 samples"):
        sample_names(X, N, lambda batch: ["a", "b"])
    assert sample_notes({"notes": (("dark",), (), (), ("blurred", "cut"))}, N) == [
        ("dark",),
        (),
        (),
        ("blurred", "cut"),
    ]
    assert sample_notes((X, Y), N) == [()] * N


def test_tensors_have_paths():
    batch = {"x": X, "targets": [boxes(0)], "more": (Y, {"a": np.zeros(2)}), "note": "n"}
    assert [path for path, _ in tensors_of(batch)] == [
        *("x", "targets.0.boxes", "targets.0.labels", "targets.0.image_id", "more.0", "more.1.a")
    ]
