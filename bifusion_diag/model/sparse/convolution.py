"""Sparse convolution as gather, matrix product and gather-reduce: differentiable, and the same bits on every run.

Legend: M output rows · K kernel offsets · I, O input and output channels.

No scatter and no atomics: every output row is the sum of its own pairs in a fixed order. The backward pass is the same
algorithm over the pairs seen from the input rows; one gather of the output gradient serves both gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional as F

from bifusion_diag.model.sparse.kernel_map import Chunk, KernelMap, PairTable

# With so few channels one product over K · I columns beats K thin ones, although absent neighbours are multiplied too.
IM2COL_CHANNELS = 8
IM2COL_NUMBERS = 1 << 20


class Workspace:
    """Buffers that are written again and again: a fresh large tensor costs several times as much as a used one."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """A (rows, columns) tensor of unspecified content, valid until the same name is taken again."""
        needed = rows * columns
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < needed or buffer.dtype != like.dtype or buffer.device != like.device:
            buffer = self._buffers[name] = torch.empty(needed, dtype=like.dtype, device=like.device)
        return buffer[:needed].view(rows, columns)


def _reduce(chunk: Chunk, products: Tensor, single: bool, out: Tensor) -> None:
    """Sum the products of every row of a chunk into out (rows, channels)."""
    if single:
        torch.index_select(products, 0, chunk.bag, out=out)
    elif len(chunk.bag):
        out.copy_(F.embedding_bag(chunk.bag, products, chunk.bag_start, mode="sum"))
    else:
        out.zero_()


def _multiply(
    chunk: Chunk, gathered: Tensor, own: Tensor, kernels: Sequence[Tensor], centre: int | None, work: Workspace
) -> Tensor:
    """Products of all pairs of a chunk.

    Args:
        gathered: (P, I) partner rows.
        own: (rows, I) the partners under the centre offset, used if there is one.
        kernels: K times (I, O).

    Returns:
        (P, O) or, with a centre offset, (P + rows, O), in a workspace.
    """
    pairs = len(gathered)
    total = pairs if centre is None else pairs + len(own)
    products = work.take("products", total, kernels[0].shape[1], gathered)
    runs = zip(chunk.offsets, gathered.split(chunk.lengths), products[:pairs].split(chunk.lengths), strict=True)
    for index, partners, product in runs:
        torch.mm(partners, kernels[index], out=product)
    if centre is not None:
        torch.mm(own, kernels[centre], out=products[pairs:])
    return products


def _gather(feats: Tensor, index: Tensor, name: str, work: Workspace) -> Tensor:
    return torch.index_select(feats, 0, index, out=work.take(name, len(index), feats.shape[1], feats))


def convolve_pairs(feats: Tensor, kernel: Tensor, table: PairTable, work: Workspace) -> Tensor:
    """out[row] = sum over offsets k of feats[table[k, row]] @ kernel[k]; feats (N, I), kernel (K, I, O) -> (M, O)."""
    out = feats.new_empty(table.rows, kernel.shape[2])
    kernels = kernel.unbind(0)
    for chunk in table.chunks:
        rows = slice(chunk.start, chunk.stop)
        gathered = _gather(feats, chunk.source, "gathered", work)
        _reduce(chunk, _multiply(chunk, gathered, feats[rows], kernels, table.centre, work), table.single, out[rows])
    return out


def _pairs_backward(
    grad_out: Tensor, feats: Tensor, kernel: Tensor, table: PairTable, work: Workspace, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    grad_feats = torch.empty_like(feats) if needs[0] else None
    grad_kernel = torch.zeros_like(kernel) if needs[1] else None
    transposed = kernel.transpose(1, 2).unbind(0)
    sums = () if grad_kernel is None else grad_kernel.unbind(0)
    for chunk in table.chunks:
        rows = slice(chunk.start, chunk.stop)
        gathered = _gather(grad_out, chunk.source, "gathered", work)
        if grad_feats is not None:
            products = _multiply(chunk, gathered, grad_out[rows], transposed, table.centre, work)
            _reduce(chunk, products, table.single, grad_feats[rows])
        if grad_kernel is not None:
            own = _gather(feats[rows], chunk.local, "own", work)
            runs = zip(chunk.offsets, own.t().split(chunk.lengths, 1), gathered.split(chunk.lengths), strict=True)
            for index, inputs, grads in runs:
                sums[index].addmm_(inputs, grads)
            if table.centre is not None:
                sums[table.centre].addmm_(feats[rows].t(), grad_out[rows])
    return grad_feats, grad_kernel


class _PairConvolution(Function):
    """Gather the pairs, multiply by offset, sum by row."""

    @staticmethod
    def forward(ctx: Any, feats: Tensor, kernel: Tensor, kernel_map: KernelMap, work: Workspace) -> Tensor:
        ctx.save_for_backward(feats, kernel)
        ctx.kernel_map, ctx.work = kernel_map, work
        return convolve_pairs(feats, kernel, kernel_map.forward, work)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        feats, kernel = ctx.saved_tensors
        grads = _pairs_backward(
            grad_out.contiguous(), feats, kernel, ctx.kernel_map.backward, ctx.work, ctx.needs_input_grad[:2]
        )
        return *grads, None, None


def _column_chunks(columns: Tensor, channels: int) -> list[tuple[int, int]]:
    step = max(1, IM2COL_NUMBERS // (columns.shape[1] * channels))
    return [(start, min(start + step, len(columns))) for start in range(0, len(columns), step)]


def _fill_columns(padded: Tensor, columns: Tensor, work: Workspace) -> Tensor:
    """(rows, K · I): the features of all neighbours side by side, zeros where there is none."""
    flat = _gather(padded, columns.view(-1), "columns", work)
    return flat.view(len(columns), -1)


def convolve_columns(feats: Tensor, kernel: Tensor, table: PairTable, work: Workspace) -> Tensor:
    """The same as :func:`convolve_pairs`, by one product over all neighbours, absent ones being zero."""
    padded = torch.cat([feats.new_zeros(1, feats.shape[1]), feats])
    out = feats.new_empty(table.rows, kernel.shape[2])
    flat = kernel.reshape(-1, kernel.shape[2])
    for start, stop in _column_chunks(table.columns, feats.shape[1]):
        torch.mm(_fill_columns(padded, table.columns[start:stop], work), flat, out=out[start:stop])
    return out


class _ColumnConvolution(Function):
    """Lay the neighbours side by side, multiply once."""

    @staticmethod
    def forward(ctx: Any, feats: Tensor, kernel: Tensor, kernel_map: KernelMap, work: Workspace) -> Tensor:
        ctx.save_for_backward(feats, kernel)
        ctx.kernel_map, ctx.work = kernel_map, work
        return convolve_columns(feats, kernel, kernel_map.forward, work)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        feats, kernel = ctx.saved_tensors
        grad_out, work, table = grad_out.contiguous(), ctx.work, ctx.kernel_map.forward
        grad_feats, grad_kernel = None, None
        if ctx.needs_input_grad[0]:
            grad_feats = convolve_columns(grad_out, kernel.transpose(1, 2), ctx.kernel_map.backward, work)
        if ctx.needs_input_grad[1]:
            padded = torch.cat([feats.new_zeros(1, feats.shape[1]), feats])
            grad_kernel = torch.zeros_like(kernel)
            flat = grad_kernel.view(-1, kernel.shape[2])
            for start, stop in _column_chunks(table.columns, feats.shape[1]):
                columns = _fill_columns(padded, table.columns[start:stop], work)
                flat.addmm_(columns.t(), grad_out[start:stop])
        return grad_feats, grad_kernel, None, None


def sparse_convolution(feats: Tensor, kernel: Tensor, kernel_map: KernelMap, work: Workspace) -> Tensor:
    """Convolve the features of sparse voxels.

    Args:
        feats: (N, I) features of the input rows.
        kernel: (K, I, O).
        kernel_map: the pairs of input and output rows.
        work: buffers to reuse.

    Returns:
        (M, O) features of the output rows.
    """
    function = _ColumnConvolution if feats.shape[1] <= IM2COL_CHANNELS else _PairConvolution
    return function.apply(feats.contiguous(), kernel.contiguous(), kernel_map, work)
