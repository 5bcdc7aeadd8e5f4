"""torch.compile: the compiled code is that of a run without the Monitor, and is measured at its boundary."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters
from watching import Counting, Watch, hooks_of, unchanged

from bifusion_diag.probes import Monitor


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).square().mean()


WAYS = ("a block", "a block in place", "all", "all in place", "blocks in place")


def compiled(model: Model, way: str, backend: Any) -> nn.Module:
    """Compile a model, or a part of it."""
    if way == "a block":
        model.blocks[1] = torch.compile(model.blocks[1], backend=backend)  # type: ignore[assignment]
    elif way == "a block in place":
        model.blocks[1].compile(backend=backend)
    elif way == "blocks in place":
        for block in model.blocks:
            block.compile(backend=backend)
    elif way == "all":
        return torch.compile(model, backend=backend)  # type: ignore[return-value]
    else:
        model.compile(backend=backend)
    return model


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No code compiled earlier."""
    dynamo.reset()
    counters.clear()
    yield
    dynamo.reset()


class Compiles:
    """What the compiler did in a case."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        dynamo.reset()
        counters.clear()
        yield
        stats = counters["stats"]
        self.found.append((stats["unique_graphs"], stats["calls_captured"], sum(counters["graph_break"].values())))


def train(way: str, backend: Any, compiles: Compiles, after_opening: bool = False) -> Any:
    def case(watch: Watch) -> list[Any]:
        plain = Model()
        model = plain if after_opening else compiled(plain, way, backend)
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        x = torch.randn(6, 4)
        callee = [model]

        def body(step: int) -> None:
            if after_opening and step == 1:
                callee[0] = compiled(plain, way, backend)
            optimizer.zero_grad()
            callee[0](x).backward()
            optimizer.step()

        with compiles.counted():
            watch(model, optimizer, body, 4)
        assert not hooks_of(plain)
        return [plain, optimizer]

    return case


IGNORE = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*not a leaf Tensor:UserWarning")


@IGNORE
@pytest.mark.parametrize(("way", "backend"), [*((way, "aot_eager") for way in WAYS), ("all", "eager")])
def test_a_compiled_model_is_measured_at_its_boundary(way: str, backend: str) -> None:
    compiles, counting = Compiles(), Counting()
    rows = unchanged(train(way, backend, compiles), ["all", counting])
    bare, watched = compiles.found
    assert watched == bare
    assert (bare[0], bare[2]) == (1, 0)  # the two blocks have the same graph
    inside = {
        "a block": ("blocks.1.",),
        "a block in place": ("blocks.1.",),
        "blocks in place": ("blocks.0.", "blocks.1."),
    }.get(way, ("stem", "blocks", "head"))
    expected = plain_row()
    names = {name for name in expected if name.startswith("grads/")}
    assert {name for name in rows[-1] if name.startswith("grads/")} <= names
    for name in names:
        module, _, key = name.removeprefix("grads/").rpartition("/")
        if key == "output_norm" and module.startswith(inside):
            assert rows[-1].get(name) is None
        else:
            wanted = None if expected[name] is None else pytest.approx(expected[name], rel=1e-4)
            assert rows[-1][name] == wanted, name
    assert counting.seen_of["(root)"] == 4
    assert not any(name.startswith(inside) for name in counting.seen_of)
    assert counting.events == dict.fromkeys(("began", "ended", "before", "after"), 4)


def plain_row() -> dict[str, float | None]:
    """Of a model that is not compiled."""

    def case(watch: Watch) -> list[Any]:
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.randn(6, 4)
        watch(model, optimizer, lambda step: (optimizer.zero_grad(), model(x).backward(), optimizer.step()), 4)
        return [model]

    return unchanged(case)[-1]


@IGNORE
@pytest.mark.parametrize("way", ["a block", "a block in place", "all"])
def test_what_is_compiled_while_the_monitor_is_open_is_left_alone(way: str) -> None:
    compiles, counting = Compiles(), Counting()
    rows = unchanged(train(way, "aot_eager", compiles, after_opening=True), ["all", counting])
    bare, watched = compiles.found
    assert watched == bare
    assert bare[2] == 0
    assert rows[-1]["grads/blocks.1.up/param_norm"] > 0  # type: ignore[operator]
    assert rows[-1]["grads/blocks.1.up/output_norm"] is None
    assert counting.seen_of["blocks.1.up"] == 1


@IGNORE
def test_a_compiled_step() -> None:
    counting = Counting()

    def case(watch: Watch) -> list[Any]:
        model, x = Model(), torch.randn(6, 4)
        loss = torch.compile(lambda: model(x), backend="aot_eager")
        watch(model, None, lambda step: loss().backward())
        return [model]

    row = unchanged(case, ["all", counting])[-1]
    assert row["grads/head/param_norm"] > 0  # type: ignore[operator]
    assert counting.seen_of == Counter()


@IGNORE
def test_what_was_compiled_in_place_is_as_before() -> None:
    model = Model()
    model.blocks[0].compile(backend="eager")
    compiled_call = model.blocks[0]._compiled_call_impl
    with Monitor(model) as monitor:
        with monitor.step():
            model(torch.ones(2, 4)).backward()
        assert model.blocks[0]._compiled_call_impl is not compiled_call
    assert model.blocks[0]._compiled_call_impl is compiled_call
    assert not hooks_of(model)


@IGNORE
@pytest.mark.slow
def test_inductor() -> None:
    compiles = Compiles()
    row = unchanged(train("all", "inductor", compiles))[-1]
    assert compiles.found[0] == compiles.found[1]
    assert row["grads/blocks.1.up/param_norm"] == pytest.approx(plain_row()["grads/blocks.1.up/param_norm"], rel=1e-3)
