"""Choice of the engine, and parity of the two."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bifusion_diag.errors import UserError
from bifusion_diag.model.sparse import Conv3d, ConvTranspose3d, Engine, make_engine, sparse_tensor
from bifusion_diag.model.sparse.minkowski import MinkowskiMaps, load_minkowski

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "k3": lambda: Conv3d(16, 24, 3),
    "k5": lambda: Conv3d(3, 24, 5),
    "k1": lambda: Conv3d(16, 24, 1, bias=True),
    "k3 dilated": lambda: Conv3d(16, 24, 3, dilation=2, bias=True),
    "k2 stride 2": lambda: Conv3d(16, 24, 2, stride=2),
    "k3 stride 2": lambda: Conv3d(16, 24, 3, stride=2),
    "down and up": lambda: nn.Sequential(Conv3d(16, 24, 2, stride=2), ConvTranspose3d(24, 8, 2, stride=2)),
    "twice down": lambda: nn.Sequential(Conv3d(16, 24, 2, stride=2), Conv3d(24, 8, 2, stride=2), Conv3d(8, 8, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_single_layers_agree_in_float32(
    name: str, minkowski: Engine, some_voxels: Callable[..., Tensor], match_rows: Callable[[Tensor, Tensor], Tensor]
) -> None:
    coords = some_voxels(900, extent=10)
    layer = LAYERS[name]()
    channels = next(module.in_channels for module in layer.modules() if isinstance(module, Conv3d))
    feats = torch.randn(900, channels)
    grad = None
    results: list[list[Tensor]] = []
    reference = None
    for engine in (minkowski, make_engine("native")):
        layer.zero_grad()
        inputs = feats.clone().requires_grad_()
        out = layer(sparse_tensor(coords, inputs, engine))
        grad = torch.randn_like(out.feats) if grad is None else grad
        reference = out.coords if reference is None else reference
        rows = match_rows(reference, out.coords)
        out.feats[rows].backward(grad)
        assert inputs.grad is not None
        results.append([out.feats[rows].detach(), inputs.grad, *(p.grad.clone() for p in layer.parameters())])
    for theirs, ours in zip(*results, strict=True):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


def test_names_and_versions() -> None:
    assert make_engine().name == make_engine("native").name == "native"
    assert torch.__version__ in make_engine().version


def test_name_and_version_of_the_real_one(minkowski: Engine) -> None:
    assert (minkowski.name, minkowski.version) == ("minkowski", load_minkowski().__version__)


def test_unknown_engine_is_refused_with_a_hint() -> None:
    with pytest.raises(UserError, match=r"unknown engine 'minkowsky'. Did you mean 'minkowski'\?"):
        make_engine("minkowsky")


@pytest.fixture
def _fresh_import() -> Iterator[None]:
    load_minkowski.cache_clear()
    yield
    load_minkowski.cache_clear()


@pytest.mark.usefixtures("_fresh_import")
def test_missing_minkowski_engine_tells_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(UserError, match="Build it with `make minkowski`, or choose 'native'"):
        make_engine("minkowski")


def test_cpu_build_on_a_cuda_device_is_refused(minkowski: Engine) -> None:
    class OnCuda:
        """Stands in for a CUDA tensor where there is no CUDA."""

        is_cuda = True

    if load_minkowski().is_cuda_available():
        pytest.skip("this MinkowskiEngine is built for CUDA")
    with pytest.raises(UserError, match="for CPUs only, but the model is on a CUDA device"):
        MinkowskiMaps(OnCuda())  # type: ignore[arg-type]
