"""Memory is measured whatever the process did before."""

from __future__ import annotations

import pytest

from benchmarks.process import peak_growth

BLOCK, BLOCKS = 100_000, 500


def take() -> list[bytearray]:
    return [bytearray(BLOCK) for _ in range(BLOCKS)]


def test_memory_that_was_freed_before_counts_again() -> None:
    before = take()
    pin = bytearray(BLOCK)  # above them: else the heap shrinks by itself
    del before
    assert peak_growth(take) == pytest.approx(BLOCK * BLOCKS, rel=0.1)
    assert len(pin) == BLOCK
