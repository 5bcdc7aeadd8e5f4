"""Nested batches as JSON and tensors: what a capsule holds instead of a pickle.

A value is JSON where JSON can say it; everything else is an object with the key "$" that names its kind. Tensors and
arrays lie beside it, by the path at which they were found. Reading runs no code of the file's choice: a class is only
taken from a module that is imported already, and no constructor of it is called.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import importlib
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bifusion_diag.errors import UserError

KIND = "$"
#: Those that safetensors holds; complex ones are stored as pairs of real ones.
_STORED = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64,
}  # fmt: skip
_COMPLEX = {torch.complex64, torch.complex128}


class Encoder:
    """Takes values apart.

    Attributes:
        tensors: what :func:`decode` needs beside the JSON, by name: on the CPU, contiguous, sharing no memory.
        lost: what could not be stored: a path and what stands there.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.lost: list[str] = []
        self._known: dict[int, tuple[Any, Any]] = {}  # id → the tensor or array itself, and its node
        self._memory: set[int] = set()  # addresses of what `tensors` holds
        self._open: set[int] = set()  # ids of the containers on the way here

    def encode(self, value: Any, path: str) -> Any:
        """The JSON of a value; ``path`` names its tensors."""
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {KIND: "float", "value": repr(value)}
        if isinstance(value, (Tensor, np.ndarray)):
            known = self._known.get(id(value))
            if known is None:
                node = self._tensor(value, path) if isinstance(value, Tensor) else self._array(value, path)
                known = self._known[id(value)] = (value, node)
            return known[1]
        leaf = _leaf(value)
        if leaf is not None:
            return leaf
        if id(value) in self._open:
            return self._lose(path, "a value that holds itself")
        self._open.add(id(value))
        try:
            return self._container(value, path)
        finally:
            self._open.discard(id(value))

    def _container(self, value: Any, path: str) -> Any:
        kind = type(value)
        if kind is list:
            return [self.encode(entry, f"{path}/{i}") for i, entry in enumerate(value)]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            fields = {
                name: self.encode(entry, f"{path}/{name}") for name, entry in zip(value._fields, value, strict=True)
            }
            return {KIND: "namedtuple", "class": class_name(kind), "fields": fields}
        if kind in (tuple, torch.Size, set, frozenset):
            name = {torch.Size: "size"}.get(kind, kind.__name__)
            return {KIND: name, "items": [self.encode(entry, f"{path}/{i}") for i, entry in enumerate(value)]}
        if kind is collections.deque:
            items = [self.encode(entry, f"{path}/{i}") for i, entry in enumerate(value)]
            return {KIND: "deque", "items": items, "maxlen": value.maxlen}
        if dataclasses.is_dataclass(value) and not isinstance(value, Mapping):
            held = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}
            held |= getattr(value, "__dict__", {})  # also what was attached to it
            return self._object("dataclass", value, held, path)
        if isinstance(value, Mapping) and not (isinstance(value, collections.UserDict) and _rebuildable(kind)):
            return self._mapping(value, path)
        if _rebuildable(kind):
            return self._object("object", value, vars(value), path)
        return self._lose(path, f"a {class_name(kind)}")

    def _object(self, word: str, value: Any, held: Mapping[str, Any], path: str) -> Any:
        fields = {str(name): self.encode(entry, f"{path}/{name}") for name, entry in held.items()}
        return {KIND: word, "class": class_name(type(value)), "fields": fields}

    def _mapping(self, value: Mapping[Any, Any], path: str) -> Any:
        kind = type(value)
        encoded = [(key, self.encode(entry, f"{path}/{key}")) for key, entry in value.items()]
        if kind is dict and KIND not in value and all(type(key) is str for key in value):
            return dict(encoded)
        items = [[self.encode(key, f"{path}/(key)"), entry] for key, entry in encoded]
        if kind in (dict, collections.OrderedDict):
            return {KIND: "dict" if kind is dict else "ordered", "items": items}
        if not isinstance(value, dict):
            return self._lose(path, f"a {class_name(kind)}")
        if getattr(value, "default_factory", None) is not None:
            self.lost.append(f"{path} is a {class_name(kind)}, stored without its default")
        fields = {name: self.encode(entry, f"{path}/{name}") for name, entry in getattr(value, "__dict__", {}).items()}
        return {KIND: "mapping", "class": class_name(kind), "items": items, "fields": fields}

    def _tensor(self, value: Tensor, path: str) -> Any:
        x = value.detach()
        if type(x) is not Tensor:
            self.lost.append(f"{path} is a {class_name(type(value))}, stored as a plain tensor")
            try:
                x = x.as_subclass(Tensor)
            except Exception:
                return self._lose(path, f"a {class_name(type(value))}")
        if x.layout != torch.strided or x.is_quantized or x.dtype not in _STORED | _COMPLEX or x.is_meta:
            return self._lose(path, f"a tensor of {x.dtype}, {x.layout}")
        node: dict[str, Any] = {KIND: "tensor", "name": self._name(path)}
        if x.device.type != "cpu":
            node["device"] = str(x.device)
        if not x.is_contiguous():
            node["stride"] = list(x.stride())
        if value.requires_grad and value.is_leaf:
            node["requires_grad"] = True
        x = x.resolve_conj().resolve_neg()
        if x.is_complex():
            node["dtype"] = str(x.dtype)
            x = torch.view_as_real(x)
        stored = x.cpu().contiguous()
        memory = stored.untyped_storage()
        if memory.nbytes() != stored.nbytes or memory.data_ptr() in self._memory:  # safetensors takes no shared memory
            stored = stored.clone()
        self._memory.add(stored.untyped_storage().data_ptr())
        self.tensors[node["name"]] = stored
        return node

    def _array(self, value: np.ndarray[Any, Any], path: str) -> Any:
        if type(value) is not np.ndarray:
            self.lost.append(f"{path} is a {class_name(type(value))}, stored as a plain array")
            value = np.asarray(value)
        if value.dtype == object:
            items = [self.encode(entry, f"{path}/{i}") for i, entry in enumerate(value.ravel().tolist())]
            return {KIND: "objects", "shape": list(value.shape), "items": items}
        if value.dtype.hasobject or value.dtype.fields:
            return self._lose(path, f"an array of {value.dtype}")
        node: dict[str, Any] = {KIND: "array", "name": self._name(path)}
        node |= {"dtype": value.dtype.str, "shape": list(value.shape)}
        if value.flags.f_contiguous and not value.flags.c_contiguous:
            node["order"] = "F"
        self.tensors[node["name"]] = torch.frombuffer(bytearray(value.tobytes()) or bytearray(1), dtype=torch.uint8)
        return node

    def _name(self, path: str) -> str:
        name, number = path, 1
        while name in self.tensors:
            number += 1
            name = f"{path} ({number})"
        return name

    def _lose(self, path: str, what: str) -> Any:
        self.lost.append(f"{path} is {what}, and not in it")
        return {KIND: "lost", "what": what}


class Decoder:
    """Puts together what an :class:`Encoder` took apart.

    Args:
        tensors: by name.
        device: where tensors go that were on a device that is not here.
    """

    def __init__(self, tensors: Callable[[str], Tensor], device: torch.device | str = "cpu") -> None:
        self._tensors = tensors
        self._device = device
        self._known: dict[str, Any] = {}

    def decode(self, node: Any) -> Any:
        """The value of a node.

        Raises:
            UserError: it needs a class whose module is not imported, or the node is damaged.
        """
        if isinstance(node, list):
            return [self.decode(entry) for entry in node]
        if not isinstance(node, dict):
            return node
        if KIND not in node:
            return {key: self.decode(entry) for key, entry in node.items()}
        try:
            return self._special(node)
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
            raise UserError(f"a damaged value of kind {node[KIND]!r}: {error!r}") from error

    def _special(self, node: dict[str, Any]) -> Any:
        kind = node[KIND]
        if kind in ("tensor", "array"):
            name = node["name"]
            if name not in self._known:
                self._known[name] = self._tensor(node) if kind == "tensor" else self._array(node)
            return self._known[name]
        if kind in _LEAVES:
            return _LEAVES[kind](node)
        if kind in _SEQUENCES:
            return _SEQUENCES[kind](map(self.decode, node["items"]))
        if kind == "deque":
            return collections.deque(map(self.decode, node["items"]), node["maxlen"])
        if kind in ("dict", "ordered", "mapping"):
            items = [(self.decode(key), self.decode(entry)) for key, entry in node["items"]]
            if kind == "mapping":
                return _mapping_of(find_class(node["class"]), items, self.decode(node["fields"]))
            return dict(items) if kind == "dict" else collections.OrderedDict(items)
        if kind == "objects":
            found = np.empty(len(node["items"]), dtype=object)
            for place, entry in enumerate(node["items"]):
                found[place] = self.decode(entry)
            return found.reshape(node["shape"])
        if kind in ("namedtuple", "dataclass", "object"):
            cls = find_class(node["class"])
            fields = {name: self.decode(entry) for name, entry in node["fields"].items()}
            return _built(kind, cls, fields)
        if kind == "lost":
            return None
        raise UserError(f"a value of unknown kind {kind!r}; a newer bifusion-diag may know it")

    def _tensor(self, node: dict[str, Any]) -> Tensor:
        x = self._tensors(node["name"])
        if "dtype" in node:
            x = torch.view_as_complex(x)
        if "stride" in node:
            x = strided(x, node["stride"])
        if "device" in node:
            x = x.to(_there(node["device"], self._device))
        return x.requires_grad_() if node.get("requires_grad") else x

    def _array(self, node: dict[str, Any]) -> np.ndarray[Any, Any]:
        dtype, shape = np.dtype(node["dtype"]), tuple(node["shape"])
        raw = self._tensors(node["name"]).numpy().tobytes()[: dtype.itemsize * math.prod(shape)]
        found = np.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)
        return np.asfortranarray(found) if node.get("order") == "F" else found


def strided(x: Tensor, stride: list[int]) -> Tensor:
    """The same values with these strides: kernels choose their order of summation by them."""
    if len(stride) != x.dim() or any(s < 0 for s in stride):
        raise UserError(f"a tensor of shape {tuple(x.shape)} cannot have strides {stride}")
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, stride, strict=True)) if x.numel() else 0
    if size > 64 * (x.numel() + 1024):
        return x  # a thin slice of something large: the memory is not worth it
    memory = torch.empty(size, dtype=x.dtype)
    once = [1 if s == 0 else n for n, s in zip(x.shape, stride, strict=True)]  # an expanded dimension is written once
    memory.as_strided(once, stride).copy_(x[tuple(slice(0, n) for n in once)])
    return memory.as_strided(x.shape, stride)


def class_name(kind: type) -> str:
    """ "module:Name" of a class. A script's own classes are named as its file is imported."""
    module = kind.__module__
    if module == "__main__":
        main = sys.modules["__main__"]
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        module = spec.name if spec is not None else Path(file).stem if file else module
    return f"{module}:{kind.__qualname__}"


def find_class(name: str) -> type:
    """The class of a name, if its module is imported already or is one of ours.

    Raises:
        UserError: it is not, or there is no such class.
    """
    module, _, path = name.partition(":")
    if module not in sys.modules and module.split(".")[0] == "bifusion_diag":
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"the class {name} is not there: {error}") from error
    found: Any = sys.modules.get(module)
    if found is None:
        raise UserError(
            f"it holds a {name}, and the module {module} is not imported. Give --entry of a module that imports it: "
            "no code is run because a capsule names it."
        )
    for part in path.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        raise UserError(f"it holds a {name}, which the module {module} does not have here: is it another version?")
    return found


def _leaf(value: Any) -> Any:
    """Values without parts; None: it is none."""
    if isinstance(value, np.generic) and not value.dtype.hasobject and not value.dtype.fields:
        raw = base64.b64encode(value.tobytes()).decode()
        return {KIND: "scalar", "dtype": value.dtype.str, "value": raw}
    if isinstance(value, (bytes, bytearray)):
        return {KIND: type(value).__name__, "value": base64.b64encode(value).decode()}
    if type(value) is complex:
        return {KIND: "complex", "value": [repr(value.real), repr(value.imag)]}
    if isinstance(value, torch.dtype):
        return {KIND: "dtype", "value": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {KIND: "device", "value": str(value)}
    if isinstance(value, PurePath):
        return {KIND: "path", "value": str(value)}
    if type(value) in (range, slice):
        return {KIND: type(value).__name__, "value": [value.start, value.stop, value.step]}
    return None


def _dtype(node: dict[str, Any]) -> torch.dtype:
    found = getattr(torch, str(node["value"]), None)
    if not isinstance(found, torch.dtype):
        raise UserError(f"torch has no type {node['value']!r} here")
    return found


_LEAVES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "float": lambda node: float(node["value"]),
    "complex": lambda node: complex(float(node["value"][0]), float(node["value"][1])),
    "scalar": lambda node: np.frombuffer(base64.b64decode(node["value"]), dtype=np.dtype(node["dtype"]))[0],
    "bytes": lambda node: base64.b64decode(node["value"]),
    "bytearray": lambda node: bytearray(base64.b64decode(node["value"])),
    "dtype": _dtype,
    "device": lambda node: torch.device(node["value"]),
    "path": lambda node: Path(node["value"]),
    "range": lambda node: range(*node["value"]),
    "slice": lambda node: slice(*node["value"]),
}
_SEQUENCES: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "size": torch.Size,
    "set": set,
    "frozenset": frozenset,
}


def _rebuildable(kind: type) -> bool:
    """Whether plain attributes are all that an object is. None of Python's own classes: some act when deleted."""
    if kind.__module__.split(".")[0] in sys.stdlib_module_names or hasattr(kind, "__del__"):
        return False
    return kind.__new__ is object.__new__ and hasattr(kind, "__dict__") and kind.__dictoffset__ != 0


def _built(word: str, cls: type, fields: dict[str, Any]) -> Any:
    if word == "namedtuple":
        if not (issubclass(cls, tuple) and hasattr(cls, "_make")):
            raise UserError(f"{class_name(cls)} is no named tuple here")
        return cls._make(fields[name] for name in cls._fields)  # type: ignore[attr-defined]
    if (word == "dataclass" and not dataclasses.is_dataclass(cls)) or not _plain_class(cls, word):
        raise UserError(f"{class_name(cls)} cannot be rebuilt from its fields here")
    made: Any = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def _plain_class(cls: type, word: str) -> bool:
    return not hasattr(cls, "__del__") if word == "dataclass" else _rebuildable(cls)


def _mapping_of(cls: type, items: list[tuple[Any, Any]], fields: dict[str, Any]) -> Any:
    """A subclass of dict, filled without its constructor."""
    if not issubclass(cls, dict):
        raise UserError(f"{class_name(cls)} is no mapping here")
    made: dict[Any, Any] = cls.__new__(cls)
    for key, value in items:
        dict.__setitem__(made, key, value)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def _there(wanted: str, otherwise: torch.device | str) -> torch.device:
    """That device, if it is here."""
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) < torch.cuda.device_count():
        return device
    return torch.device(otherwise)
