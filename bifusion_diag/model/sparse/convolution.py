"""Differentiable sparse convolution, and which algorithm does it."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from bifusion_diag.model.sparse import columns, pairs
from bifusion_diag.model.sparse.kernel_map import KernelMap
from bifusion_diag.model.sparse.workspace import Workspace

Strategy = Literal["auto", "pairs", "columns"]

# With so few input channels columns beat pairs on a CPU.
COLUMNS_CHANNELS = 8


def algorithm_for(strategy: Strategy, device: torch.device, in_channels: int | None = None) -> ModuleType:
    """The module that convolves: as asked for, or what suits the device and, if it is known, the layer."""
    if strategy == "auto":
        thin = in_channels is not None and in_channels <= COLUMNS_CHANNELS
        return columns if thin or device.type != "cpu" else pairs
    return {"pairs": pairs, "columns": columns}[strategy]


class _Convolution(Function):
    @staticmethod
    def forward(
        ctx: Any, feats: Tensor, kernel: Tensor, kernel_map: KernelMap, algorithm: ModuleType, work: Workspace
    ) -> Tensor:
        ctx.save_for_backward(feats, kernel)
        ctx.kernel_map, ctx.algorithm, ctx.work = kernel_map, algorithm, work
        result: Tensor = algorithm.convolve(feats, kernel, kernel_map, work)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        feats, kernel = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        grads = ctx.algorithm.gradients(grad_out.contiguous(), feats, kernel, ctx.kernel_map, ctx.work, needs)
        return *grads, None, None, None


def sparse_convolution(
    feats: Tensor, kernel: Tensor, kernel_map: KernelMap, strategy: Strategy, work: Workspace
) -> Tensor:
    """Convolve the features of sparse voxels.

    Args:
        feats: (N, I) features of the input rows.
        kernel: (K, I, O).
        kernel_map: the pairs of input and output rows.
        strategy: how.
        work: buffers to reuse.

    Returns:
        (M, O) features of the output rows.
    """
    algorithm = algorithm_for(strategy, feats.device, feats.shape[1])
    result: Tensor = _Convolution.apply(feats.contiguous(), kernel.contiguous(), kernel_map, algorithm, work)
    return result
