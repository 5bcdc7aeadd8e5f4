"""What decides, beside a step's own state, whether it gives the same bits: threads, kernels, precision."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from bifusion_diag.errors import UserError

_TYPES = ("cpu", "cuda")


def machine(model: nn.Module) -> dict[str, Any]:
    """The device, the CPU threads and all switches of PyTorch that choose kernels, JSON."""
    kind = next((p.device for p in model.parameters()), torch.device("cpu"))
    return {
        "device": torch.cuda.get_device_name(kind) if kind.type == "cuda" else kind.type,
        "device_type": kind.type,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if kind.type == "cuda" else None,
        "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic_warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill_memory": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "cudnn": {name: getattr(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")},
        "mkldnn": torch.backends.mkldnn.enabled,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "flush_denormal": bool(torch.tensor([1e-310], dtype=torch.float64).mul(1.0).eq(0)),
        "autocast": {
            kind: str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
            for kind in _TYPES
            if torch.is_autocast_enabled(kind)
        },
    }


@contextmanager
def as_on(stored: Mapping[str, Any]) -> Iterator[None]:
    """Inside, threads and switches are those that :func:`machine` told.

    Raises:
        UserError: they are none.
    """
    before = machine(nn.Module())
    os.environ.update({"CUBLAS_WORKSPACE_CONFIG": v} if (v := stored.get("cublas_workspace")) else {})
    try:
        with ExitStack() as stack:
            try:
                _switch(stored)
                for kind, dtype in stored["autocast"].items():
                    stack.enter_context(torch.autocast(kind, dtype=getattr(torch, dtype)))
            except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                raise UserError(f"the threads and switches that are stored cannot be set here: {error!r}") from error
            yield
    finally:
        _switch(before)


def _switch(to: Mapping[str, Any]) -> None:
    torch.set_num_threads(to["threads"])
    torch.use_deterministic_algorithms(to["deterministic"], warn_only=to["deterministic_warns"])
    torch.utils.deterministic.fill_uninitialized_memory = to["fill_memory"]  # type: ignore[attr-defined]
    for name, value in to["cudnn"].items():
        setattr(torch.backends.cudnn, name, value)
    torch.backends.mkldnn.set_flags(to["mkldnn"])
    torch.set_float32_matmul_precision(to["matmul_precision"])
    torch.set_default_dtype(getattr(torch, to["default_dtype"]))
    torch.set_flush_denormal(to["flush_denormal"])
