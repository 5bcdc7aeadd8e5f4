"""How fast this machine multiplies matrices: torch's library, and the OpenBLAS that MinkowskiEngine calls."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

# Rows, inner and outer width: a large product, and what the U-Net's finest scale multiplies for one offset.
SHAPES = ((2048, 256, 256), (1024, 96, 96))
REPEATS = 9


def choose_openblas_kernels() -> None:
    """Tell OpenBLAS which instructions the CPU has. Call it before MinkowskiEngine is loaded.

    An OpenBLAS older than the CPU does not know its model number and falls back to kernels of 2004 (SSE3), a quarter as
    fast: the comparison would flatter us.
    """
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return
    core = "SkylakeX" if {"avx512f", "avx512dq", "avx512vl"} <= flags else "Haswell" if "avx2" in flags else None
    if core:
        os.environ.setdefault("OPENBLAS_CORETYPE", core)


def torch_rate() -> float:
    """FLOP/s of torch's float32 product by process CPU time, the best of a few shapes and repeats."""

    def product(rows: int, inner: int, outer: int) -> Callable[[], object]:
        a, b, out = torch.randn(rows, inner), torch.randn(inner, outer), torch.empty(rows, outer)
        return lambda: torch.mm(a, b, out=out)

    return _best(product)


def openblas_rate() -> tuple[str, float] | None:
    """Name of the kernels and FLOP/s of the OpenBLAS loaded by MinkowskiEngine; None where there is no such library."""
    try:
        library = ctypes.CDLL("libopenblas.so.0")
    except OSError:
        return None
    library.openblas_get_corename.restype = ctypes.c_char_p
    one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
    row_major, plain = 101, 111

    def product(rows: int, inner: int, outer: int) -> Callable[[], object]:
        a, b, out = torch.randn(rows, inner), torch.randn(inner, outer), torch.empty(rows, outer)
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (a, b, out)]

        def run(_keep: object = (a, b, out)) -> None:
            library.cblas_sgemm(
                row_major, plain, plain, rows, outer, inner, one, pointers[0], inner, pointers[1], outer, zero,
                pointers[2], outer,
            )  # fmt: skip

        return run

    return library.openblas_get_corename().decode(), _best(product)


def _best(product: Callable[[int, int, int], Callable[[], object]]) -> float:
    best = 0.0
    for shape in SHAPES:
        run = product(*shape)
        flops = 2.0 * shape[0] * shape[1] * shape[2]
        calls = max(1, int(1e9 / flops))
        for _ in range(REPEATS):
            start = time.process_time()
            for _ in range(calls):
                run()
            best = max(best, flops * calls / (time.process_time() - start))
    return best
