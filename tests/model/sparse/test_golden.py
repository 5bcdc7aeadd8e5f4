"""Both engines against arrays that MinkowskiEngine 0.5.4 produced."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bifusion_diag.model.sparse import (
    BatchNorm,
    Conv3d,
    ConvTranspose3d,
    Engine,
    ReLU,
    SparseTensor,
    sparse_tensor,
    voxelize,
)
from bifusion_diag.model.sparse.kernel_map import kernel_offsets

Load = Callable[[str], dict[str, Tensor]]
Match = Callable[[Tensor, Tensor], Tensor]

CONVOLUTIONS = {
    "conv_k3_s1": (3, 1, 1),
    "conv_k5_s1": (5, 1, 1),
    "conv_k1_s1": (1, 1, 1),
    "conv_k1_s1_bias": (1, 1, 1),
    "conv_k3_d2": (3, 1, 2),
    "conv_k3_s2": (3, 2, 1),
    "conv_k2_s2": (2, 2, 1),
    "conv_k3_s1_on_stride2": (3, 1, 1),
    "conv_k2_s2_on_stride2": (2, 2, 1),
}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert actual.shape == expected.shape
    error = float((actual.detach() - expected).abs().max() / expected.abs().max())
    assert error < tolerance


def downsampled(coords: Tensor, strides: list[int], engine: Engine) -> SparseTensor:
    """A tensor at the last stride, whose finer scales exist."""
    x = sparse_tensor(coords, torch.zeros(len(coords), 1), engine)
    for _ in strides:
        x = Conv3d(1, 1, 2, stride=2)(x)
    return x


def check(layer: nn.Module, x: SparseTensor, data: dict[str, Tensor], match_rows: Match) -> None:
    """Output and gradients of a convolution whose input voxels are those of ``x``."""
    layer.load_state_dict({key: data[key].reshape(value.shape) for key, value in layer.state_dict().items()})
    rows_in = match_rows(x.coords, data["in_coords"])
    feats = data["in_feats"][rows_in].requires_grad_()
    out = layer(x.with_feats(feats))
    assert out.stride == int(data["out_stride"][0])
    rows_out = match_rows(out.coords, data["out_coords"])
    assert_close(out.feats, data["out_feats"][rows_out])
    out.feats.backward(data["grad_out"][rows_out])
    assert feats.grad is not None
    assert_close(feats.grad, data["grad_in"][rows_in])
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        assert_close(parameter.grad, data[f"grad_{name}"].reshape(parameter.shape))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str, engine: Engine, golden: Load, match_rows: Match) -> None:
    data = golden(name)
    size, stride, dilation = CONVOLUTIONS[name]
    if int(data["in_stride"][0]) == 1:
        x = downsampled(data["in_coords"], [], engine)
    else:
        x = downsampled(golden("conv_k2_s2")["in_coords"], [2], engine)
    channels_in, channels_out = data["kernel"].shape[-2:]
    layer = Conv3d(channels_in, channels_out, size, stride=stride, dilation=dilation, bias="bias" in data)
    check(layer, x, data, match_rows)


@pytest.mark.parametrize(("name", "strides"), [("convtr_k2_s2", [2]), ("convtr_k2_s2_stride4_to_2", [2, 4])])
def test_transposed_convolution(name: str, strides: list[int], engine: Engine, golden: Load, match_rows: Match) -> None:
    data = golden(name)
    x = downsampled(golden("conv_k2_s2")["in_coords"], strides, engine)
    layer = ConvTranspose3d(*data["kernel"].shape[1:], 2, stride=2)
    check(layer, x, data, match_rows)


def test_offsets_of_the_kernel(golden: Load) -> None:
    data = golden("kernel_offsets")
    for size in (1, 2, 3, 5):
        assert kernel_offsets(size) == [tuple(offset) for offset in data[f"k{size}"].tolist()]
    assert kernel_offsets(3, 2) == [tuple(offset) for offset in data["k3_dilation2"].tolist()]


def test_batch_norm_and_relu(golden: Load, engine: Engine) -> None:
    data = golden("bn_relu")
    rows = len(data["in_feats"])
    coords = torch.stack([torch.zeros(rows), torch.arange(rows), torch.zeros(rows), torch.zeros(rows)], 1).int()
    norm = BatchNorm(6, momentum=float(data["momentum"]))
    state = {key: data[key.split(".")[-1]] for key in ("bn.weight", "bn.bias")}
    state |= {f"bn.{key}": data[f"{key}_before"] for key in ("running_mean", "running_var")}
    norm.load_state_dict(state, strict=False)
    feats = data["in_feats"].clone().requires_grad_()
    x = sparse_tensor(coords, feats, engine)
    out = ReLU()(norm(x)).feats
    assert_close(out, data["out_feats"])
    out.backward(data["grad_out"])
    assert feats.grad is not None
    assert_close(feats.grad, data["grad_in"])
    assert_close(norm.bn.weight.grad, data["grad_weight"])
    assert_close(norm.bn.bias.grad, data["grad_bias"])
    assert_close(norm.bn.running_mean, data["running_mean_after"])
    assert_close(norm.bn.running_var, data["running_var_after"])
    norm.eval()
    assert_close(ReLU()(norm(x)).feats, data["out_feats_eval"])


def test_voxelisation_and_slicing(golden: Load, engine: Engine, match_rows: Match) -> None:
    data = golden("voxelize_average_slice")
    feats = data["field_feats"].clone().requires_grad_()
    points = data["field_coords"]
    voxels = voxelize(points[:, 1:], feats, points[:, 0].long(), 1.0, engine)
    rows = match_rows(voxels.tensor.coords, data["voxel_coords"])
    assert torch.equal(rows[voxels.inverse], data["inverse_map"].long())
    assert_close(voxels.tensor.feats, data["voxel_feats"][rows])
    voxels.tensor.feats.backward(data["grad_voxel"][rows])
    assert feats.grad is not None
    assert_close(feats.grad, data["grad_field"])
    inner = data["slice_in"][rows].requires_grad_()
    sliced = voxels.slice(voxels.tensor.with_feats(inner))
    assert_close(sliced, data["slice_out"])
    sliced.backward(data["slice_grad_out"])
    assert inner.grad is not None
    assert_close(inner.grad, data["slice_grad_in"][rows])
