"""The native engine's arithmetic: numerical gradients, dense convolution, order of rows, chunk boundaries."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bifusion_diag.model.sparse import (
    Conv3d,
    ConvTranspose3d,
    SparseTensor,
    chunks,
    columns,
    convolution,
    kernel_map,
    make_engine,
    sparse_tensor,
)
from bifusion_diag.model.sparse.native import NativeEngine

Draw = Callable[..., Tensor]

LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "k3": lambda i, o: Conv3d(i, o, 3),
    "k5": lambda i, o: Conv3d(i, o, 5),
    "k1": lambda i, o: Conv3d(i, o, 1, bias=True),
    "k3 dilated": lambda i, o: Conv3d(i, o, 3, dilation=2, bias=True),
    "k2 stride 1": lambda i, o: Conv3d(i, o, 2),
    "k2 stride 2": lambda i, o: Conv3d(i, o, 2, stride=2),
    "k3 stride 2": lambda i, o: Conv3d(i, o, 3, stride=2),
    "down and up": lambda i, o: nn.Sequential(Conv3d(i, o, 2, stride=2), ConvTranspose3d(o, o, 2, stride=2)),
    "down and up, overlapping": lambda i, o: nn.Sequential(
        Conv3d(i, o, 3, stride=2), ConvTranspose3d(o, o, 3, stride=2)
    ),
}


@pytest.fixture(params=["pairs", "columns"])
def algorithm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force one of the two algorithms, in pieces so small that every layer needs several."""
    monkeypatch.setattr(convolution, "COLUMNS_CHANNELS", 0 if request.param == "pairs" else 1 << 20)
    monkeypatch.setattr(columns, "CHUNK_NUMBERS_CPU", 1000)
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 7)
    monkeypatch.setattr(chunks, "PIECE_PAIRS", 10)
    return str(request.param)


def run(layer: nn.Module, coords: Tensor, feats: Tensor) -> SparseTensor:
    out = layer(sparse_tensor(coords, feats, make_engine("native")))
    assert isinstance(out, SparseTensor)
    return out


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_agree_with_finite_differences(name: str, algorithm: str, some_voxels: Draw) -> None:
    layer = LAYERS[name](2, 3).double()
    coords = some_voxels(40)
    feats = torch.randn(len(coords), 2, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def function(feats: Tensor, *values: Tensor) -> Tensor:
        x = sparse_tensor(coords, feats, make_engine("native"))
        out = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        return out.feats

    assert torch.autograd.gradcheck(function, (feats, *parameters), fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_a_gradient_is_the_same_when_the_other_is_not_wanted(name: str, algorithm: str, some_voxels: Draw) -> None:
    coords, feats, layer = some_voxels(40), torch.randn(40, 2), LAYERS[name](2, 3)

    def gradients(of_feats: bool, of_kernel: bool) -> tuple[Tensor | None, list[Tensor | None]]:
        layer.zero_grad()
        layer.requires_grad_(of_kernel)
        inputs = feats.t().contiguous().t().requires_grad_(of_feats)  # rows that are not side by side in memory
        run(layer, coords, inputs).feats.square().sum().backward()
        return inputs.grad, [parameter.grad for parameter in layer.parameters()]

    grad_feats, grad_kernels = gradients(True, True)
    only_feats, nothing = gradients(True, False)
    none, only_kernels = gradients(False, True)
    assert none is None
    assert not any(grad is not None for grad in nothing)
    for both, alone in zip([grad_feats, *grad_kernels], [only_feats, *only_kernels], strict=True):
        assert both is not None
        assert alone is not None
        assert torch.equal(both, alone)


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("dilation", [1, 2])
def test_agrees_with_a_dense_convolution(size: int, dilation: int, algorithm: str, some_voxels: Draw) -> None:
    coords = some_voxels(150).long()
    layer = Conv3d(2, 3, size, dilation=dilation).double()
    feats = torch.randn(len(coords), 2, dtype=torch.float64)
    out = run(layer, coords, feats)

    batch, x, y, z = coords.unbind(1)
    dense = torch.zeros(2, 2, 6, 6, 6, dtype=torch.float64)
    dense[batch, :, z + 3, y + 3, x + 3] = feats
    kernel = layer.kernel.view(size, size, size, 2, 3).permute(4, 3, 0, 1, 2)  # the kernel's order is z, y, x
    expected = F.conv3d(dense, kernel, padding=dilation * (size // 2), dilation=dilation)
    batch, x, y, z = out.coords.long().unbind(1)
    torch.testing.assert_close(out.feats, expected[batch, :, z + 3, y + 3, x + 3], rtol=1e-12, atol=1e-12)


def test_strided_convolution_and_its_transpose_agree_with_dense_ones(some_voxels: Draw) -> None:
    coords = some_voxels(2 * 6**3, extent=6).long()  # every cell of [-3, 3)³: the coarse cells are [-2, 1]³
    down, up = Conv3d(2, 3, 2, stride=2).double(), ConvTranspose3d(3, 4, 2, stride=2).double()
    feats = torch.randn(len(coords), 2, dtype=torch.float64)
    coarse = run(down, coords, feats)
    fine = up(coarse)

    batch, x, y, z = coords.unbind(1)
    dense = torch.zeros(2, 2, 8, 8, 8, dtype=torch.float64)
    dense[batch, :, z + 4, y + 4, x + 4] = feats
    dense_coarse = F.conv3d(dense, down.kernel.view(2, 2, 2, 2, 3).permute(4, 3, 0, 1, 2), stride=2)
    dense_fine = F.conv_transpose3d(dense_coarse, up.kernel.view(2, 2, 2, 3, 4).permute(3, 4, 0, 1, 2), stride=2)
    for out, expected, step in ((coarse, dense_coarse, 2), (fine, dense_fine, 1)):
        batch, x, y, z = out.coords.long().unbind(1)
        values = expected[batch, :, (z + 4) // step, (y + 4) // step, (x + 4) // step]
        torch.testing.assert_close(out.feats, values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("size", "stride"), [(2, 2), (3, 2), (3, 3), (2, 3), (5, 3), (3, 4), (4, 4)])
def test_strided_convolution_agrees_with_a_loop(size: int, stride: int, algorithm: str, some_voxels: Draw) -> None:
    coords = some_voxels(300, extent=11)
    layer = Conv3d(2, 3, size, stride=stride).double()
    feats = torch.randn(len(coords), 2, dtype=torch.float64)
    out = run(layer, coords, feats)

    row = {tuple(coord): feat for coord, feat in zip(coords.tolist(), feats, strict=True)}
    corners = {(b, *(value // stride * stride for value in place)) for b, *place in row}
    assert sorted(corners) == [tuple(coord) for coord in out.coords.tolist()]
    steps = range(-(size // 2), size // 2 + 1) if size % 2 else range(size)
    for (b, x, y, z), found in zip(out.coords.tolist(), out.feats, strict=True):
        window = [(b, x + i, y + j, z + k) for k in steps for j in steps for i in steps]
        pairs = zip(window, layer.kernel, strict=True)
        expected = sum((row[place] @ weight for place, weight in pairs if place in row), start=torch.zeros(3).double())
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_bits_do_not_depend_on_the_run_or_the_order_of_rows(name: str, algorithm: str, some_voxels: Draw) -> None:
    coords = some_voxels(120)
    feats = torch.randn(len(coords), 9)
    layer = LAYERS[name](9, 5)
    weight = torch.randn(5)

    def results(order: Tensor) -> tuple[Tensor, ...]:
        layer.zero_grad()
        inputs = feats[order].requires_grad_()
        out = run(layer, coords[order], inputs)
        (out.feats.square() @ weight).sum().backward()
        assert inputs.grad is not None
        gradient = torch.empty_like(feats).index_copy_(0, order, inputs.grad)
        return out.coords, out.feats, gradient, *(p.grad for p in layer.parameters() if p.grad is not None)

    first = results(torch.arange(len(coords)))
    for order in (torch.arange(len(coords)), torch.randperm(len(coords))):
        for one, other in zip(first, results(order), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", LAYERS)
def test_chunks_do_not_change_the_result(name: str, some_voxels: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    coords = some_voxels(120)
    feats = torch.randn(len(coords), 9, dtype=torch.float64)
    layer = LAYERS[name](9, 5).double()
    whole = run(layer, coords, feats).feats
    for rows in (1, 8, 119, 120):
        monkeypatch.setattr(chunks, "CHUNK_ROWS", rows)
        torch.testing.assert_close(run(layer, coords, feats).feats, whole, rtol=1e-12, atol=1e-12)


def test_a_voxel_without_neighbours_meets_only_the_centre(algorithm: str) -> None:
    coords = torch.tensor([[0, 0, 0, 0], [0, 50, 0, 0], [1, 1, 0, 0]], dtype=torch.int32)
    layer = Conv3d(2, 3, 3)
    feats = torch.randn(3, 2)
    out = run(layer, coords, feats)
    torch.testing.assert_close(out.feats, feats @ layer.kernel[13])
    out.feats.sum().backward()
    assert layer.kernel.grad is not None
    assert torch.count_nonzero(layer.kernel.grad.abs().sum((1, 2))) == 1


def test_a_row_without_any_partner_is_zero(algorithm: str) -> None:
    """Under an even kernel of stride 3 a voxel at offset 2 of its cell meets nothing."""
    layer = Conv3d(2, 3, 2, stride=3)
    out = run(layer, torch.tensor([[0, 2, 2, 2]]), torch.randn(1, 2, requires_grad=True))
    assert torch.equal(out.coords, torch.tensor([[0, 0, 0, 0]], dtype=torch.int32))
    assert torch.equal(out.feats, torch.zeros(1, 3))
    out.feats.sum().backward()
    assert layer.kernel.grad is not None
    assert not layer.kernel.grad.any()


def test_voxels_seen_in_inference_mode_train_afterwards(algorithm: str, some_voxels: Draw) -> None:
    layer = Conv3d(2, 3, 3)
    x = sparse_tensor(some_voxels(50), torch.randn(50, 2), make_engine("native"))
    with torch.inference_mode():
        expected = layer(x).feats.clone()
    out = layer(x).feats
    assert torch.equal(out, expected)
    out.sum().backward()
    assert layer.kernel.grad is not None


@pytest.mark.parametrize("strategy", ["pairs", "columns"])
def test_threads_may_share_voxels(strategy: convolution.Strategy) -> None:
    coords = torch.cartesian_prod(torch.zeros(1).int(), *[torch.arange(16).int()] * 3)
    x = sparse_tensor(coords, torch.randn(len(coords), 16), NativeEngine(strategy))
    layer = Conv3d(16, 16, 3)
    expected = layer(x).feats
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: layer(x).feats, range(16)):
            torch.testing.assert_close(out, expected)


def test_layers_of_one_geometry_share_their_map(some_voxels: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    original = kernel_map.symmetric_map
    monkeypatch.setattr(
        "bifusion_diag.model.sparse.native.symmetric_map", lambda table: built.append(1) or original(table)
    )
    net = nn.Sequential(Conv3d(2, 2, 3), Conv3d(2, 2, 3), Conv3d(2, 2, 2, stride=2), Conv3d(2, 2, 3), Conv3d(2, 2, 3))
    coords = some_voxels(50)
    net(sparse_tensor(coords, torch.randn(50, 2), make_engine("native")))
    assert len(built) == 2
