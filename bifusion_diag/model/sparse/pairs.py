"""Sparse convolution pair by pair: gather, one matrix product per kernel offset, gather-reduce.

Legend: M output rows · N input rows · K kernel offsets · I, O input and output channels · P pairs.

It multiplies the pairs that exist and no others: on real surfaces about half of 27 neighbours do. That is what a CPU
wants. No scatter and no atomics: every output row is the sum of its own pairs in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bifusion_diag.model.sparse.chunks import Chunk
from bifusion_diag.model.sparse.kernel_map import KernelMap, PairTable
from bifusion_diag.model.sparse.workspace import Workspace


def prepare(kernel_map: KernelMap) -> None:
    """Make what convolution and gradients read."""
    _ = kernel_map.forward.chunks, kernel_map.backward.chunks


def convolve(feats: Tensor, kernel: Tensor, kernel_map: KernelMap, work: Workspace) -> Tensor:
    """out[row] = sum over offsets k of feats[table[k, row]] @ kernel[k]; feats (N, I), kernel (K, I, O) -> (M, O)."""
    table = kernel_map.forward
    out = feats.new_empty(table.rows, kernel.shape[2])
    kernels = _by_offset(kernel, table)
    for chunk in table.chunks:
        rows = slice(chunk.start, chunk.stop)
        products = work.take("products", chunk.pairs, kernel.shape[2], feats)
        room = iter(products.split(chunk.lengths))
        for piece in chunk.pieces:
            gathered = work.gather("gathered", feats, piece.source).split(piece.lengths)
            for index, partners in zip(piece.offsets, gathered, strict=True):
                torch.mm(partners, kernels[index], out=next(room))
        _reduce(chunk, products, table, out[rows])
        if table.centre is not None:
            out[rows].addmm_(feats[rows], kernels[table.centre])
    return out


def gradients(
    grad_out: Tensor,
    feats: Tensor,
    kernel: Tensor,
    kernel_map: KernelMap,
    work: Workspace,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of feats and kernel: the same algorithm over the pairs seen from the input rows.

    One gather of the output gradient serves both.
    """
    table = kernel_map.backward
    grad_feats = torch.empty_like(feats) if needs[0] else None
    sums = _KernelGradient(kernel, table) if needs[1] else None
    kernels = _by_offset(kernel.transpose(1, 2), table)
    for chunk in table.chunks:
        rows = slice(chunk.start, chunk.stop)
        products = work.take("products", chunk.pairs, kernel.shape[1], feats)
        room = iter(products.split(chunk.lengths))
        for piece in chunk.pieces:
            gathered = work.gather("gathered", grad_out, piece.source).split(piece.lengths)
            if grad_feats is not None:
                for index, grads in zip(piece.offsets, gathered, strict=True):
                    torch.mm(grads, kernels[index], out=next(room))
            if sums is not None:
                own = work.gather("own", feats[rows], piece.local).t().split(piece.lengths, 1)
                for index, inputs, grads in zip(piece.offsets, own, gathered, strict=True):
                    sums.add(index, inputs, grads)
        if grad_feats is not None:
            _reduce(chunk, products, table, grad_feats[rows])
        if table.centre is not None and grad_feats is not None:
            grad_feats[rows].addmm_(grad_out[rows], kernels[table.centre])
        if table.centre is not None and sums is not None:
            sums.add(table.centre, feats[rows].t(), grad_out[rows])
    return grad_feats, None if sums is None else sums.finish()


class _KernelGradient:
    """Sums of inputsᵀ @ grads by offset. The first one is written, not added: nothing has to be zeroed for it."""

    def __init__(self, kernel: Tensor, table: PairTable) -> None:
        self._total = torch.empty_like(kernel)
        self._sums = _by_offset(self._total, table)
        self._untouched = set(range(len(kernel)))

    def add(self, index: int, inputs: Tensor, grads: Tensor) -> None:
        """Add inputs (I, P) @ grads (P, O) to the gradient under an offset of the table."""
        if index in self._untouched:
            self._untouched.remove(index)
            torch.mm(inputs, grads, out=self._sums[index])
        else:
            self._sums[index].addmm_(inputs, grads)

    def finish(self) -> Tensor:
        """The gradient (K, I, O); offsets without a pair have none."""
        for index in self._untouched:
            self._sums[index].zero_()
        return self._total


def _by_offset(kernel: Tensor, table: PairTable) -> tuple[Tensor, ...]:
    """The kernel's K matrices in the order of the table's offsets."""
    matrices = kernel.unbind(0)
    return matrices[::-1] if table.mirrored else matrices


def _reduce(chunk: Chunk, products: Tensor, table: PairTable, out: Tensor) -> None:
    """Sum the products of every row of a chunk into out (rows, channels)."""
    if table.single:
        torch.index_select(products, 0, chunk.bag, out=out)
    elif len(chunk.bag):
        out.copy_(F.embedding_bag(chunk.bag, products, chunk.bag_start, mode="sum"))
    else:
        out.zero_()
