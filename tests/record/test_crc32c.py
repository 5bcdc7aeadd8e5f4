"""The checksum against TensorBoard's own, byte by byte, and against the standard's values."""

from __future__ import annotations

import numpy as np
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c as slow

from bifusion_diag.record.crc32c import PIECE, crc32c


def test_against_one_byte_at_a_time() -> None:
    rng = np.random.default_rng(0)
    for size in (0, 1, 3, 4, 5, 8, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 3 * PIECE - 2, 10_007):
        data = rng.bytes(size)
        assert crc32c(data) == slow(data), size


def test_values_of_the_standard() -> None:
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720 B.4
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(b"123456789" * 100) == slow(b"123456789" * 100)
