"""A digest of the weights, cheap enough to be taken in the course of training."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from bifusion_diag.probes.ranks import local_part

_ROW = 4096  # numbers that are summed into one
_ROWS = 64  # so many rows are at work at once: they stay in the processor's cache
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def weights_digest(parameters: Iterable[Tensor]) -> str:
    """A digest of the parameters' bits, in their order. Waits for the device once.

    The bits of every number, as an integer, are multiplied with an odd number that belongs to its place, and summed
    modulo 2^64, which gives the same in any order of summation. So it is computed where the weights are, with as many
    threads as there are; only one sum for every 4,096 numbers is copied to the host and hashed.
    """
    sums: list[Tensor] = []
    for parameter in parameters:
        flat = local_part(parameter.detach()).reshape(-1)
        if flat.is_complex():
            flat = torch.view_as_real(flat).reshape(-1)
        words = flat.view(_WORDS[flat.element_size()])
        factors = _factors(words.device)
        whole = len(words) // _ROW * _ROW
        sums += [(rows.long() * factors).sum(1) for rows in words[:whole].view(-1, _ROW).split(_ROWS)]
        rest = words[whole:].long()
        sums.append((rest * factors[: len(rest)]).sum(0, keepdim=True))
    hashed = hashlib.blake2b(digest_size=16)
    if sums:
        hashed.update(torch.cat(sums).cpu().numpy().tobytes())
    return hashed.hexdigest()


@functools.cache
def _factors(device: torch.device) -> Tensor:
    """(4096,) odd int64 numbers without a pattern, the same everywhere."""
    drawn = np.frombuffer(hashlib.shake_128(b"bifusion-diag").digest(8 * _ROW), "<i8") | 1
    return torch.from_numpy(drawn.astype(np.int64)).to(device)
