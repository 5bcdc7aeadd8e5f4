"""L2 norms that neither overflow nor lose small values, at about the price of a float32 norm.

A float32 sum of squares is infinite from a norm of 1.8e19 on and zero below about 1e-23, although every element is an
ordinary number: the norm of a large but finite gradient would read as an infinite one. On an accelerator the sum is
taken in float64, which costs nothing there, as memory is the limit. On a CPU float64 costs five times as much; there
the float32 norm is taken first and repeated in float64 only where it lies outside the safe range. A float32 sum also
drifts with its length (4e-4 at ten million elements on a CPU); long tensors are therefore summed in rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

SAFE = (1e-12, 1e18)  # norms whose float32 sum of squares is exact enough
LONG = 1 << 18  # elements from which a float32 sum is split
ROW = 1024
HALF = (torch.float16, torch.bfloat16)


def l2_norm(x: Tensor) -> Tensor:
    """The L2 norm of all elements of a tensor, () float64. NaN or infinite only where an element is."""
    if x.layout != torch.strided:
        x = x.coalesce().values()
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return torch.linalg.vector_norm(x, dtype=torch.float64)
    if x.numel() > LONG:
        flat = x.reshape(-1)
        cut = flat.numel() // ROW * ROW
        rows = torch.linalg.vector_norm(flat[:cut].view(-1, ROW), dim=1, dtype=torch.float32)
        norm = torch.linalg.vector_norm(torch.cat([rows, flat[cut:].float()]), dtype=torch.float64)
    else:
        norm = torch.linalg.vector_norm(x, dtype=torch.float32 if x.dtype in HALF else None)
    if not SAFE[0] < norm < SAFE[1]:  # no synchronisation: the tensor is on the CPU
        norm = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm.double()


def l2_norms(tensors: list[Tensor]) -> Tensor:
    """The L2 norm of each of n tensors of one device, (n,) float64."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    device, dtype = tensors[0].device, tensors[0].dtype
    if any(x.layout != torch.strided or x.dtype != dtype or x.device != device for x in tensors):
        return torch.stack([l2_norm(x).to(device) for x in tensors])
    if device.type != "cpu" or dtype == torch.float64:
        return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64))
    short = [i for i, x in enumerate(tensors) if x.numel() <= LONG]
    norms = torch.zeros(len(tensors), dtype=torch.float64)
    if short:
        grouped = torch._foreach_norm([tensors[i] for i in short], 2, dtype=torch.float32 if dtype in HALF else None)
        norms[short] = torch.stack(grouped).double()
    unsafe = ~((norms > SAFE[0]) & (norms < SAFE[1]))  # the long ones too, still zero
    for i in unsafe.nonzero().flatten().tolist():
        norms[i] = l2_norm(tensors[i])
    return norms


def to_float32(x: Tensor) -> Tensor:
    """Narrow float64 values: what is finite stays finite, at the largest float32 number."""
    limit = torch.finfo(torch.float32).max
    return torch.where(x.isfinite(), x.clamp(-limit, limit), x).float()
