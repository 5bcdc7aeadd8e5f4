"""Numbers as strict JSON: NaN and ±Inf as strings, a missing value as null, float32 in its shortest exact decimal."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bifusion_diag.record.schema import Floats, Ints

NONFINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def encode_float(value: float) -> float | str:
    """One number as JSON can hold it."""
    if np.isfinite(value):
        return value
    return "NaN" if np.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def encode(value: Any) -> Any:
    """A free-form value as strict JSON can hold it. Raises TypeError for what has no JSON form."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, np.generic):
        return encode(value.item())
    if isinstance(value, float):
        return encode_float(value)
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return encode(value.tolist())
    if isinstance(value, (Sequence, set, frozenset)):
        return [encode(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a record cannot hold a {type(value).__name__}: {value!r}")


def decode(value: Any) -> Any:
    """The inverse of :func:`encode`. The three strings that stand for non-finite numbers become numbers again."""
    if isinstance(value, str):
        return NONFINITE.get(value, value)
    if isinstance(value, dict):
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return value


def pack_floats(values: Floats, missing: NDArray[np.bool_]) -> Any:
    """(K,) floats of float32 precision as a list, or as one value where all K are the same."""
    if not len(values):
        return []
    same = missing.all() or (not missing.any() and (np.isnan(values).all() or (values == values[0]).all()))
    count = 1 if same else len(values)
    packed = [
        None if gone else encode_float(number) for number, gone in zip(shortest(values[:count]), missing, strict=False)
    ]
    return packed[0] if same else packed


def shortest(values: Floats) -> list[float]:
    """Floats of float32 precision as numbers whose decimals are the shortest ones that are exact in it."""
    return [float(text) for text in pa.array(values.astype(np.float32)).cast(pa.string()).to_pylist()]


def unpack_floats(packed: Any, count: int) -> tuple[Floats, NDArray[np.bool_]]:
    """The inverse of :func:`pack_floats`: values (NaN where missing) and which are missing."""
    items = packed if isinstance(packed, list) else [packed] * count
    if len(items) != count:
        raise ValueError(f"{len(items)} values where {count} were expected")
    missing = np.fromiter((item is None for item in items), bool, count)
    plain = (NONFINITE["NaN"] if item is None else NONFINITE[item] if isinstance(item, str) else item for item in items)
    return np.fromiter(plain, np.float32, count).astype(np.float64), missing


def pack_counts(values: NDArray[Any]) -> Any:
    """(K,) integers as a list, or as one number where all are the same."""
    same = len(values) > 0 and (values == values[0]).all()
    return int(values[0]) if same else [int(value) for value in values]


def unpack_counts(packed: Any, count: int) -> Ints:
    """The inverse of :func:`pack_counts`."""
    items = packed if isinstance(packed, list) else [packed] * count
    if len(items) != count:
        raise ValueError(f"{len(items)} counts where {count} were expected")
    return np.asarray(items, dtype=np.int64)


def pack_steps(steps: Ints) -> list[list[int]]:
    """Ascending steps as ranges [first, last, stride]."""
    ranges: list[list[int]] = []
    start = 0
    while start < len(steps):
        stride = int(steps[start + 1] - steps[start]) if start + 1 < len(steps) else 1
        breaks = np.flatnonzero(np.diff(steps[start:]) != stride)
        end = start + int(breaks[0]) if len(breaks) else len(steps) - 1
        ranges.append([int(steps[start]), int(steps[end]), stride])
        start = end + 1
    return ranges


def unpack_steps(ranges: list[list[int]]) -> Ints:
    """The inverse of :func:`pack_steps`."""
    parts = [np.arange(first, last + 1, stride, dtype=np.int64) for first, last, stride in ranges]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def dumps(document: Any) -> str:
    """Compact strict JSON."""
    return json.dumps(document, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"bare {text} is not JSON")


def loads(text: str) -> Any:
    """Parse strict JSON; bare NaN and Infinity are errors. Half a character, which no file can hold, is a "?"."""
    document = json.loads(text, parse_constant=_refuse_constant)
    if re.search(r"\\u[dD][89a-fA-F]", text):
        return json.loads(json.dumps(document, ensure_ascii=False).encode("utf-8", "replace"))
    return document
