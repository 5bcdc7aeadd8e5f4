"""Batches of all kinds survive the way through JSON and tensors, to the bit; no code runs because a file names it."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bifusion_diag.data.batch import Batch
from bifusion_diag.errors import UserError
from bifusion_diag.replay.capsules.tree import Decoder, Encoder, class_name, find_class, strided


class Pair(NamedTuple):
    left: Tensor
    right: list[int]


@dataclasses.dataclass(frozen=True)
class Sample:
    image: Tensor
    names: tuple[str, ...]
    built: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.built.append("constructed")


class Nested:  # DETR's NestedTensor is such a class
    def __init__(self, tensors: Tensor) -> None:
        self.tensors = tensors
        self.mask = tensors > 0


class Attributes(dict):
    def __init__(self) -> None:
        raise AssertionError("a constructor ran")


class Acts:
    def __del__(self) -> None:
        pass


def through_files(value: Any, folder: Path) -> tuple[Any, list[str]]:
    """Encode, write, read and decode a value; and what was lost."""
    encoder = Encoder()
    node = json.loads(json.dumps(encoder.encode(value, "batch"), allow_nan=False))
    save_file(encoder.tensors, folder / "t.safetensors")
    return Decoder(load_file(folder / "t.safetensors").__getitem__).decode(node), encoder.lost


def same(a: Any, b: Any) -> bool:
    """Equal types, structure, strides and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        bits = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in (a.detach(), b.detach())]
        alike = (a.dtype, a.shape, a.stride(), a.requires_grad) == (b.dtype, b.shape, b.stride(), b.requires_grad)
        return alike and bits[0].contiguous().numpy(force=True).tobytes() == bits[1].contiguous().numpy().tobytes()
    if isinstance(a, np.ndarray):
        if a.dtype == object:
            return a.shape == b.shape and all(map(same, a.ravel().tolist(), b.ravel().tolist()))
        flags = (a.flags.f_contiguous, b.flags.f_contiguous)
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()) and flags[0] == flags[1]
    if dataclasses.is_dataclass(a) or isinstance(a, Nested):
        return list(vars(a)) == list(vars(b)) and all(
            same(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
        )
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple, collections.deque)):
        return getattr(a, "maxlen", None) == getattr(b, "maxlen", None) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return bool(a == b)


VALUES: dict[str, Any] = {
    "plain": [None, True, -3, 2**70, 0.1, "α", float("nan"), float("inf"), -float("inf"), -0.0],
    "nested": {"a": [{"b": (torch.arange(3), {"c": torch.zeros(0, 4)})}], "$": 1},
    "keys": {1: torch.ones(2), ("x", 2): None, None: 3},
    "types": [torch.ones(2, dtype=t) for t in (torch.bool, torch.int16, torch.float16, torch.float64)],
    "nan bits": torch.tensor([0x7FC00001, 0x7F800000, -1], dtype=torch.int32).view(torch.float32),
    "complex": torch.randn(3, dtype=torch.complex64).conj(),
    "scalar": torch.tensor(3.5),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": torch.randn(4, 5).T,
    "slice": torch.randn(6, 8)[::2, 1:5],
    "expanded": torch.randn(4, 1).expand(4, 7),
    "leaf": torch.ones(2, requires_grad=True),
    "arrays": [np.arange(6.0).reshape(2, 3).T, np.array(["a", "bc"]), np.zeros((0, 3), np.uint16), np.float32(0.1)],
    "datetime": np.array(["2024-01-01"], dtype="datetime64[D]"),
    "objects": np.array([{"a": 1}, None, "x"], dtype=object),
    "named": Pair(torch.ones(1), [1, 2]),
    "ordered": collections.OrderedDict(b=1, a=2),
    "words": [
        b"\x00\xff",
        bytearray(b"x"),
        1 + 2j,
        torch.float16,
        torch.device("cpu"),
        Path("a/b"),
        range(3),
        slice(1),
    ],
    "deque": collections.deque([1, torch.ones(1)], maxlen=5),
    "sets": [{1, 2}, frozenset("a"), torch.Size([2, 3])],
    "object": Nested(torch.randn(2, 2)),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    found, lost = through_files(VALUES[name], tmp_path)
    assert lost == []
    assert same(VALUES[name], found)


def test_a_dataclass_comes_back_without_its_constructor(tmp_path: Path) -> None:
    sample = Sample(torch.randn(3), ("a", "b"))
    found, lost = through_files(sample, tmp_path)
    assert lost == []
    assert same(sample, found)
    assert found.built == ["constructed"]  # once, when it was made


def test_our_own_batch_is_imported_where_it_is_not_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {f.name: torch.randn(2) for f in dataclasses.fields(Batch)} | {
        "names": ("x",),
        "notes": (("a", "b"), ()),
    }
    batch = Batch(**fields)
    monkeypatch.delitem(sys.modules, "bifusion_diag.data.batch")
    found, lost = through_files(batch, tmp_path)
    assert type(found).__name__ == "Batch"
    assert (found.names, found.notes, lost) == (("x",), (("a", "b"), ()), [])


def test_one_tensor_at_two_places_is_one_tensor_again(tmp_path: Path) -> None:
    x = torch.randn(3)
    found, _ = through_files({"a": x, "b": [x], "c": x.clone()}, tmp_path)
    assert found["a"] is found["b"][0]
    assert found["a"] is not found["c"]


def test_views_of_one_memory_are_stored_apart(tmp_path: Path) -> None:
    x = torch.arange(10.0)
    found, _ = through_files([x[:5], x[5:], x], tmp_path)
    assert [y.tolist() for y in found] == [x[:5].tolist(), x[5:].tolist(), x.tolist()]


def test_names_that_collide_are_kept_apart(tmp_path: Path) -> None:
    value = {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}, 1: torch.full((1,), 2.0), "1": torch.full((1,), 3.0)}
    found, _ = through_files(value, tmp_path)
    assert same(value, found)


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (lambda x: x, "function"),
        (torch.eye(3).to_sparse(), "sparse"),
        (iter([1]), "list_iterator"),
        (Acts(), "Acts"),
        (np.zeros(2, dtype=[("a", "f4")]), "array of"),
        (types.MappingProxyType({}), "mappingproxy"),
        (torch.ones(1, device="meta"), "meta"),
    ],
    ids=["function", "sparse", "iterator", "finaliser", "structured", "proxy", "meta"],
)
def test_what_cannot_be_stored_is_told(value: Any, word: str, tmp_path: Path) -> None:
    found, lost = through_files({"kept": 1, "odd": value}, tmp_path)
    assert found == {"kept": 1, "odd": None}
    assert len(lost) == 1
    assert lost[0].startswith("batch/odd is ")
    assert word in lost[0] or word == "meta"


def test_a_default_that_is_lost_is_told(tmp_path: Path) -> None:
    found, lost = through_files(collections.defaultdict(list, a=[1]), tmp_path)
    assert (type(found), found) == (collections.defaultdict, {"a": [1]})
    assert lost == ["batch is a collections:defaultdict, stored without its default"]


def test_a_value_that_holds_itself_is_told() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    encoder = Encoder()
    encoder.encode(loop, "batch")
    assert encoder.lost == ["batch/1 is a value that holds itself, and not in it"]


def test_a_dictionary_of_a_users_class_is_filled_without_its_constructor(tmp_path: Path) -> None:
    value = dict.__new__(Attributes)
    value["a"] = torch.ones(1)
    value.note = "x"  # type: ignore[attr-defined]
    found, lost = through_files(value, tmp_path)
    assert (type(found), lost, found.note) == (Attributes, [], "x")
    assert torch.equal(found["a"], torch.ones(1))


@pytest.mark.parametrize("name", ["antigravity:main", "no_such_module:Thing", "turtledemo.clock:Hand"])
def test_no_module_is_imported_because_a_file_names_it(name: str) -> None:
    with pytest.raises(UserError, match="is not imported"):
        find_class(name)
    assert name.split(":")[0] not in sys.modules


@pytest.mark.parametrize(
    "node",
    [
        {"$": "object", "class": "subprocess:Popen", "fields": {}},
        {"$": "object", "class": f"{__name__}:Acts", "fields": {}},
        {"$": "dataclass", "class": f"{__name__}:Nested", "fields": {}},
        {"$": "namedtuple", "class": "builtins:dict", "fields": {}},
        {"$": "mapping", "class": "builtins:list", "items": [], "fields": {}},
        {"$": "object", "class": "os:system", "fields": {}},
        {"$": "tensor"},
        {"$": "tensor", "name": "gone"},
        {"$": "array", "name": "x", "dtype": "O", "shape": [1]},
        {"$": "array", "name": "x", "dtype": "f4", "shape": [100]},
        {"$": "dtype", "value": "load"},
        {"$": "unheard"},
    ],
)
def test_a_node_that_is_damaged_or_forged_is_refused(node: Any) -> None:
    tensors = {"x": torch.zeros(4, dtype=torch.uint8)}
    with pytest.raises(UserError):
        Decoder(tensors.__getitem__).decode(node)


def test_a_scripts_own_class_is_named_as_its_file_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pair, "__module__", "__main__")
    main = types.SimpleNamespace(__spec__=None, __file__="/some/where/train.py")
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert class_name(Pair) == "train:Pair"


def test_a_thin_slice_of_something_large_takes_no_memory() -> None:
    assert strided(torch.zeros(4), [10**12]).stride() == (1,)
