"""CRC-32C (Castagnoli, RFC 3720 B.4), which TensorBoard's files need, many bytes at a time.

A CRC is linear: that of a message is the sum over its pieces of the piece's own, shifted over the bytes behind it. All
pieces are taken at once, byte by byte, then put together. The tensorboard package goes through all bytes in Python.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

PIECE = 128  # bytes
_POLYNOMIAL = 0x82F63B78

Words = NDArray[np.uint32]


def crc32c(data: bytes) -> int:
    """The checksum of some bytes."""
    table, shift = _tables()
    if len(data) < PIECE:
        return _short(data, table)
    padded = np.zeros(-(-len(data) // PIECE) * PIECE, np.uint8)  # zeros in front change nothing
    start = len(padded) - len(data)
    padded[start:] = np.frombuffer(data, np.uint8)
    padded[start : start + 4] ^= 0xFF  # the register begins as all ones
    pieces = padded.reshape(-1, PIECE)
    crc = np.zeros(len(pieces), np.uint32)
    for column in np.ascontiguousarray(pieces.T):
        crc = table[(crc ^ column) & 0xFF] ^ (crc >> 8)
    total = 0
    low, second, third, high = shift
    for one in crc.tolist():
        total = low[total & 255] ^ second[total >> 8 & 255] ^ third[total >> 16 & 255] ^ high[total >> 24] ^ one
    return total ^ 0xFFFFFFFF


def _short(data: bytes, table: Words) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = int(table[(crc ^ byte) & 0xFF]) ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@lru_cache(maxsize=1)
def _tables() -> tuple[Words, list[list[int]]]:
    """The table of one byte, and for each byte of a register, what it becomes when PIECE zero bytes follow."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_POLYNOMIAL), table >> 1).astype(np.uint32)
    register = np.arange(256, dtype=np.uint32) << (8 * np.arange(4, dtype=np.uint32)[:, None])
    for _ in range(PIECE):
        register = table[register & 0xFF] ^ (register >> 8)
    return table, register.tolist()
