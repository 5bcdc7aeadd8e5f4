"""The tensors in what a module returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

#: Where sparse tensors keep their features: our engine's, MinkowskiEngine's, spconv's.
SPARSE_FIELDS = ("feats", "F", "features")


def tensors_of(output: Any, depth: int = 6) -> Iterator[Tensor]:
    """Every tensor in an output: a tensor, a sparse tensor (ours, MinkowskiEngine's, spconv's), or any nesting of
    tuples, lists, mappings and dataclasses of them. Anything else, None included, holds none."""
    if isinstance(output, Tensor):
        yield output
        return
    if depth == 0:
        return
    items: Any = ()
    if isinstance(output, (tuple, list)):
        items = output
    elif isinstance(output, Mapping):
        items = output.values()
    elif field := next((name for name in SPARSE_FIELDS if isinstance(getattr(output, name, None), Tensor)), None):
        items = (getattr(output, field),)
    elif dataclasses.is_dataclass(output):
        items = [getattr(output, field.name) for field in dataclasses.fields(output)]
    for item in items:
        yield from tensors_of(item, depth - 1)


def distinct_tensors(output: Any) -> list[Tensor]:
    """The tensors in an output, each once."""
    if isinstance(output, Tensor):
        return [output]
    return list({id(tensor): tensor for tensor in tensors_of(output)}.values())
