"""A sample of a long tensor: runs of neighbours, evenly spaced.

Elements come in runs of 16, a line of the cache: reading single ones costs five times as much, as each brings its line
with it. Their distance has no divisor in common with the tensor's size, so that they do not all fall on a few channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bifusion_diag.probes.norms import flat, to_float32

RUN = 16


@functools.lru_cache(maxsize=4096)
def spacing(elements: int, runs: int) -> int:
    """Elements from the start of one run to that of the next, of a tensor with at least runs × 16 elements."""
    step = (elements - RUN) // (runs - 1)
    while step > RUN and math.gcd(step, elements) > 1:
        step -= 1
    return step


def sample(x: Tensor, runs: int) -> Tensor:
    """Of a tensor, (runs, 16) of its elements in the order of memory, or all of them, (n,), where it has fewer.
    A view where the memory of the tensor has no gaps."""
    line = flat(x)
    elements = x.numel()
    if elements < runs * RUN:
        return x.reshape(-1) if line is None else line
    step = spacing(elements, runs)
    if line is not None:
        return line.as_strided((runs, RUN), (step, 1))
    return torch.take(x, _places(elements, runs, x.device))


@functools.lru_cache(maxsize=64)
def _places(elements: int, runs: int, device: torch.device) -> Tensor:
    starts = torch.arange(runs, device=device) * spacing(elements, runs)
    return starts[:, None] + torch.arange(RUN, device=device)


class SampleRows:
    """Samples of one device, a row each, in a buffer that is used again at every step: elements are
    float32, rows of fewer than runs × 16 end in zeros."""

    def __init__(self, runs: int, device: torch.device) -> None:
        self.runs = runs
        self.width = runs * RUN
        self.device = device
        self._buffer = torch.zeros(0, self.width, device=device)
        self._lengths: list[int] = []  # of all rows of the buffer
        self._targets: list[Tensor] = []  # where a sample goes, by row
        self._columns = torch.arange(self.width, device=device)
        self.used = 0

    def clear(self) -> None:
        """Forget what is there."""
        self.used = 0

    def add(self, x: Tensor) -> int:
        """Sample a tensor. Returns its row."""
        row, chosen = self.used, sample(x, self.runs)
        self.used += 1
        if row == len(self._targets):
            self._grow()
        if self._lengths[row] != chosen.numel():
            self._lengths[row] = chosen.numel()
            line = self._buffer[row].zero_()
            self._targets[row] = line.view(self.runs, RUN) if chosen.dim() == 2 else line[: chosen.numel()]
        self._targets[row].copy_(to_float32(chosen) if chosen.dtype == torch.float64 else chosen)
        return row

    def _grow(self) -> None:
        old = self._buffer
        self._buffer = torch.zeros(2 * len(old) + 32, self.width, device=self.device)
        self._buffer[: len(old)] = old
        self._targets = [
            self._buffer[i].view(self.runs, RUN) if n == self.width else self._buffer[i, :n]
            for i, n in enumerate(self._lengths)
        ]
        missing = len(self._buffer) - len(old)
        self._lengths += [0] * missing
        self._targets += [old] * missing

    @property
    def rows(self) -> Tensor:
        """(R, runs × 16)"""
        return self._buffer[: self.used]

    @property
    def lengths(self) -> Sequence[int]:
        """Elements sampled, of each row."""
        return self._lengths[: self.used]

    def inside(self, lengths: Tensor) -> Tensor:
        """Where rows with so many elements (R,) have them, (R, runs × 16) bool."""
        return self._columns < lengths[:, None]


class Samples:
    """Samples of the same tensors at several moments, a row each; rows end in zeros.

    Args:
        sizes: elements of the tensors: first those with at least runs × 16.
    """

    def __init__(self, sizes: Sequence[int], runs: int, device: torch.device, dtype: torch.dtype) -> None:
        self.sizes = list(sizes)
        self.rows = torch.zeros(len(self.sizes), runs * RUN, device=device, dtype=dtype)
        self._runs = runs
        self._long = sum(size >= runs * RUN for size in self.sizes)
        self._short = [self.rows[i, : self.sizes[i]] for i in range(self._long, len(self.sizes))]
        self._pointers: list[int] = []
        self._views: list[Tensor] = []

    def take(self, tensors: Sequence[Tensor]) -> None:
        """Sample tensors whose memory has no gaps."""
        pointers = [x.data_ptr() for x in tensors]
        if pointers != self._pointers:
            self._pointers, self._views = pointers, [sample(x.detach(), self._runs) for x in tensors]
        if self._long:
            torch.cat(self._views[: self._long], out=self.rows[: self._long].view(-1, RUN))
        if self._short:
            torch._foreach_copy_(self._short, self._views[self._long :])

    @functools.cached_property
    def inside(self) -> Tensor:
        """Where rows have elements, (n, runs × 16) bool."""
        lengths = torch.tensor([min(size, self.rows.shape[1]) for size in self.sizes], device=self.rows.device)
        return torch.arange(self.rows.shape[1], device=self.rows.device) < lengths[:, None]
