"""Initial values, names and the unusual inputs of the layers."""

from __future__ import annotations

import math

import pytest
import torch

from bifusion_diag.model.sparse import BatchNorm, Conv3d, ConvTranspose3d, Engine, make_engine, sparse_tensor
from bifusion_diag.model.sparse.minkowski import load_minkowski


@pytest.mark.parametrize(
    ("layer", "shape", "fan"),
    [
        (Conv3d(16, 64, 3, bias=True), (27, 16, 64), 16 * 27),
        (Conv3d(16, 64, 1), (16, 64), 16),
        (ConvTranspose3d(16, 64, 2, stride=2), (8, 16, 64), 64 * 8),
    ],
)
def test_kernels_have_the_names_shapes_and_initial_range_of_minkowski_engine(
    layer: Conv3d | ConvTranspose3d, shape: tuple[int, ...], fan: int
) -> None:
    assert layer.kernel.shape == shape
    assert set(layer.state_dict()) == {"kernel", "bias"} if layer.bias is not None else {"kernel"}
    bound = 1 / math.sqrt(fan)
    assert 0.95 * bound < float(layer.kernel.detach().abs().max()) <= bound
    assert float(layer.kernel.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)  # uniform


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # MinkowskiEngine's own layers
def test_initial_values_are_those_that_minkowski_engine_draws(minkowski: Engine) -> None:
    torch.manual_seed(3)
    theirs = load_minkowski().MinkowskiConvolution(4, 8, kernel_size=3, bias=True, dimension=3)
    torch.manual_seed(3)
    ours = Conv3d(4, 8, 3, bias=True)
    assert torch.equal(ours.kernel, theirs.kernel)
    assert ours.bias is not None
    assert torch.equal(ours.bias, theirs.bias)


def test_batch_norm_of_one_row_is_its_limit() -> None:
    norm = BatchNorm(3)
    torch.nn.init.normal_(norm.bn.bias)
    feats = torch.randn(1, 3, requires_grad=True)
    out = norm(sparse_tensor(torch.zeros(1, 4, dtype=torch.int32), feats, make_engine("native")))
    assert torch.equal(out.feats[0], norm.bn.bias)
    (out.feats * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert torch.equal(feats.grad, torch.zeros(1, 3))
    assert torch.equal(norm.bn.weight.grad, torch.zeros(3))
    assert torch.equal(norm.bn.bias.grad, torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(norm.bn.running_mean, torch.zeros(3))
    assert torch.equal(norm.bn.running_var, torch.ones(3))


def test_batch_norm_of_one_row_does_not_hide_a_non_finite_input() -> None:
    feats = torch.tensor([[1.0, float("nan"), float("inf")]])
    out = BatchNorm(3)(sparse_tensor(torch.zeros(1, 4, dtype=torch.int32), feats, make_engine("native"))).feats
    assert torch.isfinite(out).tolist() == [[True, False, False]]
