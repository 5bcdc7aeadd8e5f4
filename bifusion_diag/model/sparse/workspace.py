"""Buffers that are written again and again."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Workspace(threading.local):
    """Named scratch buffers, each thread's own: a fresh large tensor costs several times as much as a used one."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """A (rows, columns) tensor of unspecified content, valid until the same name is taken again."""
        needed = rows * columns
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < needed or not _fits(buffer, like):
            buffer = self._buffers[name] = torch.empty(needed, dtype=like.dtype, device=like.device)
        return buffer[:needed].view(rows, columns)

    def gather(self, name: str, feats: Tensor, index: Tensor) -> Tensor:
        """Rows ``index`` (P,) of feats (N, C): (P, C) in the buffer of that name."""
        return torch.index_select(feats, 0, index, out=self.take(name, len(index), feats.shape[1], feats))

    @property
    def nbytes(self) -> int:
        """Bytes held by the buffers of this thread."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


def _fits(buffer: Tensor, like: Tensor) -> bool:
    """Whether the buffer may be written now; one made in inference mode may not be outside of it."""
    writable = torch.is_inference_mode_enabled() or not buffer.is_inference()
    return writable and buffer.dtype == like.dtype and buffer.device == like.device
