"""What runs on a GPU: no host synchronisation and no atomics in forward or backward, and the same numbers.

Without a GPU three things stand in for it: a mode that sees every operation, the `meta` device, whose tensors have no
values that a host could read, and the columns algorithm in float64 beside the one for CPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bifusion_diag.config.settings import BackboneSettings
from bifusion_diag.model.sparse import SparseTensor, Voxels, columns
from bifusion_diag.model.sparse.convolution import Strategy
from bifusion_diag.model.sparse.kernel_map import PairTable
from bifusion_diag.model.sparse.native import NativeEngine, NativeMaps
from bifusion_diag.model.unet import Res16UNet

TINY = BackboneSettings(init_dim=8, planes=(8, 12, 16, 24, 16, 16, 12, 8), voxel_size=0.05)

# They wait for the device, because the host needs a value or a shape that depends on values.
SYNCHRONISING = {
    "_local_scalar_dense", "nonzero", "_unique", "_unique2", "unique_dim", "unique_consecutive", "masked_select",
    "equal", "is_nonzero", "bincount", "repeat_interleave", "_index_put_impl",
}  # fmt: skip
# On CUDA they add with atomics.
ATOMIC = {
    "index_add", "scatter_add", "scatter_reduce", "index_reduce", "_embedding_bag_backward", "histc",
    "_embedding_bag_dense_backward", "embedding_dense_backward", "index_select_backward", "put", "segment_reduce",
}  # fmt: skip


class ForbidSlowOperations(TorchDispatchMode):
    """Raises where a GPU would wait for the host, or add in an order of its own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name in SYNCHRONISING | ATOMIC:
            raise AssertionError(f"{name} synchronises or uses atomics")
        if name in ("index", "index_put"):
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            accumulates = name == "index_put" and (
                args[3] if len(args) > 3 else (kwargs or {}).get("accumulate", False)
            )
            if masks or accumulates:
                raise AssertionError(f"{name} with a mask or by accumulation synchronises or uses atomics")
        return func(*args, **(kwargs or {}))


def points(count: int = 500) -> tuple[Tensor, Tensor, Tensor]:
    """Two scenes on planes."""
    coords = torch.rand(count, 3) * 0.5
    coords[torch.arange(count), torch.randint(0, 3, (count,))] = 0.0
    return coords, torch.randn(count, 3), torch.arange(count) * 2 // count


def network(strategy: Strategy) -> Res16UNet:
    torch.manual_seed(3)
    return Res16UNet(TINY, engine=NativeEngine(strategy))


def forward_backward(net: Res16UNet, voxels: Voxels) -> Tensor:
    out = voxels.slice(net(voxels.tensor))
    out.square().sum().backward()
    return out


def test_no_synchronisation_and_no_atomics_once_the_points_are_voxelised() -> None:
    net = network("columns")
    coords, feats, scene = points()
    voxels = net.voxelize(coords, feats.requires_grad_(), scene)
    with ForbidSlowOperations():
        forward_backward(net, voxels)
    assert feats.grad is not None


@pytest.mark.parametrize(
    "slow",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: torch.zeros(9).index_add_(0, torch.zeros(9, dtype=torch.long), x),
        lambda x: x.gather(0, torch.zeros(9, dtype=torch.long)).sum().backward(),
        lambda x: x[torch.zeros(9, dtype=torch.long)].sum().backward(),
        lambda x: x.index_select(0, torch.zeros(9, dtype=torch.long)).sum().backward(),
    ],
)
def test_the_mode_notices_them(slow: Callable[[Tensor], Any]) -> None:
    with pytest.raises(AssertionError, match="atomics"), ForbidSlowOperations():
        slow(torch.randn(9, requires_grad=True))


def test_the_algorithm_for_cpus_lists_its_pairs_during_the_forward_pass() -> None:
    """So the mode above sees what it has to see in this network, too."""
    net = network("pairs")
    voxels = net.voxelize(*points())
    with pytest.raises(AssertionError, match="nonzero"), ForbidSlowOperations():
        net(voxels.tensor)


def on_meta(voxels: Voxels) -> Voxels:
    """The same voxels without any values: only shapes are left."""
    maps = voxels.tensor.maps
    assert isinstance(maps, NativeMaps)
    for kernel_map in maps._maps.values():
        for table in (kernel_map.forward, kernel_map.backward):
            table.__dict__["columns"] = table.columns.to("meta")
    groups = voxels.groups._replace(**{name: value.to("meta") for name, value in voxels.groups._asdict().items()})
    return Voxels(SparseTensor(voxels.tensor.feats.to("meta"), 1, maps), groups)


def test_a_forward_and_a_backward_pass_need_no_value_on_the_host() -> None:
    """Here `auto` meets a device that is no CPU. Reading a value of a meta tensor is an error."""
    net = network("auto").to("meta")
    voxels = network("columns").voxelize(*points())
    out = forward_backward(net, on_meta(voxels))
    assert out.device.type == "meta"
    assert out.shape == (500, 8)
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_preparation_leaves_nothing_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network("columns")
    voxels = net.voxelize(*points())
    built: list[object] = []
    monkeypatch.setattr(NativeMaps, "_build", lambda *args: built.append(args))
    monkeypatch.setattr(PairTable, "reversed", lambda *args: built.append(args))
    forward_backward(net, voxels)
    assert not built


def test_both_strategies_agree_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "CHUNK_NUMBERS_CPU", 5000)
    coords, feats, scene = points()
    results = []
    for strategy in ("pairs", "columns"):
        net = network(strategy).double()
        inputs = feats.double().requires_grad_()
        out = forward_backward(net, net.voxelize(coords, inputs, scene))
        results.append({"out": out.detach(), "feats": inputs.grad, **{k: p.grad for k, p in net.named_parameters()}})
    for name, expected in results[0].items():
        error = (results[1][name] - expected).abs().max() / expected.abs().max()
        assert float(error) < 1e-10, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    coords, feats, scene = (tensor.cuda() for tensor in points())
    net = network("auto").cuda()
    results = []
    for _ in range(2):
        net.zero_grad()
        inputs = feats.clone().requires_grad_()
        voxels = net.voxelize(coords, inputs, scene)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = forward_backward(net, voxels)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append([out.detach(), inputs.grad, *(p.grad for p in net.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    reference = network("columns").double()
    expected = forward_backward(reference, reference.voxelize(coords.cpu(), feats.cpu().double(), scene.cpu()))
    assert float((results[0][0].cpu() - expected).abs().max() / expected.abs().max()) < 1e-3
