"""L2 norms that neither overflow nor lose small values, at about the price of a float32 norm.

A float32 sum of squares is infinite from a norm of 1.8e19 on and zero below about 1e-23, although every element is an
ordinary number: the norm of a large but finite gradient would read as an infinite one. On an accelerator the sum is
taken in float64, which costs nothing there, as memory is the limit. On a CPU float64 costs five times as much; there
the float32 sum is taken first and repeated in float64 only where it lies outside the safe range. A float32 sum also
drifts with its length (4e-4 at ten million elements on a CPU); long tensors are therefore summed in rows.

On a CPU a number is known as soon as it is measured, so that norms of many tensors are Python's floats: a tensor for
each would cost more than the norm of a small one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from bifusion_diag.probes.outputs import numbers
from bifusion_diag.probes.ranks import local_part

Number: TypeAlias = float | Tensor  # of a tensor on the CPU, or () on its device
SAFE = (1e-12, 1e18)  # norms whose float32 sum of squares is exact enough
ROW = 1 << 17  # elements of one float32 sum, which then stay in a core's cache
PIECE = 1 << 22  # elements of a temporary
HALF = (torch.float16, torch.bfloat16)


def flat(x: Tensor) -> Tensor | None:
    """All elements of a dense tensor in the order of its memory: a view. None where its memory has gaps or repeats."""
    if not x.is_contiguous():
        expected = 1
        for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
            if size != 1 and stride != expected:
                return None
            expected *= size
    return x.as_strided((x.numel(),), (1,))


def norm_of(x: Tensor) -> Number:
    """The L2 norm of all elements that this process holds: a float, or () float64. NaN or infinite only where an
    element is."""
    x = numbers(local_part(x))
    if x.device.type != "cpu":
        return torch.linalg.vector_norm(x, dtype=torch.float64)
    if x.dtype == torch.float32:
        norm = _float32_norm(x)
        if SAFE[0] < norm < SAFE[1] or (norm == 0 and not x.any()):
            return norm
    elif x.dtype in HALF:
        norm = float(torch.linalg.vector_norm(x, dtype=torch.float32))
        if x.numel() <= ROW and SAFE[0] < norm < SAFE[1]:
            return norm
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def l2_norm(x: Tensor) -> Tensor:
    """:func:`norm_of` as a tensor, () float64."""
    norm = norm_of(x)
    return norm if isinstance(norm, Tensor) else torch.tensor(norm, dtype=torch.float64)


def norms_of(tensors: Sequence[Tensor]) -> list[Number]:
    """:func:`norm_of` each."""
    local = [numbers(local_part(x)) for x in tensors]
    if local and all(x.is_cuda and x.dtype == local[0].dtype and x.device == local[0].device for x in local):
        return list(torch._foreach_norm(local, 2, dtype=torch.float64))
    return [norm_of(x) for x in local]


def l2_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of each of n tensors, (n,) float64."""
    return as_tensor(norms_of(tensors))


def as_tensor(values: Sequence[Number]) -> Tensor:
    """Many numbers as one tensor (n,) float64, on the first device that one of them is on."""
    device = next((x.device for x in values if isinstance(x, Tensor)), None)
    if device is None:
        return torch.tensor(values, dtype=torch.float64)
    return torch.stack([torch.as_tensor(x).to(device) for x in values]).double()


def row_norms(x: Tensor) -> Tensor:
    """The L2 norm of each row of x (R, C), (R,) float64; rows of at most some thousand elements."""
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    norms = torch.linalg.vector_norm(x, dim=1).double()
    unsafe = (~((norms > SAFE[0]) & (norms < SAFE[1]))).nonzero()[:, 0]
    if len(unsafe):
        norms[unsafe] = torch.linalg.vector_norm(x[unsafe], dim=1, dtype=torch.float64)
    return norms


def _float32_norm(x: Tensor) -> float:
    """On the CPU. BLAS reads memory faster than torch's norm does; one sum a row."""
    line = flat(x)
    array = (x.reshape(-1) if line is None else line).numpy(force=True)
    with np.errstate(all="ignore"):
        if array.size <= ROW:
            return math.sqrt(np.dot(array, array))
        rows = (array[start : start + ROW] for start in range(0, array.size, ROW))
        return math.sqrt(sum(float(np.dot(row, row)) for row in rows))


def count_nonfinite(x: Tensor) -> Tensor:
    """How many of the elements that this process holds are NaN or infinite, () float64, without a long temporary."""
    x = numbers(local_part(x))
    line = flat(x)
    pieces = x.split(max(1, PIECE * len(x) // x.numel())) if line is None else line.split(PIECE)
    # Zero times NaN or infinity is NaN, which is not zero.
    return torch.stack([torch.linalg.vector_norm(piece * 0, 0, dtype=torch.float64) for piece in pieces]).sum()


def to_float32(x: Tensor) -> Tensor:
    """Narrow float64 values: what is finite stays finite, at the largest float32 number."""
    limit = torch.finfo(torch.float32).max
    return torch.where(x.isfinite(), x.clamp(-limit, limit), x).float()
