"""Heads against their formulas, and the gain of the L2 normalisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bifusion_diag.model.heads import L2Normalize, ProjectionHead, VoxelHead
from bifusion_diag.model.sparse import make_engine, sparse_tensor


def test_projection_head_is_the_documents_chain() -> None:
    head = ProjectionHead(768, 512, 256)
    norm, first, last = head.layers[0], head.layers[2], head.layers[4]
    tokens = torch.randn(7, 768) * 3 + 1
    centred = tokens - tokens.mean(1, keepdim=True)
    normed = centred / (tokens.var(1, unbiased=False, keepdim=True) + norm.eps).sqrt()

    def gelu(x: torch.Tensor) -> torch.Tensor:
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    want = gelu(gelu(normed) @ first.weight.T) @ last.weight.T  # biases start at zero
    torch.testing.assert_close(head(tokens), want, rtol=1e-4, atol=1e-5)
    bound = (6 / (768 + 512)) ** 0.5  # Xavier's
    assert 0.95 * bound < first.weight.abs().max() <= bound
    assert sum(p.numel() for p in head.parameters()) == 2 * 768 + (768 + 1) * 512 + (512 + 1) * 256


def test_projection_head_options() -> None:
    head = ProjectionHead(16, 8, 4, dropout=0.5, batchnorm=True)
    assert [type(layer) for layer in head.layers] == [
        nn.LayerNorm,
        nn.GELU,
        nn.Linear,
        nn.BatchNorm1d,
        nn.GELU,
        nn.Dropout,
        nn.Linear,
    ]
    assert head(torch.randn(3, 16)).shape == (3, 4)


def test_voxel_head_is_a_1x1_convolution_with_batchnorm_and_relu() -> None:
    head = VoxelHead(6, 5)
    rows = torch.randn(40, 6)
    cells = torch.cat([torch.zeros(40, 1), torch.arange(40)[:, None].repeat(1, 3)], 1).int()
    x = sparse_tensor(cells, rows, make_engine("native"))
    mixed = x.feats @ head.conv.kernel
    want = ((mixed - mixed.mean(0)) / (mixed.var(0, unbiased=False) + 1e-5).sqrt()).relu()
    torch.testing.assert_close(head(x).feats, want)


@pytest.mark.parametrize("dim", [0, 1])
def test_normalisation_has_unit_length_and_a_gain_of_1e12_at_zero(dim: int) -> None:
    normalize = L2Normalize(dim)
    x = torch.randn(4, 4)
    torch.testing.assert_close(torch.linalg.vector_norm(normalize(x), dim=dim), torch.ones(4))
    zero = torch.zeros(4, 4, requires_grad=True)
    normalize(zero).sum().backward()
    assert zero.grad is not None
    torch.testing.assert_close(zero.grad, torch.full((4, 4), 1e12))
