"""Models of every kind, each trained bare and measured by all probes: the same bits, no hook left, no probe off.

A probe that raises warns, and a warning is an error here.
"""

from __future__ import annotations

import copy
import dataclasses
import io
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from watching import Counting, Watch, hooks_of, same, unchanged

from bifusion_diag.errors import UserError
from bifusion_diag.probes import Monitor


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


@dataclasses.dataclass
class Late:
    value: Tensor
    never: Tensor = dataclasses.field(init=False)  # an attribute that is not there


@dataclasses.dataclass
class ModelOutput(OrderedDict):
    """As Transformers has them: a mapping and a dataclass at once."""

    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self[field.name] = getattr(self, field.name)


class ImageList:
    """As torchvision has it: tensors in an object that says nothing of itself."""

    def __init__(self, tensors: Tensor) -> None:
        self.tensors = tensors


class Sparse:
    def __init__(self, feats: Tensor) -> None:
        self.feats = feats


class Named(torch.Tensor):
    """A subclass, as tv_tensors are."""


def nested(x: Tensor, layout: torch.layout) -> Tensor:
    return torch.nested.as_nested_tensor([x[:1], x[1:]], layout=layout)


# kind → (what the module returns of x (3, 4), what the loss reads in that)
KINDS: dict[str, tuple[Any, Any]] = {
    "tensor": (lambda x: x, lambda y: y),
    "subclass": (lambda x: x.as_subclass(Named), lambda y: y.as_subclass(Tensor)),
    "tuple": (lambda x: (x, None, 3, "text"), lambda y: y[0]),
    "namedtuple": (lambda x: Pair(x, None), lambda y: y.first),
    "dict": (lambda x: {"a": [x, {"b": x}], 3: None}, lambda y: y["a"][1]["b"]),
    "model output": (lambda x: ModelOutput(x), lambda y: y.logits),
    "dataclass": (lambda x: Late(x), lambda y: y.value),
    "sparse tensor of an engine": (lambda x: Sparse(x), lambda y: y.feats),
    "torch sparse": (lambda x: x.to_sparse(), lambda y: y.to_dense()),
    "torch csr": (lambda x: x.to_sparse_csr(), lambda y: y.to_dense()),
    "complex": (lambda x: torch.complex(x, x).conj(), lambda y: torch.view_as_real(y.resolve_conj())[..., 0]),
    "jagged": (lambda x: nested(x, torch.jagged), lambda y: torch.cat(y.unbind())),
    "strided nested": (lambda x: nested(x, torch.strided), lambda y: torch.cat(y.unbind())),
    "double": (lambda x: x.double(), lambda y: y.float()),
    "bfloat16": (lambda x: x.bfloat16(), lambda y: y.float()),
    "half": (lambda x: x.half(), lambda y: y.float()),
    "not contiguous": (lambda x: x.t(), lambda y: y.t()),
    "expanded": (lambda x: x[None].expand(2, 3, 4), lambda y: y[0]),
    "view of a part": (lambda x: x.unbind(1), lambda y: torch.stack(y, 1)),
    "not all used": (lambda x: torch.cat([x, x], 1).split(4, 1), lambda y: y[1]),
}
UNREAD: dict[str, Any] = {  # hold nothing that a gradient could flow through, beside x itself
    "none": lambda x: None,
    "image list": ImageList,
    "integers": lambda x: x.long(),
    "flags": lambda x: x > 0,
    "empty": lambda x: x[:0],
    "empty integers": lambda x: (x[:0] > 0).nonzero(),
    "scalar": lambda x: x.sum().detach(),
    "bad": lambda x: torch.stack([x * torch.nan, x * torch.inf]).detach(),
    "text": lambda x: "text",
    "nested too deep": lambda x: [[[[[[[[x]]]]]]]],
    "an empty list": lambda x: [],
}


class Emit(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


class Emits(nn.Module):
    def __init__(self, make: Any, read: Any = None) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.emit = Emit(make)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.emit(x)
        return 2 * (x if self.read is None else self.read(y)).sum()


def simple(model: Any, x: Tensor | None = None, steps: int = 2, **options: Any) -> Any:
    """A case: train a model that returns its loss."""

    def case(watch: Watch) -> list[Any]:
        made = model()
        optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
        data = torch.randn(3, 4) if x is None else x

        def body(step: int) -> None:
            optimizer.zero_grad()
            loss = made(data)
            loss.backward()
            nn.utils.clip_grad_norm_(made.parameters(), 0.1)
            optimizer.step()

        watch(made, optimizer, body, steps, **options)
        return [made, optimizer]

    return case


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning", "ignore:.*Sparse CSR.*:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_every_kind(kind: str) -> None:
    row = unchanged(simple(lambda: Emits(*KINDS[kind])))[-1]
    # the loss is 2 · Σ of 12 elements: every gradient is 2
    assert row["grads/emit/output_norm"] == pytest.approx(2 * 12**0.5, rel=1e-6)
    assert row["grads/first/output_norm"] == pytest.approx(2 * 12**0.5, rel=1e-6)


@pytest.mark.parametrize("kind", UNREAD)
def test_outputs_that_hold_nothing_to_differentiate(kind: str) -> None:
    row = unchanged(simple(lambda: Emits(UNREAD[kind])))[-1]
    assert row["grads/first/output_norm"] == pytest.approx(2 * 12**0.5, rel=1e-6)
    assert row["grads/emit/output_norm"] is None


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lazy, self.norm, self.head = nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.LazyLinear(2)
        self.never = nn.LazyLinear(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.lazy(x))).square().sum()


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_modules(tmp_path: Any) -> None:
    from bifusion_diag.record import load_run

    def case(watch: Watch) -> list[Any]:
        model, x = Lazy(), torch.randn(3, 4)
        options = {"out": tmp_path / "run.json"} if watch.on else {}
        watch(model, None, lambda step: model(x).backward(), **options)
        del model.never
        return [model]

    row = unchanged(case)[-1]
    assert row["grads/lazy/param_norm"] > 0  # type: ignore[operator]
    table = {module.name: module for module in load_run(tmp_path / "run.json").modules}
    assert (table["lazy"].parameters, table["lazy"].trainable) == (25, 25)
    assert table["never"].parameters == 0


class Odd(nn.Module):
    """Weights that are computed, shared or unused; modules that are shared, reused or unused."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_norm = parametrizations.weight_norm(nn.Linear(4, 4))
        self.spectral = parametrizations.spectral_norm(nn.Linear(4, 4))
        self.tied, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.tied.weight
        self.alias = self.tied
        self.unused = nn.Linear(9, 9)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.embedding = nn.Embedding(6, 4, max_norm=1.0)
        self.by_name = nn.ParameterDict({"a": nn.Parameter(torch.randn(4)), "b": nn.Parameter(torch.randn(4))})

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(self.alias(self.tied(self.spectral(self.weight_norm(x)))))
        x = self.frozen(x) + self.embedding(torch.arange(3)) + self.by_name["a"]
        x, _ = self.attention(x[None], x[None], x[None])
        return self.lstm(x)[0].square().sum()


def test_computed_shared_and_unused() -> None:
    row = unchanged(simple(Odd))[-1]
    assert row["grads/unused/state"] == 1
    assert row["grads/frozen/state"] == 0
    assert row["grads/tied/param_norm"] > 0  # type: ignore[operator]


def test_a_sparse_gradient() -> None:
    def case(watch: Watch) -> list[Any]:
        model = nn.EmbeddingBag(10, 4, sparse=True, mode="sum")
        optimizer = torch.optim.SparseAdam(model.parameters())

        def body(step: int) -> None:
            optimizer.zero_grad()
            model(torch.tensor([[1, 2, 2]])).square().sum().backward()
            optimizer.step()

        watch(model, optimizer, body)
        return [model, optimizer]

    assert unchanged(case)[-1]["grads/(root)/param_norm"] > 0  # type: ignore[operator]


class InPlace(nn.Module):
    """Everything that may be done in place to the output of a module: to itself, to a view, to what it is a view of."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(4, 4)
        self.view = Emit(lambda x: x.view(2, 6))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) * 1
        if self.kind == "itself":
            return self.relu(y).square().sum()
        if self.kind == "a view":
            return self.view(y).mul_(2).square().sum()
        if self.kind == "the base of a view":
            view = self.view(y)
            y += 1
            return (view * y.view(2, 6)).sum()
        y = self.layer(x)
        y += x  # a residual connection
        return y.square().sum()


@pytest.mark.parametrize("kind", ["itself", "a view", "the base of a view", "an output"])
def test_in_place(kind: str) -> None:
    row = unchanged(simple(lambda: InPlace(kind)))[-1]
    assert row["grads/layer/output_norm"] > 0  # type: ignore[operator]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        flags = x > 0
        ctx.mark_non_differentiable(flags)
        return 2 * x, flags

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> Tensor:  # type: ignore[override]
        return 2 * gradient


def test_an_autograd_function() -> None:
    row = unchanged(simple(lambda: Emits(Doubled.apply, lambda y: y[0])))[-1]
    assert row["grads/emit/output_norm"] == pytest.approx(2 * 12**0.5, rel=1e-6)
    assert row["grads/first/output_norm"] == pytest.approx(4 * 12**0.5, rel=1e-6)


class Without(nn.Module):
    """A tower that is not differentiated."""

    def __init__(self, mode: Any) -> None:
        super().__init__()
        self.tower, self.head, self.mode = nn.Sequential(nn.Linear(4, 4), nn.GELU()), nn.Linear(4, 1), mode

    def forward(self, x: Tensor) -> Tensor:
        with self.mode():
            x = self.tower(x)
        return self.head(x.clone()).square().sum()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modules_called_without_a_gradient(mode: Any) -> None:
    counting = Counting()
    row = unchanged(simple(lambda: Without(mode)), ["all", counting])[-1]
    assert row["grads/tower/output_norm"] is None
    assert row["grads/head/param_norm"] > 0  # type: ignore[operator]
    assert counting.seen_of["tower.0"] == 2


def test_a_step_under_inference_mode() -> None:
    def case(watch: Watch) -> list[Any]:
        model = Emits(*KINDS["tensor"])
        with torch.inference_mode():
            x = torch.randn(3, 4)
            watch(model, None, lambda step: model(x))
        return [model]

    unchanged(case)


def test_a_gradient_penalty() -> None:
    truth: list[float] = []

    def penalised(critic: nn.Module, x: Tensor) -> Tensor:
        score = critic(x).sum()
        (slope,) = torch.autograd.grad(score, x, create_graph=True)
        return score + (slope.norm() - 1) ** 2

    def case(watch: Watch) -> list[Any]:
        critic = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        x = torch.randn(3, 4, requires_grad=True)
        watch(critic, None, lambda step: (critic.zero_grad(), penalised(critic, x).backward()))
        outputs: list[Tensor] = []
        critic[0].register_forward_hook(lambda _m, _i, output: outputs.append(output))
        loss = penalised(critic, x)
        truth.append(torch.autograd.grad(loss, outputs[0])[0].norm().item())
        critic[0]._forward_hooks.clear()
        return [critic]

    row = unchanged(case)[-1]
    assert row["grads/0/output_norm"] == pytest.approx(truth[-1], rel=1e-5)


def test_second_order_backward_is_measured_in_parameters() -> None:
    def case(watch: Watch) -> list[Any]:
        model = nn.Linear(4, 1)

        def body(step: int) -> None:
            model.zero_grad()
            torch.autograd.grad(model(torch.ones(1, 4)).square().sum(), model.weight, create_graph=True)
            model(torch.ones(1, 4)).square().sum().backward()

        watch(model, None, body)
        return [model]

    assert unchanged(case)[-1]["grads/(root)/param_norm"] > 0  # type: ignore[operator]


def test_several_forwards_before_one_backward_and_none() -> None:
    counting = Counting()

    def case(watch: Watch) -> list[Any]:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        x = torch.randn(3, 4)

        def body(step: int) -> None:
            model.zero_grad()
            total = sum(model(x * i).sum() for i in range(3))
            if step == 0:
                total.backward()  # type: ignore[union-attr]

        watch(model, None, body)
        return [model]

    rows = unchanged(case, ["all", counting])
    assert counting.seen_of == {"(root)": 6, "0": 6, "1": 6}
    assert counting.gradients_of == {"(root)": 3, "0": 3, "1": 3}
    assert counting.events == {"began": 1, "ended": 1}
    assert rows[0]["grads/1/output_norm"] == pytest.approx(3)
    assert rows[1]["grads/1/output_norm"] is None


def test_two_models_and_two_optimizers_whose_root_is_never_called() -> None:
    counting = Counting()
    counting.watches_gradient = lambda name, module: False  # type: ignore[method-assign]

    def case(watch: Watch) -> list[Any]:
        both = nn.ModuleDict({"g": nn.Linear(4, 4), "d": nn.Sequential(nn.Linear(4, 1))})
        generator, critic = both["g"], both["d"]
        optimizers = [torch.optim.Adam(part.parameters()) for part in both.values()]
        x = torch.randn(3, 4)

        def body(step: int) -> None:
            optimizers[1].zero_grad()
            (critic(x) - critic(generator(x).detach())).mean().backward()
            optimizers[1].step()
            optimizers[0].zero_grad()
            critic(generator(x)).mean().backward(inputs=list(generator.parameters()))
            optimizers[0].step()

        watch(both, optimizers, body)
        assert not hooks_of(both, optimizers)
        return [both, *optimizers]

    row = unchanged(case, ["all", counting])[-1]
    assert counting.events == {"began": 4, "ended": 4, "before": 4, "after": 4}
    assert row["grads/g/param_norm"] > 0  # type: ignore[operator]


def test_a_backward_that_raises_and_is_tried_again() -> None:
    class OutOfMemory(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            raise RuntimeError("out of memory")

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(3, 4)
    with Monitor(model, optimizer, probes=["grads"]) as monitor:
        with monitor.step():
            with pytest.raises(RuntimeError, match="out of memory"):
                model[1](OutOfMemory.apply(model[0](x))).sum().backward()
            optimizer.zero_grad()
            model(x).sum().backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3).item()
            optimizer.step()
        monitor.end_step()
        assert monitor.latest()["train/grad_norm"] == pytest.approx(norm, rel=1e-5)  # not what is left by clipping


def test_lbfgs() -> None:
    counting = Counting()

    def case(watch: Watch) -> list[Any]:
        model, x = nn.Linear(4, 1), torch.randn(3, 4)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            return loss

        watch(model, optimizer, lambda step: optimizer.step(closure))
        return [model]

    row = unchanged(case, ["all", counting])[-1]
    assert counting.events["before"] == counting.events["after"] == 2
    assert row["grads/(root)/param_norm"] is not None


def test_an_optimizer_that_calls_the_step_of_its_parent() -> None:
    class Mine(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    torch.optim.SGD([torch.ones(1, requires_grad=True)])  # from now on both methods call hooks
    counting = Counting()

    def case(watch: Watch) -> list[Any]:
        model = nn.Linear(4, 1)
        optimizer = Mine(model.parameters(), lr=0.1)
        watch(model, optimizer, lambda step: (model(torch.ones(1, 4)).sum().backward(), optimizer.step()))
        return [model]

    unchanged(case, ["all", counting])
    assert counting.events == {"began": 2, "ended": 2, "before": 2, "after": 2}


class Checked(nn.Module):
    """Blocks inside blocks, all of which are computed again in the backward."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def run(self, block: Any, x: Tensor) -> Tensor:
        return block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)

    def forward(self, x: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            return self.drop(self.outer(self.run(self.inner, x).tanh()))

        return self.run(block, x).square().sum()


@pytest.mark.parametrize("reentrant", [True, False])
def test_nested_checkpoints(reentrant: bool) -> None:
    counting = Counting()

    def train(kind: bool | None) -> Any:
        def case(watch: Watch) -> list[Any]:
            parts = nn.ModuleDict({"model": Checked(kind)})  # whose forward is never called
            x = torch.randn(3, 4, requires_grad=True)
            watch(parts, None, lambda step: (parts.zero_grad(), parts["model"](x).backward()))
            return [parts]

        return case

    expected = unchanged(train(None))
    rows = unchanged(train(reentrant), ["all", counting])
    for key, value in expected[-1].items():
        if key.startswith("grads/"):
            assert rows[-1][key] == (None if value is None else pytest.approx(value, rel=1e-6)), key
    assert counting.events == {"began": 2, "ended": 2}
    names = ("model", "model.inner", "model.outer", "model.drop")
    assert counting.seen_of == counting.gradients_of == dict.fromkeys(names, 2)


def test_what_changes_while_the_monitor_is_open() -> None:
    def case(watch: Watch) -> list[Any]:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))

        def body(step: int) -> None:
            if step == 1:
                model.append(nn.Linear(4, 4))
                model[0].requires_grad_(False)
                model[1] = nn.Linear(4, 4)
                del model[2]
            model(torch.ones(1, 4)).sum().backward()

        watch(model, None, body, 3)
        return [model]

    rows = unchanged(case)
    assert rows[0].keys() == rows[2].keys()
    assert [row["grads/0/state"] for row in rows] == [3, 0, 0]


def test_a_copy_and_a_pickle_of_the_model_have_no_part_in_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.ones(1, 4)
    counting = Counting()
    with Monitor(model, optimizer, probes=["all", counting]) as monitor:
        for step in range(2):  # in the first, the order of modules is found out too
            with monitor.step():
                average = torch.optim.swa_utils.AveragedModel(model)
                file = io.BytesIO()
                torch.save(model, file)
                file.seek(0)
                loaded = torch.load(file, weights_only=False)
                expected = model(x)
                assert same(average(x), expected)
                assert same(loaded(x), expected)
                copy.deepcopy(optimizer)
            assert counting.seen_of["0"] == step + 1
    loaded.state_dict()


def test_transforms_of_torch_func() -> None:
    counting = Counting()

    def case(watch: Watch) -> list[Any]:
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        x = torch.randn(3, 4)
        found: list[Tensor] = []

        def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
            return torch.func.functional_call(model, weights, (row,)).sum()

        def body(step: int) -> None:
            weights = {name: p.detach() for name, p in model.named_parameters()}
            each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
            found.extend(each.values())
            model(x).sum().backward()

        watch(model, None, body)
        return [model, *found]

    unchanged(case, ["all", counting])
    assert counting.seen_of["0"] == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_inside_a_model() -> None:
    def case(watch: Watch) -> list[Any]:
        block = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
        model = nn.Sequential(nn.Linear(4, 4), block, torch.jit.trace(nn.Linear(4, 4), torch.ones(1, 4)))
        watch(model, None, lambda step: model(torch.ones(2, 4)).sum().backward())
        return [model]

    row = unchanged(case)[-1]
    assert row["grads/1.0/param_norm"] > 0  # type: ignore[operator]
    assert row["grads/0/output_norm"] > 0  # type: ignore[operator]
    with pytest.raises(UserError, match="the model is TorchScript"):
        Monitor(torch.jit.script(nn.Linear(2, 2)))


class Under(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layer(x))).float().square().mean()


def amp(kind: str, scaled: bool) -> Any:
    """A case: steps of mixed precision, as the manual writes them."""

    def case(watch: Watch) -> list[Any]:
        model = Under()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2, enabled=scaled)
        x = torch.randn(6, 4)

        def body(step: int) -> None:
            optimizer.zero_grad()
            for part in x.split(3) if kind == "accumulated" else [x]:  # gradient accumulation
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = model(part) * (torch.inf if kind == "overflow" and step == 1 else 1.0)
                scaler.scale(loss).backward()
            if kind == "clipped":
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            scaler.step(optimizer)
            scaler.update()

        watch(model, optimizer, body, 4, scaler=scaler)
        return [model, optimizer, scaler.state_dict()]

    return case


@pytest.mark.parametrize("kind", ["plain", "clipped", "accumulated", "overflow"])
def test_scaled_gradients_read_as_they_are(kind: str) -> None:
    counting, plain = Counting(), Counting()
    scaled = unchanged(amp(kind, True), ["all", counting])
    expected = unchanged(amp(kind, False), ["all", plain])
    if kind == "overflow":  # the scaler leaves the weights as they are, and they are not the same from there on
        assert scaled[1]["grads/head/state"] == expected[1]["grads/head/state"] == 4
        assert counting.events["before"] == counting.events["after"] == 3
        assert plain.events["before"] == 4
        scaled, expected = scaled[:1], expected[:1]
    for one, other in zip(scaled, expected, strict=True):
        assert one.keys() == other.keys() | {"updates/scale"}
        for key, value in other.items():
            if key.startswith("grads/"):
                # powers of two scale exactly, but for what bfloat16 has too small for it
                assert one[key] == (None if value is None else pytest.approx(value, rel=1e-5)), key


def test_numbers_do_not_depend_on_autocast_of_what_calls_the_backward() -> None:
    rows = []
    for around in (False, True):
        torch.manual_seed(0)
        model, x = Under(), torch.randn(6, 4)
        with Monitor(model, probes="all") as monitor:
            with monitor.step():
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = model(x)
                    if around:
                        loss.backward()
                if not around:
                    loss.backward()
            monitor.end_step()
            rows.append({key: value for key, value in monitor.latest().items() if not key.startswith("throughput/")})
    assert rows[0] == rows[1]
