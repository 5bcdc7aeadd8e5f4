"""Buffers that are written again and again."""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Named scratch buffers: a fresh large tensor costs several times as much as a used one."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """A (rows, columns) tensor of unspecified content, valid until the same name is taken again."""
        needed = rows * columns
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < needed or buffer.dtype != like.dtype or buffer.device != like.device:
            buffer = self._buffers[name] = torch.empty(needed, dtype=like.dtype, device=like.device)
        return buffer[:needed].view(rows, columns)

    def gather(self, name: str, feats: Tensor, index: Tensor) -> Tensor:
        """Rows ``index`` (P,) of feats (N, C): (P, C) in the buffer of that name."""
        return torch.index_select(feats, 0, index, out=self.take(name, len(index), feats.shape[1], feats))

    @property
    def nbytes(self) -> int:
        """Bytes held by all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())
