"""The digest of the weights: every bit counts, wherever it is, and nothing else does."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from bifusion_diag.training.fingerprint import weights_digest


def slow(tensors: list[torch.Tensor]) -> str:
    """As documented, with Python's integers."""
    drawn = hashlib.shake_128(b"bifusion-diag").digest(8 * 4096)
    factors = [int.from_bytes(drawn[8 * i : 8 * i + 8], "little") | 1 for i in range(4096)]
    sums: list[int] = []
    for tensor in tensors:
        words = tensor.detach().contiguous().numpy().reshape(-1).view(f"<i{tensor.element_size()}").tolist()
        whole = len(words) // 4096 * 4096
        rows = [words[i : i + 4096] for i in range(0, whole, 4096)]
        sums += [sum(w * f for w, f in zip(row, factors, strict=False)) for row in [*rows, words[whole:]]]
    packed = np.array([number % 2**64 for number in sums], "<u8").tobytes()
    return hashlib.blake2b(packed, digest_size=16).hexdigest()


def test_it_is_what_it_says() -> None:
    tensors = [torch.randn(3, 4100), torch.randn(5).double(), torch.randn(70, 7).half(), torch.randn(6, 4).t()]
    assert weights_digest(tensors) == slow(tensors)
    assert weights_digest(iter(tensors)) != weights_digest(tensors[::-1])


@pytest.mark.parametrize("place", [0, 4095, 4096, 300_000, 300_001])  # the last is in the part of a row that is left
@pytest.mark.parametrize("bit", [0, 22, 31])
def test_every_bit_counts(place: int, bit: int) -> None:
    weights = torch.randn(300_002)
    before = weights_digest([weights])
    words = weights.view(torch.int32)
    words[place] ^= -(1 << 31) if bit == 31 else 1 << bit
    changed = weights_digest([weights])
    words[place] ^= -(1 << 31) if bit == 31 else 1 << bit
    assert before == weights_digest([weights]) != changed


def test_it_does_not_depend_on_threads_and_changes_nothing() -> None:
    weights = torch.nn.Parameter(torch.randn(1000, 1000))
    state = torch.get_rng_state()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(weights_digest([weights]))
    torch.set_num_threads(1)
    assert found[0] == found[1]
    assert torch.equal(state, torch.get_rng_state())
    assert (weights.grad, weights.requires_grad) == (None, True)


def test_odd_shapes_have_digests() -> None:
    shapes = [torch.zeros(0), torch.ones(()), torch.ones(2, dtype=torch.complex64), torch.tensor([float("nan")])]
    assert len({weights_digest([one]) for one in shapes} | {weights_digest([])}) == 5
