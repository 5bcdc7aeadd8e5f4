"""Sparse convolution by columns: the features of all neighbours side by side, absent ones zero, and one product.

Legend: M output rows · N input rows · K kernel offsets · I, O input and output channels.

All shapes follow from the number of rows: nothing is read back from the device, in forward or in backward, and nothing
is scattered. It multiplies absent neighbours too (on surfaces about half of 27), which a GPU can afford; on a CPU it
is for the few channels of a first layer, where one product over K · I columns beats K thin ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bifusion_diag.model.sparse.kernel_map import KernelMap, PairTable
from bifusion_diag.model.sparse.workspace import Workspace

# Size of the columns laid out at once, in numbers: a CPU's cache holds 4 MiB; a GPU wants few large launches.
CHUNK_NUMBERS_CPU = 1 << 20
CHUNK_NUMBERS_GPU = 1 << 26


def prepare(kernel_map: KernelMap) -> None:
    """Make what convolution and gradients read."""
    _ = kernel_map.forward.columns, kernel_map.backward.columns


def convolve(feats: Tensor, kernel: Tensor, kernel_map: KernelMap, work: Workspace) -> Tensor:
    """out[row] = sum over offsets k of feats[table[k, row]] @ kernel[k]; feats (N, I), kernel (K, I, O) -> (M, O)."""
    return _convolve(feats, kernel, kernel_map.forward, work)


def gradients(
    grad_out: Tensor,
    feats: Tensor,
    kernel: Tensor,
    kernel_map: KernelMap,
    work: Workspace,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of feats, by the table seen from the input rows, and of the kernel: columns transposed @ grad_out."""
    grad_feats = _convolve(grad_out, kernel.transpose(1, 2), kernel_map.backward, work) if needs[0] else None
    grad_kernel = _kernel_gradient(grad_out, feats, kernel, kernel_map.forward, work) if needs[1] else None
    return grad_feats, grad_kernel


def _convolve(feats: Tensor, kernel: Tensor, table: PairTable, work: Workspace) -> Tensor:
    out = feats.new_empty(table.rows, kernel.shape[2])
    flat = (kernel.flip(0) if table.mirrored else kernel).reshape(-1, kernel.shape[2])
    for rows, columns in _column_chunks(feats, table, work):
        torch.mm(columns, flat, out=out[rows])
    return out


def _kernel_gradient(grad_out: Tensor, feats: Tensor, kernel: Tensor, table: PairTable, work: Workspace) -> Tensor:
    flat = kernel.new_zeros(kernel.shape[0] * kernel.shape[1], kernel.shape[2])
    for rows, columns in _column_chunks(feats, table, work):
        flat.addmm_(columns.t(), grad_out[rows])
    gradient = flat.view_as(kernel)
    return gradient.flip(0) if table.mirrored else gradient


def _column_chunks(feats: Tensor, table: PairTable, work: Workspace) -> Iterator[tuple[slice, Tensor]]:
    """Consecutive rows of the table, and their (rows, K · I) columns, valid until the next ones are made."""
    padded = torch.cat([feats.new_zeros(1, feats.shape[1]), feats])  # row 0 stands for absent neighbours
    numbers = CHUNK_NUMBERS_CPU if feats.device.type == "cpu" else CHUNK_NUMBERS_GPU
    width = table.columns.shape[1] * feats.shape[1]
    step = max(1, numbers // width)
    for start in range(0, table.rows, step):
        index = table.columns[start : start + step]
        columns = work.gather("columns", padded, index.view(-1)).view(len(index), width)
        yield slice(start, start + len(index)), columns
