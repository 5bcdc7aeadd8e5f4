"""The U-Net: parameters, names, MinkowskiEngine's numbers, unusual inputs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bifusion_diag.config.settings import BackboneSettings
from bifusion_diag.model.sparse import SparseTensor, chunks, columns, make_engine
from bifusion_diag.model.sparse.convolution import Strategy
from bifusion_diag.model.sparse.native import NativeEngine
from bifusion_diag.model.unet import Res16UNet

RES16UNET34C = BackboneSettings(layers=(2, 3, 4, 6, 2, 2, 2, 2), planes=(32, 64, 128, 256, 256, 128, 96, 96))
RES16UNET18A = BackboneSettings(first_kernel=5)
TINY = BackboneSettings(init_dim=8, planes=(8, 8, 16, 16, 16, 16, 8, 8), voxel_size=1.0)
NATIVE = make_engine("native")

Points = tuple[Tensor, Tensor, Tensor]


def point_features(net: Res16UNet, coords: Tensor, feats: Tensor, scene_index: Tensor) -> Tensor:
    """Points (N, 3) through the voxels and back to the points."""
    voxels = net.voxelize(coords, feats, scene_index)
    return voxels.slice(net(voxels.tensor))


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(Path(__file__).resolve().parents[1] / "golden" / "unet18a_tiny.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.fixture(params=["native", "minkowski"])
def net(request: pytest.FixtureRequest, golden: dict[str, Tensor]) -> Res16UNet:
    if request.param == "minkowski" and importlib.util.find_spec("MinkowskiEngine") is None:
        pytest.skip("MinkowskiEngine is not installed (`make minkowski`)")
    net = Res16UNet(TINY, engine=make_engine(request.param))
    net.load_state_dict(state(golden, "sd0."))
    return net


def state(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value.clone() for key, value in golden.items() if key.startswith(prefix)}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.detach() - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def surface(points: int = 400, scenes: int = 2) -> Points:
    """Points on planes, some 0.4 m wide."""
    coords = torch.rand(points, 3) * 0.4
    coords[torch.arange(points), torch.randint(0, 3, (points,))] = 0.0
    return coords, torch.randn(points, 3), torch.arange(points) * scenes // points


@pytest.mark.parametrize(("settings", "count"), [(RES16UNET34C, 37_854_112), (RES16UNET18A, 15_491_232)])
def test_parameter_counts(settings: BackboneSettings, count: int) -> None:
    net = Res16UNet(settings, engine=NATIVE)
    assert sum(parameter.numel() for parameter in net.parameters()) == count
    assert net.out_channels == 96


def test_golden_training_step(net: Res16UNet, golden: dict[str, Tensor]) -> None:
    coords, feats = golden["field_coords"], golden["field_feats"].clone().requires_grad_()
    out = point_features(net, coords[:, 1:], feats, coords[:, 0].long())
    assert relative_error(out, golden["sliced"]) < 1e-4
    # the golden gradient is given at the voxels: hand it to one point of each
    cells = {tuple(cell): row for row, cell in enumerate(golden["in_coords"].tolist())}
    grad, seen = torch.zeros_like(out), set()
    for point, cell in enumerate(torch.floor(coords).int().tolist()):
        if tuple(cell) not in seen:
            seen.add(tuple(cell))
            grad[point] = golden["grad_out"][cells[tuple(cell)]]
    out.backward(grad)
    assert feats.grad is not None
    assert relative_error(feats.grad, golden["grad_field_feats"]) < 1e-4
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        # float32 through 40 layers: MinkowskiEngine's own gradient is 2e-3 from its float64 one
        assert relative_error(parameter.grad, golden[f"grad.{name}"]) < 2e-3, name
    after = state(golden, "running_after.")
    for name, value in net.state_dict().items():
        if name in after and "num_batches" not in name:
            assert relative_error(value, after[name]) < 1e-4, name


def test_golden_evaluation(net: Res16UNet, golden: dict[str, Tensor]) -> None:
    net.load_state_dict(state(golden, "sd0.") | state(golden, "running_after."))
    net.eval()
    coords = golden["in_coords"]
    out = point_features(net, coords[:, 1:].float(), golden["in_feats"], coords[:, 0].long())
    assert relative_error(out, golden["out_feats_eval"]) < 1e-4


@pytest.mark.parametrize("level", ["conv1p1s2", "block1", "block2", "block3", "block4", "convtr4p16s2", "block5"])
def test_golden_levels_seen_by_hooks(level: str, net: Res16UNet, golden: dict[str, Tensor]) -> None:
    seen: list[SparseTensor] = []
    net.get_submodule(level).register_forward_hook(lambda _module, _args, out: seen.append(out))
    coords = golden["field_coords"]
    point_features(net, coords[:, 1:], golden["field_feats"], coords[:, 0].long())
    (out,) = seen
    rows = {tuple(cell): row for row, cell in enumerate(out.coords.tolist())}
    order = [rows[tuple(cell)] for cell in golden[f"level.{level}.coords"].tolist()]
    assert relative_error(out.feats[order], golden[f"level.{level}.feats"]) < 1e-4


def test_every_layer_is_reached_by_hooks_and_full_backward_hooks() -> None:
    net = Res16UNet(TINY.model_copy(update={"voxel_size": 0.05}), engine=NATIVE)
    leaves = {name for name, module in net.named_modules() if next(module.parameters(recurse=False), None) is not None}
    forward, backward = set(), set()
    for name in leaves:
        module = net.get_submodule(name)
        module.register_forward_hook(lambda _m, _a, _o, name=name: forward.add(name))
        if isinstance(module, nn.BatchNorm1d):
            module.register_full_backward_hook(lambda _m, _i, _o, name=name: backward.add(name))
    point_features(net, *surface()).square().mean().backward()
    assert forward == leaves
    assert backward == {name for name in leaves if name.endswith(".bn")}


def test_whole_net_agrees_with_minkowski_engine_in_float64() -> None:
    if importlib.util.find_spec("MinkowskiEngine") is None:
        pytest.skip("MinkowskiEngine is not installed (`make minkowski`)")
    settings = BackboneSettings(init_dim=8, planes=(8, 12, 16, 24, 16, 16, 12, 8), layers=(1, 2, 1, 2, 1, 1, 2, 1))
    nets = [Res16UNet(settings, engine=make_engine(name)).double() for name in ("minkowski", "native")]
    nets[1].load_state_dict(nets[0].state_dict())
    coords, feats, index = surface(900)
    results = []
    for net in nets:
        inputs = feats.double().requires_grad_()
        out = point_features(net, coords * 3, inputs, index)
        out.square().sum().backward()
        assert inputs.grad is not None
        results.append({"out": out, "feats": inputs.grad, **{k: p.grad for k, p in net.named_parameters()}})
    for name, theirs in results[0].items():
        assert relative_error(results[1][name], theirs.detach()) < 1e-10, name


@pytest.mark.parametrize("strategy", ["pairs", "columns"])
def test_bits_do_not_depend_on_the_run_or_the_order_of_points(
    strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 50)
    monkeypatch.setattr(columns, "CHUNK_NUMBERS_CPU", 5000)
    coords, feats, index = surface()
    engine = NativeEngine(strategy)
    first = Res16UNet(TINY.model_copy(update={"voxel_size": 0.05}), engine=engine)
    weight = torch.randn(len(coords), 8)
    results = []
    for order in (torch.arange(400), torch.arange(400), torch.randperm(400)):
        net = Res16UNet(TINY.model_copy(update={"voxel_size": 0.05}), engine=engine)
        net.load_state_dict(first.state_dict())
        out = point_features(net, coords[order], feats[order], index[order])
        (out * weight[order]).sum().backward()
        results.append([out[torch.argsort(order)], *(p.grad for p in net.parameters()), *net.buffers()])
    for again in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], again, strict=True))


def test_scales_are_what_the_blocks_return_and_the_last_is_the_forward() -> None:
    net = Res16UNet(TINY.model_copy(update={"voxel_size": 0.05}), engine=NATIVE)
    seen: list[SparseTensor] = []
    for name in ("block4", "block5", "block6", "block7", "block8"):
        net.get_submodule(name).register_forward_hook(lambda _module, _args, out: seen.append(out))
    voxels = net.voxelize(*surface())
    scales = net(voxels.tensor, every_scale=True)
    assert [scale.stride for scale in scales] == [16, 8, 4, 2, 1]
    assert [scale.feats.shape[1] for scale in scales] == [16, 16, 16, 8, 8]
    assert all(scale is out for scale, out in zip(scales, seen, strict=True))
    assert torch.equal(scales[-1].coords, voxels.tensor.coords)
    assert torch.equal(net(voxels.tensor).feats, scales[-1].feats)


@pytest.mark.parametrize("points", [1, 2, 5])
def test_crops_of_a_handful_of_points(points: int) -> None:
    net = Res16UNet(TINY.model_copy(update={"voxel_size": 0.05}), engine=NATIVE)
    out = point_features(
        net, torch.rand(points, 3) * 0.2, torch.randn(points, 3), torch.zeros(points, dtype=torch.long)
    )
    assert out.shape == (points, 8)
    out.square().sum().backward()
    for parameter in net.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()


def test_far_outliers() -> None:
    coords, feats, index = surface()
    coords[:3] += torch.tensor([[500.0, 0.0, 0.0], [0.0, -700.0, 0.0], [0.0, 0.0, 300.0]])
    out = point_features(Res16UNet(TINY.model_copy(update={"voxel_size": 0.02}), engine=NATIVE), coords, feats, index)
    assert torch.isfinite(out).all()
