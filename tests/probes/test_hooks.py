"""Hooks: which modules have one, that none is left, and what becomes of a probe that raises."""

from __future__ import annotations

import contextlib
import timeit
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from watching import Counting, hooks_of

from bifusion_diag.errors import UserError
from bifusion_diag.probes import Call, Monitor, Probe, Reading, Subject
from bifusion_diag.record import load_run

EVENTS = ("begin", "batch", "seen", "gradient", "backward_began", "backward_ended", "before_update", "after_update")


class Broken(Probe):
    """Raises in one event, from its second step on."""

    prefix = "broken"

    def __init__(self, event: str, error: BaseException, from_step: int = 1) -> None:
        super().__init__()
        self.error, self.step, self.calls = error, -1, 0
        plain = getattr(self, event)

        def raising(*arguments: Any) -> Any:
            if self.step + (event in ("begin", "every")) >= from_step:
                self.calls += 1
                raise error
            return plain(*arguments)

        setattr(self, event, raising)
        self._begin, self.begin = self.begin, self._count  # type: ignore[method-assign]

    def _count(self) -> None:
        self._begin()
        self.step += 1

    def watches(self, name: str, module: nn.Module) -> bool:
        return name == "1"

    watches_gradient = watches

    def reads(self, output: Any) -> bool:
        return isinstance(output, dict)

    def collect(self) -> Iterator[Reading]:
        yield Reading(("broken/x",), torch.ones(1))


class Model(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return {"y": y}


def train(probes: list[Any], out: Path | None = None, steps: int = 4, fails: Any = None) -> tuple[nn.Module, Any]:
    """Some steps; `fails` is called in the middle of the third one's block. Returns what must have no hooks now."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept: list[Tensor] = []
    try:
        with Monitor(model, optimizer, probes=probes, out=out) as monitor:
            for step in range(steps):
                optimizer.zero_grad()
                with monitor.step(torch.ones(1)):
                    output = model(torch.ones(2, 4))["y"]
                    kept.append(output)
                    if step == 2 and fails is not None:
                        fails()
                    output.sum().backward()
                    optimizer.step()
    finally:
        assert not hooks_of(model, [optimizer])
        if fails is not None:
            assert not kept[-1]._backward_hooks
    return model, optimizer


@pytest.mark.parametrize("event", [*EVENTS, "reads", "every", "collect"])
def test_a_probe_that_raises_is_switched_off_and_the_training_goes_on(event: str, tmp_path: Path) -> None:
    bare, _ = train([])
    broken, counting = Broken(event, KeyError("what")), Counting()
    message = rf"step 1: probe 'broken' is off: {event}( of 1| of \(root\))?: KeyError: 'what' \(test_hooks.py:\d+\)"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        model, _ = train([broken, "grads", counting], tmp_path / "run.json")
    assert len(caught) == 1
    assert broken.calls == 1
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), model.parameters(), strict=True))
    run = load_run(tmp_path / "run.json")
    assert [(e.step, e.kind, e.data["probe"]) for e in run.events] == [(1, "probe", "broken")]
    assert f"{event}" in run.events[0].message
    assert run.all_series["broken/x"].missing.tolist() == [0, 1, 1, 1]
    assert run.all_series["grads/0/param_norm"].missing.sum() == 0
    assert counting.events == dict.fromkeys(("began", "ended", "before", "after"), 4)


@pytest.mark.parametrize("event", [*EVENTS, "reads", "every", "collect"])
def test_what_a_probe_was_told_and_is_not_there_is_an_error_of_the_first_step(event: str) -> None:
    with pytest.raises(UserError, match="no such field"):
        train([Broken(event, UserError("no such field"), from_step=0)])
    with pytest.warns(RuntimeWarning, match="no such field"):  # later, a run is worth more
        train([Broken(event, UserError("no such field"))])


@pytest.mark.parametrize("values", [torch.ones(3), torch.ones(1, 1), torch.ones(())])
def test_a_malformed_reading_is_an_error_of_its_probe(values: Tensor) -> None:
    class Wrong(Counting):
        def collect(self) -> Iterator[Reading]:
            yield Reading(("wrong/x",), values)

    with pytest.warns(RuntimeWarning, match="collect: ValueError: values of shape"):
        train([Wrong()])


@pytest.mark.parametrize("event", ["attach", "watches", "watches_gradient", "watches_local_gradient"])
def test_errors_at_the_opening_are_raised_and_leave_no_hooks(event: str) -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(KeyError, match="what"):
        Monitor(model, optimizer, probes=["all", Broken(event, KeyError("what"), from_step=-1)]).__enter__()
    assert not hooks_of(model, [optimizer])


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("stop"), "failed"), (KeyboardInterrupt("stop"), "interrupted")]
)
def test_an_error_in_the_loop_leaves_no_hooks_and_a_record(error: BaseException, status: str, tmp_path: Path) -> None:
    def fails() -> None:
        raise error

    with pytest.raises(type(error), match="stop"):
        train(["all"], tmp_path / "run.json", fails=fails)
    run = load_run(tmp_path / "run.json")
    assert run.status == status
    assert run.steps.tolist() == [0, 1]


def test_ctrl_c_in_a_probe_is_no_error_of_the_probe(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train([Broken("seen", KeyboardInterrupt())], tmp_path / "run.json")
    assert load_run(tmp_path / "run.json").status == "interrupted"


def test_an_error_in_a_forward_that_the_loop_survives() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    counting = Counting()
    with Monitor(model, probes=["grads", counting]) as monitor:
        with monitor.step():
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                model(torch.ones(2, 5))
            output = model(torch.ones(2, 4))
            output.register_hook(lambda _: int("in backward"))  # raises
            with pytest.raises(ValueError, match="in backward"):
                output.sum().backward()
            model(torch.ones(2, 4)).sum().backward()
        monitor.end_step()
        assert monitor.latest()["grads/0/state"] == 3
    assert counting.events["ended"] == 1
    assert not hooks_of(model)


def test_a_graph_of_an_older_step_is_nobodys() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    counting = Counting()
    with Monitor(model, probes=[counting]) as monitor:
        with monitor.step():
            old = model(torch.ones(2, 4))
        with monitor.step():
            old.sum().backward()
            assert counting.gradients_of == {}
        new = model(torch.ones(2, 4))
        with monitor.step():
            new.sum().backward()
    assert counting.gradients_of == counting.events == {}


class Nothing(Probe):
    """Watches nothing."""

    prefix = "nothing"

    def collect(self) -> Iterator[Reading]:
        return iter(())


class Readers(Nothing):
    def reads(self, output: Any) -> bool:
        return False


@pytest.mark.parametrize(("probe", "hooked"), [(Nothing, {"", "0", "1"}), (Readers, {"", "0", "1", "1.odd", "1.rnn"})])
def test_a_module_that_nobody_could_want_to_see_has_no_hook(probe: Any, hooked: set[str]) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.odd = nn.Linear(4, 4), nn.LayerNorm(4), Odd()
            self.rnn = nn.GRU(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(self.odd(self.norm(self.linear(x))))[0]

    model = nn.Sequential(nn.Linear(4, 4), Block())
    with Monitor(model, probes=[probe()]) as monitor:
        with monitor.step():  # in the first step, all have one that finds out the order
            model(torch.ones(2, 4)).sum().backward()
        assert {name for name, module in model.named_modules() if module._forward_hooks} == hooked
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_children_of_what_has_no_forward_notice_a_backward() -> None:
    class Holder(nn.Module):  # as a LightningModule: a training_step, and a forward that is not called
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4))}), nn.Linear(4, 4)])

        def training_step(self, x: Tensor) -> Tensor:
            return self.parts[0]["a"](x).sum()  # type: ignore[index, operator]

    counting = Counting()
    counting.watches_gradient = lambda name, module: False  # type: ignore[method-assign]
    model = Holder()
    with Monitor(model, probes=[counting]) as monitor, monitor.step():
        model.training_step(torch.ones(1, 4)).backward()
        assert counting.events["ended"] == 1


def test_the_end_of_a_backward_is_not_that_of_a_checkpoint_inside() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Linear(4, 4), nn.Linear(4, 4)

    model = nn.ModuleDict({"net": nn.ModuleDict({"inner": Net()})})
    inner = model["net"]["inner"]  # type: ignore[index]
    complete: list[bool] = []

    class Ends(Nothing):
        def watches_gradient(self, name: str, module: nn.Module) -> bool:
            return name == "net.inner.block"

        def backward_ended(self) -> None:
            complete.append(inner.stem.weight.grad is not None)

    with Monitor(model, probes=[Ends()]) as monitor, monitor.step():
        checkpoint(inner.block, inner.stem(torch.ones(2, 4)), use_reentrant=True).sum().backward()
        assert complete == [True]


def test_without_a_noticed_backward_its_end_is_told_before_the_update() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    counting = Counting()
    model = Hidden()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with Monitor(model, optimizer, probes=["grads", counting]) as monitor:
        with monitor.step():
            model.weight.square().sum().backward()
            optimizer.step()
            model.weight.grad = None
        monitor.end_step()
        assert monitor.latest()["grads/(root)/param_norm"] == pytest.approx(2 * 3**0.5)
    assert (counting.events["ended"], counting.events["before"]) == (1, 1)


class NoSynchronisation(TorchDispatchMode):
    """Refuses copies that wait for the device. Meta tensors refuse on their own what needs their values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default:
            source, target, waits = args[0], out, not kwargs.get("non_blocking")
        elif func is torch.ops.aten.copy_.default:
            source, target, waits = args[1], args[0], not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        else:
            return out
        assert source.device == target.device or not waits, f"a copy from {source.device} to {target.device}"
        return out


@pytest.mark.parametrize("amp", [False, True])
def test_no_probe_waits_for_the_device(amp: bool) -> None:
    """Tensors without values stand for those of an accelerator: asking for a value raises. A CUDA twin is below."""
    from test_monitor import Full

    with torch.device("meta"):
        model = Full()
        x = torch.randn(8, 4)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    with Monitor(model, optimizer, probes="all") as monitor:
        for step in range(4):
            optimizer.zero_grad()
            with NoSynchronisation() if step > 1 else warnings.catch_warnings(), monitor.step(x):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
                    loss = model(x).total
                loss.backward()
                optimizer.step()
            with NoSynchronisation() if step > 1 else warnings.catch_warnings():
                monitor.end_step()


@pytest.mark.parametrize("read", [lambda x: x.item(), lambda x: bool(x > 0), lambda x: x.nonzero(), lambda x: x.cpu()])
def test_waiting_for_the_device_would_show(read: Any) -> None:
    class Waits(Counting):
        def seen(self, call: Call) -> None:
            read(call.output.sum())

    with torch.device("meta"):
        model, x = nn.Linear(4, 4), torch.randn(8, 4)
    with pytest.warns(RuntimeWarning, match="is off: seen"), Monitor(model, probes=[Waits()]) as monitor:  # noqa: SIM117
        with monitor.step(), NoSynchronisation():
            model(x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_no_probe_waits_for_a_cuda_device() -> None:
    from test_monitor import Full

    model, x = Full().cuda(), torch.randn(8, 4, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.device("cuda"), Monitor(model, optimizer, probes="all") as monitor:
        for step in range(4):
            optimizer.zero_grad()
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
            try:
                with monitor.step(x):
                    model(x).total.backward()
                    optimizer.step()
                monitor.end_step()
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("around", ["autocast", "inference", "subclass", "device"])
def test_a_probe_runs_as_if_nothing_were_around_the_call(around: str) -> None:
    class Named(Tensor):
        pass

    found: list[Any] = []

    class Looks(Nothing):
        def watches(self, name: str, module: nn.Module) -> bool:
            return name == "(root)"

        def seen(self, call: Call) -> None:
            product = call.output @ call.output.t()
            product += 1  # refused of what was made in inference mode, where that is left
            found.append((product.dtype, type(product), product.is_inference(), torch.zeros(1).device.type))
            assert not torch.is_grad_enabled()

    model, x = nn.Linear(4, 4), torch.ones(2, 4)
    modes: dict[str, Any] = {
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
        "inference": torch.inference_mode(),
        "device": torch.device("meta"),
        "subclass": contextlib.nullcontext(),
    }
    if around == "subclass":
        model.register_forward_hook(lambda _module, _inputs, output: output.as_subclass(Named))
    if around == "autocast":
        model.register_forward_hook(lambda _module, _inputs, output: output.float())
    with Monitor(model, probes=[Looks()]) as monitor, monitor.step(), modes[around]:
        model(x)
        assert torch.is_grad_enabled() == (around != "inference")
        assert torch.is_inference_mode_enabled() == (around == "inference")
    assert found == [(torch.float32, Tensor, False, "cpu")]


def test_a_hook_costs_little() -> None:
    """Not a benchmark: a bound that only something gone wrong would break."""

    class Idle(Nothing):
        def watches(self, name: str, module: nn.Module) -> bool:
            return True

        def seen(self, call: Call) -> None:
            pass

    model = nn.Sequential(*(nn.Identity() for _ in range(100)))
    x = torch.ones(1)

    def once() -> float:
        return min(timeit.repeat(lambda: model(x), number=20, repeat=5)) / 2000

    bare = once()
    with Monitor(model, probes=[Idle()]) as monitor:
        with monitor.step():
            model(x)
        with monitor.step():
            watched = once()
    assert watched - bare < 50e-6  # seconds a call; measured 3e-6 on an idle machine


def test_the_monitor_is_told_which_modules_it_hooks() -> None:
    found: list[str] = []

    class Asks(Nothing):
        def attach(self, subject: Subject) -> None:
            found.extend(subject.modules)

    model = Model()
    with Monitor(model, probes=[Asks()]):
        assert found == ["(root)", "0", "1", "2"]
