"""Gradients of loss terms against a twin: a full backward of each term through its own copy of the model."""

from __future__ import annotations

import copy
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from probe_toys import Give, Loss
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from bifusion_diag.config import load_settings
from bifusion_diag.data import BatchLoader
from bifusion_diag.errors import UserError
from bifusion_diag.model.build import build_model
from bifusion_diag.probes import GradsProbe, LossesProbe, LossGradientsProbe, Monitor, Probe
from bifusion_diag.training.evaluation import training_source

WEIGHTS = {"near": 1.0, "far": 0.3, "off": 0.0, "constant": 1.0, "elsewhere": 2.0}


class Model(nn.Module):
    """Two terms that share a trunk, one that has no weight now, one without a graph, one that bypasses the trunk."""

    def __init__(self, how: str = "plain", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.how = how
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6))
        self.block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.3))
        self.near, self.far, self.other = nn.Linear(6, 2), nn.Linear(6, 3), nn.Linear(5, 1)
        self.criterion = Give()
        self.to(dtype)

    def forward(self, x: Tensor) -> Loss:
        y = self.trunk(x)
        if self.how == "plain":
            y = self.block(y)
        else:
            y = checkpoint(
                self.block, y, use_reentrant=self.how == "reentrant", preserve_rng_state=self.how != "random"
            )
        terms = {
            "near": (self.near(y) - 1).square().mean(),
            "far": -self.far(y).sigmoid().mean(),
            "off": y.mean() * float("nan"),
            "constant": torch.ones((), dtype=y.dtype),
            "elsewhere": self.other(x).square().mean(),
        }
        total = sum(WEIGHTS[name] * term for name, term in terms.items() if name != "off")
        return self.criterion(Loss(total, terms, WEIGHTS))  # type: ignore[arg-type]


def measured(model: nn.Module, probe: Probe, forward: Callable[[], Any]) -> dict[str, float | None]:
    with Monitor(model, probes=[probe]) as monitor:
        with monitor.step():
            forward().backward()
        monitor.end_step()
        return {name.removeprefix("loss_gradients/"): value for name, value in monitor.latest().items()}


def twin(model: nn.Module, terms: Callable[[nn.Module], dict[str, Tensor]], modules: list[str]) -> dict[str, float]:
    """Norms, shares, cosines and the conflict. `terms` are those with a weight, times it."""
    vectors: dict[str, np.ndarray] = {}
    names = list(terms(copy.deepcopy(model)))
    for name in names:
        other = copy.deepcopy(model)
        terms(other)[name].backward()
        own = [p for module in modules for p in other.get_submodule(module).parameters()]
        vectors[name] = np.concatenate(
            [np.zeros(p.numel()) if p.grad is None else p.grad.double().numpy().ravel() for p in own]
        )
    norm = {name: float(np.sqrt(sum(x * x for x in vector))) for name, vector in vectors.items()}
    found = {f"{name}/norm": value for name, value in norm.items()}
    found |= {f"{name}/share": value / sum(norm.values()) for name, value in norm.items()}
    cosines = {}
    for a, b in itertools.combinations(names, 2):
        product = norm[a] * norm[b]
        cosines[f"cosine/{a}/{b}"] = float(vectors[a] @ vectors[b] / product) if product else float("nan")
    return found | cosines | {"conflict": np.nanmin(list(cosines.values()))}


def weighted(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(4)
    loss = model(x)
    return {name: WEIGHTS[name] * loss.terms[name] for name in ("near", "far")}


def seeded(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(4)
    total: Tensor = model(x).total
    return total


def present(row: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in row.items() if value is not None}


@pytest.mark.parametrize(
    ("modules", "where"),
    [
        (None, ["block.0"]),
        (["trunk*"], ["trunk"]),  # and all below, each parameter once
        (["trunk.0", "block.0"], ["trunk.0", "block.0"]),
    ],
)
@pytest.mark.parametrize("how", ["plain", "checkpoint"])
def test_every_number_equals_the_twins(modules: list[str] | None, where: list[str], how: str) -> None:
    model, x = Model(how), torch.randn(9, 5)
    expected = twin(model, lambda other: weighted(other, x), where)
    probe = LossGradientsProbe(modules=modules)
    row = measured(model, probe, lambda: seeded(model, x))
    assert present(row) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert expected["conflict"] == expected["cosine/near/far"]
    assert all(np.isfinite(value) for value in present(row).values())
    terms, pairs = len(WEIGHTS), len(WEIGHTS) * (len(WEIGHTS) - 1) // 2
    assert len(row) == 2 * terms + pairs + 1  # what is not measured is missing, and keeps its name
    named = ["trunk", "trunk.0", "trunk.1", "trunk.2"] if modules == ["trunk*"] else where
    assert probe.describe() == f"loss_gradients: measured on {', '.join(named)}"


def test_terms_that_fight_and_terms_that_agree() -> None:
    layer = nn.Linear(3, 1)
    x = torch.randn(4, 3)
    terms = {"up": layer(x).sum(), "down": -2 * layer(x).sum(), "also_up": 3 * layer(x).sum()}
    with Monitor(layer, probes=[LossGradientsProbe()]) as monitor:
        with monitor.step():
            monitor.losses(terms, {"up": 2.0, "down": torch.tensor(1.0), "also_up": 0.5})
        monitor.end_step()
        row = monitor.latest()
    assert row["loss_gradients/cosine/up/down"] == pytest.approx(-1)
    assert row["loss_gradients/cosine/up/also_up"] == pytest.approx(1)
    assert row["loss_gradients/conflict"] == pytest.approx(-1)
    shares = [row[f"loss_gradients/{name}/share"] for name in terms]
    assert shares == pytest.approx([2 / 5.5, 2 / 5.5, 1.5 / 5.5])


@pytest.mark.parametrize("scale", [0.0, float("nan"), 1e25, 1e-25])
def test_gradients_that_are_zero_bad_or_extreme(scale: float) -> None:
    layer = nn.Linear(3, 1, bias=False)
    x = torch.ones(1, 3)
    with Monitor(layer, probes=[LossGradientsProbe()]) as monitor:
        with monitor.step():
            monitor.losses({"a": layer(x).sum(), "b": layer(x * scale).sum(), "c": layer(x).sum()})
        monitor.end_step()
        row = {name.removeprefix("loss_gradients/"): value for name, value in monitor.latest().items()}
    assert row["b/norm"] == pytest.approx(3**0.5 * scale, nan_ok=True)
    good = scale in (1e25, 1e-25)
    assert row["cosine/a/b"] == (pytest.approx(1) if good else None)
    assert row["cosine/a/c"] == row["conflict"] == pytest.approx(1)
    assert row["a/share"] == (None if np.isnan(scale) else pytest.approx(1 / (2 + scale)))


def test_calls_of_a_step_are_added() -> None:
    model, xs = Model(), torch.randn(2, 9, 5)
    model.eval()
    probe = LossGradientsProbe()
    row = measured(model, probe, lambda: seeded(model, xs[0]) + seeded(model, xs[1]))

    def both(other: nn.Module) -> dict[str, Tensor]:
        first, second = weighted(other, xs[0]), weighted(other, xs[1])
        return {name: first[name] + second[name] for name in first}

    assert present(row) == pytest.approx(twin(model, both, ["block.0"]), rel=1e-4, abs=1e-5)


def test_loss_modules_are_measured_one_by_one() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
            self.mse, self.l1 = nn.MSELoss(), nn.L1Loss()

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return self.mse(self.head(y), x) + self.l1(y, torch.ones_like(y))

    model, x = Net(), torch.randn(5, 3)
    with Monitor(model, probes=[LossGradientsProbe(every=1)]) as monitor:
        rows = []
        for _ in range(2):
            with monitor.step():
                model(x).backward()
            monitor.end_step()
            rows.append({name.removeprefix("loss_gradients/"): v for name, v in monitor.latest().items()})

    def terms(other: nn.Module) -> dict[str, Tensor]:
        y = other.body(x)  # type: ignore[operator]
        mse, l1 = other.mse(other.head(y), x), other.l1(y, torch.ones_like(y))  # type: ignore[operator]
        return {"mse": mse, "l1": l1}

    assert rows[0] == {}  # which module they share was known at its end
    assert rows[1] == pytest.approx(twin(model, terms, ["body"]), rel=1e-4)


def state(model: nn.Module, optimiser: torch.optim.Optimizer) -> list[Any]:
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tensors += [v for entry in optimiser.state_dict()["state"].values() for v in entry.values()]
    return [
        [tensor.view(torch.uint8).numpy().tobytes() if tensor.dim() else tensor.item() for tensor in tensors],
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
    ]


@pytest.mark.parametrize("how", ["plain", "checkpoint", "random"])
@pytest.mark.parametrize("autocast", [False, True])
def test_training_is_bitwise_the_same(how: str, autocast: bool) -> None:
    def train(probes: list[Any], steps: int = 20) -> list[Any]:
        torch.manual_seed(0)
        model = Model(how)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with Monitor(model, optimiser, probes) as monitor:
            for _ in range(steps):
                optimiser.zero_grad()
                with monitor.step():
                    for _ in range(2):  # gradient accumulation
                        x = torch.randn(8, 5)
                        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                            total = model(x).total
                        total.backward()
                    optimiser.step()
                monitor.end_step()
                if probes:
                    assert present(monitor.latest())["loss_gradients/near/norm"] > 0
        return state(model, optimiser)

    bare, watched = train([]), train([LossGradientsProbe(modules=["trunk*"], every=1)])
    assert bare == watched
    assert bare != train([], 19)  # the comparison can fail


def test_no_other_probe_and_no_gradient_sees_the_extra_passes() -> None:
    def row(extra: list[Any]) -> tuple[dict[str, float | None], list[int]]:
        torch.manual_seed(0)
        model, calls = Model("checkpoint"), []
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _: calls.append(1))
        with Monitor(model, probes=[GradsProbe(), LossesProbe(), *extra]) as monitor:
            with monitor.step():
                loss = model(torch.randn(8, 5))
                assert all(parameter.grad is None for parameter in model.parameters())
                loss.total.backward()
            monitor.end_step()
            found = monitor.latest()
        return {name: v for name, v in found.items() if not name.startswith("loss_gradients/")}, calls

    assert repr(row([])) == repr(row([LossGradientsProbe(modules=["trunk*"])]))  # NaN is NaN


def test_scaled_gradients_are_unscaled() -> None:
    model, x = Model(), torch.randn(9, 5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(torch.ones(()))  # it makes its scale when it is used first
    with Monitor(model, probes=[LossGradientsProbe(modules=["trunk"])], scaler=scaler) as monitor:
        with monitor.step():
            scaler.scale(seeded(model, x)).backward()
        monitor.end_step()
        row = {name.removeprefix("loss_gradients/"): value for name, value in monitor.latest().items()}
    assert present(row) == pytest.approx(twin(model, lambda m: weighted(m, x), ["trunk"]), rel=1e-4, abs=1e-5)


class ExpForTanh(TorchFunctionMode):
    """A model may change what functions of torch mean while it runs."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (torch.exp if function is torch.tanh else function)(*args, **(kwargs or {}))


def test_what_is_run_again_means_the_same() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def body(self, x: Tensor) -> Tensor:
            with ExpForTanh():
                return torch.tanh(self.layer(x)).square()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = checkpoint(self.body, x, use_reentrant=False)
            return {"loss_a": y.mean(), "loss_b": y.std()}

    model, x = Net(), torch.randn(4, 3)
    row = measured(model, LossGradientsProbe(), lambda: sum(model(x).values()))
    assert row == pytest.approx(twin(model, lambda other: other(x), ["layer"]), rel=1e-4)


def test_the_module_is_the_last_that_most_terms_reach() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = nn.Linear(3, 3)  # runs last, but serves two of three
            self.norm = nn.LayerNorm(3)  # serves all and runs after the shared matrix, but is a vector
            self.shared = nn.Linear(3, 3)
            self.stem = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.norm(self.shared(self.stem(x)))
            z = self.pair(y)
            return {"loss_a": z.square().mean(), "loss_b": z.abs().mean(), "loss_c": y.std()}

    model, x = Net(), torch.randn(4, 3)
    probe = LossGradientsProbe(every=1)
    assert probe.describe() is None
    with Monitor(model, probes=[probe]) as monitor:
        for frozen, expected in (((), "shared"), (("shared",), "stem"), (("shared", "stem"), "pair")):
            for name, module in model.named_children():
                module.requires_grad_(name not in frozen)
            with monitor.step():
                sum(model(x).values()).backward()
            assert probe.describe() == f"loss_gradients: measured on {expected}"


def test_a_term_that_will_get_its_weight_later_counts_in_the_choice() -> None:
    early, late = nn.Linear(3, 3), nn.Linear(3, 3)
    model, probe = nn.Sequential(early, late), LossGradientsProbe(every=1)
    with Monitor(model, probes=[probe]) as monitor:
        for weight in (0.0, 1.0):
            with monitor.step():
                y = early(torch.ones(2, 3))
                monitor.losses({"a": late(y).std(), "b": late(y).mean(), "c": y.mean()}, {"c": weight})
            monitor.end_step()
            assert probe.describe() == "loss_gradients: measured on 0"
            assert (monitor.latest()["loss_gradients/c/norm"] is None) == (weight == 0)


def test_nothing_to_compare() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss_a": self.a(x).mean(), "loss_b": self.b(x).mean()}

    model, x = Apart(), torch.ones(1, 2)
    with Monitor(model, probes=[LossGradientsProbe(every=1)]) as monitor:
        for step in range(2):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                with monitor.step():
                    model(x)
            assert ["no two loss terms share a weight" in str(w.message) for w in said] == [True] * (step == 0)
            monitor.end_step()
            assert monitor.latest() == {}
    single = nn.Linear(2, 1)
    with Monitor(single, probes=[LossGradientsProbe()]) as monitor:
        with monitor.step():
            monitor.losses({"only": single(x).sum()})
        monitor.end_step()
        assert monitor.latest() == {}
    with pytest.raises(UserError, match=r"modules=\['c'\] names no module"):
        Monitor(model, probes=[LossGradientsProbe(modules=["c"])]).__enter__()


def goes_off(model: nn.Module, probe: Probe, loss: Callable[[], Tensor], message: str) -> None:
    """The probe is switched off with a warning, and the gradients are those without it."""
    torch.manual_seed(1)
    loss().backward()
    expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(1)
    with Monitor(model, probes=[probe]) as monitor, pytest.warns(RuntimeWarning, match=message), monitor.step():
        loss().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)  # type: ignore[arg-type]


def test_reentrant_checkpoints_refuse() -> None:
    model, x = Model("reentrant"), torch.randn(8, 5)
    model.block[1].momentum = 0.0  # so that the two runs can be compared
    goes_off(model, LossGradientsProbe(), lambda: model(x).total, "use_reentrant")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_modules_that_donate_buffers_refuse() -> None:
    model, x = Model(), torch.randn(8, 5)
    body = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 6), nn.Tanh())
    model.block = torch.compile(body, backend="aot_eager")  # type: ignore[assignment]
    goes_off(model, LossGradientsProbe(modules=["trunk"]), lambda: model(x).total, "donated buffer")


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_distributed_data_parallel_reduces_once(static: bool, told: bool) -> None:
    def train(probes: list[Any]) -> tuple[list[Tensor], int, int]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
        wrapped = DistributedDataParallel(model, static_graph=static, find_unused_parameters=not static)
        reduced: list[int] = []

        def hook(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            reduced.append(bucket.index())
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        hook.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}
        wrapped.register_comm_hook(None, hook)
        optimiser, rows = torch.optim.SGD(model.parameters(), 0.1), 0
        with Monitor(wrapped, probes=probes) as monitor:
            for _ in range(3):
                optimiser.zero_grad()
                with monitor.step():
                    y = wrapped(torch.randn(3, 5))
                    terms = {"a": y.square().mean(), "b": y.sum()}
                    if told:
                        monitor.losses(terms)
                    sum(terms.values()).backward()
                    optimiser.step()
                monitor.end_step()
                rows += "loss_gradients/conflict" in monitor.latest()
        return [p.detach() for p in model.parameters()], len(reduced), rows

    bare, watched = train([]), train([LossGradientsProbe(every=1)])
    assert all(torch.equal(a, b) for a, b in zip(bare[0], watched[0], strict=True))
    assert bare[1] == watched[1] == 3
    assert watched[2] == (3 - static if told else 0)  # the first backward of a static graph is DDP's own


@pytest.mark.usefixtures("one_process")
def test_sharded_parameters_refuse() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Model()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with (
        Monitor(model, probes=[LossGradientsProbe()]) as monitor,
        pytest.warns(RuntimeWarning, match="sharded"),
        monitor.step(),
    ):
        model(torch.randn(8, 5)).total.backward()


class _AllGather(torch.autograd.Function):
    """Named as that of torch.distributed.nn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


@pytest.mark.parametrize("where", ["before", "after"])
def test_collectives_on_the_way_refuse_with_several_processes(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.stem(x)
            y = self.last(_AllGather.apply(y)) if where == "before" else _AllGather.apply(self.last(y))
            return {"loss_a": y.mean(), "loss_b": y.square().mean()}

    model, x = Net(), torch.randn(4, 3)
    monkeypatch.setattr("bifusion_diag.probes.loss_gradients.world_size", lambda: 2)
    if where == "after":
        goes_off(model, LossGradientsProbe(), lambda: sum(model(x).values()), "waits for the other processes")  # type: ignore[arg-type,return-value]
    else:
        row = measured(model, LossGradientsProbe(), lambda: sum(model(x).values()))
        assert row["loss_a/norm"] is not None


@pytest.mark.parametrize(
    ("preset", "where"), [("bifusion", "encoder.head3d.conv"), ("baseline", "decoder.layers.2.feed_forward.net.3")]
)
def test_our_own_models(preset: str, where: str) -> None:
    small = ("data.max_points=600", "data.image_height=48", "data.image_width=64", "data.superpoint_size=0.5")
    settings = load_settings(preset, scale="small", overrides=["data.scenes=1", "training.batch_size=1", *small])
    torch.manual_seed(0)
    model = build_model(settings).train()
    batch = BatchLoader(training_source(settings), settings.data, batch_size=1, seed=0).batch(0)
    model.set_progress(900, 1000)  # every term has its weight

    def terms(other: Any) -> dict[str, Tensor]:
        torch.manual_seed(4)
        loss = other(batch).loss
        return {name: loss.weights[name] * term for name, term in loss.terms.items()}

    expected = twin(model, terms, [where])
    probe = LossGradientsProbe()
    torch.manual_seed(4)
    row = measured(model, probe, lambda: model(batch).loss.total)
    assert probe.describe() == f"loss_gradients: measured on {where}"
    assert len(expected) > 14
    for name, value in expected.items():
        if np.isfinite(value):
            assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
        else:  # a cosine with a gradient of zero
            assert row[name] is None, name
