"""The tensors in what a module returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

#: Where sparse tensors keep their features: our engine's, MinkowskiEngine's, spconv's.
SPARSE_FIELDS = ("feats", "F", "features")


def raw_tensors(output: Any, depth: int = 6) -> Iterator[Tensor]:
    """Every tensor in an output, as it is there: a tensor, a sparse tensor (ours, MinkowskiEngine's, spconv's), or any
    nesting of tuples, lists, mappings and dataclasses of them. Anything else, None included, holds none."""
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
        items = [getattr(output, field.name, None) for field in dataclasses.fields(output)]
    for item in items:
        yield from raw_tensors(item, depth - 1)


def numbers(tensor: Tensor) -> Tensor:
    """The numbers that a tensor holds, in an ordinary one: the values of a sparse or nested tensor, the real and
    imaginary parts (..., 2) of a complex one, float8, which has no arithmetic, as bfloat16. Without a copy where there
    is none to sum up or to unpack."""
    if tensor.is_nested:
        tensor = tensor.values()
    elif tensor.layout != torch.strided:
        tensor = _dense(tensor)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.is_quantized:
        return tensor.dequantize()
    return tensor.bfloat16() if tensor.element_size() == 1 and tensor.is_floating_point() else tensor


def _dense(tensor: Tensor) -> Tensor:
    if tensor.layout == torch.sparse_coo:
        return tensor.coalesce().values()
    return tensor.to_dense() if tensor.is_mkldnn else tensor.values()


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The numbers of every tensor in an output, each an ordinary strided tensor that is not complex."""
    for tensor in raw_tensors(output):
        yield numbers(tensor)


def distinct_tensors(output: Any) -> list[Tensor]:
    """The tensors in an output as they are there, each once."""
    if isinstance(output, Tensor):
        return [output]
    return list({id(tensor): tensor for tensor in raw_tensors(output)}.values())
