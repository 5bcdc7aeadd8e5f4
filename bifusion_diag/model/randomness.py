"""Random numbers that leave the others as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_random_numbers(purpose: str) -> Iterator[None]:
    """Draw inside from a CPU generator of one's own, seeded by the run's seed and the purpose.

    So that switching a part on or off leaves the random weights of all other parts as they are.
    """
    text = f"{torch.initial_seed()} {purpose}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
