"""The Monitor: what it must not change, the order of its events, and that everything reaches the record."""

from __future__ import annotations

import fnmatch
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from probe_toys import Encoded, Gate, Give, Loss, View, Zoo
from torch import Tensor, nn

import bifusion_diag.probes.rows
from bifusion_diag.errors import UserError
from bifusion_diag.probes import (
    PROBES,
    Call,
    ClipProbe,
    DataProbe,
    GateProbe,
    GradsProbe,
    Monitor,
    Probe,
    Reading,
    Subject,
    make_probes,
)
from bifusion_diag.record import ModuleInfo, RunHeader, RunWriter, load_run

#: Probes that measure all of their keys only when told where.
TOLD = {"data": lambda: DataProbe(labels={"labels": (0, 1)})}
TIMED = ("throughput",)  # whose numbers are never the same twice


class Full(nn.Module):
    """A model that every probe of the catalogue finds something to measure in."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.gate, self.projection, self.encoder, self.criterion = (Give() for _ in range(5))
        self.spatial_head = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.zoo = Zoo()
        self.squash = nn.Sigmoid()

    def forward(self, x: Tensor) -> Loss:
        tokens = self.tower({"tokens": x})["tokens"]
        f2d = self.spatial_head(tokens)
        alpha = f2d.mean(1, keepdim=True).sigmoid()
        flags = [torch.rand(len(x), 1, device=x.device) < share for share in (0.9, 0.6, 0.3)]
        view = self.projection(View(x[:, None, :3], *flags, flags[2].any(1)))
        fused = self.gate(Gate(alpha * f2d + (1 - alpha) * x, alpha)).fused
        self.encoder(Encoded(f2d, x, view.valid, alpha))
        fused = fused + self.attention(fused, x, x)[0]
        terms = {"a": self.zoo(fused), "b": self.squash(f2d).square().mean()}
        pairs = torch.arange(2), torch.zeros(2, dtype=torch.long)
        return self.criterion(Loss(terms["a"] + 0.1 * terms["b"], terms, {"a": 1.0, "b": 0.1}, [pairs], [3]))


def header() -> RunHeader:
    return RunHeader("run", parameters={"zoo.steps": {"total": 1, "trainable": 1}})


def train(probes: list[str | Probe], steps: int, writer: RunWriter | None = None) -> dict[str, Any]:
    """A short training. Returns all its state: weights, gradients, buffers, optimiser, random streams."""
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    model = Full()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with Monitor(model, optimiser, probes=probes, writer=writer, block=3) as monitor:
        for step in range(steps):
            x = torch.randn(8, 4)
            batch = {"x": x, "scenes": [x[:3], x[3:]], "labels": torch.arange(8) % 3 - 1}
            optimiser.zero_grad()
            with monitor.step(batch, step=step):
                model(x).total.backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimiser.step()
            monitor.log("train/grad_norm", norm)
            monitor.log("train/lr", 1e-2)
    return {
        "weights": dict(model.state_dict()),
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "optimiser": optimiser.state_dict()["state"],
        "random": [random.getstate(), np.random.get_state()[1], torch.get_rng_state()],
    }


def same(a: Any, b: Any) -> bool:
    """Bitwise."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, np.ndarray):
        return a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize(
    "probes", [["all"], *([name] for name in PROBES), ["all", GradsProbe(name="again"), GateProbe(name="gate2")]]
)
def test_training_is_bitwise_the_same(tmp_path: Path, probes: list[str | Probe]) -> None:
    bare = train([], 6)
    with RunWriter(tmp_path / "run.json", header()) as writer:
        watched = train(probes, 6, writer)
    assert same(bare, watched)
    assert not same(bare, train([], 5))  # the comparison can fail


def test_everything_reaches_the_record(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with RunWriter(path, header()) as writer:
        train(["all"], 8, writer)
    run = load_run(path)
    assert run.steps.tolist() == list(range(8))
    for name, expected in (("loss/total", 0), ("train/grad_norm", 0), ("grads/zoo.frozen/param_norm", 8)):
        series = run.series(name)
        assert series is not None
        assert series.missing.sum() == expected
    lr = run.series("train/lr")
    assert lr is not None
    assert lr.value.tolist() == pytest.approx([1e-2] * 8)
    histogram = run.histogram("gate/alpha")
    assert histogram is not None
    assert histogram.counts.sum(1).tolist() == [8.0] * 8
    assert run.modules[0] == ModuleInfo("(root)", "Full", 0, "(root)", 0, 0)
    order = [module.name for module in run.modules]
    assert order[1:8] == ["tower", "spatial_head", "projection", "gate", "encoder", "attention", "zoo"]
    assert order.index("zoo.twice") < order.index("zoo.frozen") < order.index("criterion") < order.index("zoo.never")
    by_name = {module.name: module for module in run.modules}
    assert (by_name["zoo.frozen"].parameters, by_name["zoo.frozen"].trainable) == (20, 0)
    assert (by_name["zoo.steps.1"].part, by_name["zoo.twice"].part) == ("zoo.steps", "zoo")
    assert [module.order for module in run.modules] == list(range(len(order)))


#: Keys that need what this model does not have: a batch with poses, all queries among the arguments, an alignment loss,
#: a GradScaler. They have tests of their own.
ELSEWHERE = defaultdict[str, set[str]](
    set,
    projection={"off_captured", "off_augmented"},
    matching={"queries"},
    flow={"share", "gain", "norm_2d", "norm_3d"},
    updates={"scale"},
)


@pytest.mark.parametrize("name", sorted(PROBES))
def test_the_table_of_keys_is_what_is_recorded(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run.json"
    probe = TOLD.get(name, PROBES[name])()
    with RunWriter(path, header()) as writer:
        train([probe], 1, writer)
    recorded = {key.removeprefix(f"{probe.name}/") for key in load_run(path).names() if not key.startswith("train/")}
    patterns = {re.sub("<[a-z]+>", "*", key) for key in probe.KEYS}
    assert all(any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns) for key in recorded)
    assert all(any(fnmatch.fnmatchcase(key, pattern) for key in recorded) for pattern in patterns - ELSEWHERE[name])


def test_numbers_are_the_same_alone_and_together(tmp_path: Path) -> None:
    for file, probes in (("together", ["all"]), *((name, [name]) for name in PROBES)):
        with RunWriter(tmp_path / f"{file}.json", header()) as writer:
            train(list(probes), 3, writer)
    together = load_run(tmp_path / "together.json")
    for name in PROBES.keys() - TIMED:
        alone = load_run(tmp_path / f"{name}.json")
        for key in alone.names():
            a, b = alone.series(key), together.series(key)
            assert a is not None
            assert b is not None
            np.testing.assert_array_equal(a.value, b.value)


class Recorder(Probe):
    """Writes down what it is told."""

    prefix = "recorder"

    def __init__(self, story: list[str]) -> None:
        super().__init__()
        self.story = story

    def attach(self, subject: Subject) -> None:
        self.story.append("attach")

    def watches(self, name: str, module: nn.Module) -> bool:
        return name == "(root)"

    watches_gradient = watches

    def begin(self) -> None:
        self.story.append("begin")

    def batch(self, batch: Any) -> None:
        self.story.append("batch")

    def gradient(self, name: str, gradient: Tensor) -> None:
        self.story.append("gradient")

    def backward_ended(self) -> None:
        self.story.append("ended")

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        self.story.append("before")

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        self.story.append("after")

    def seen(self, call: Call) -> None:
        self.story.append("seen")

    def collect(self) -> Iterator[Reading]:
        self.story.append("collect")
        yield Reading(("recorder/x",), torch.ones(1))


def test_the_order_of_events_is_that_of_the_docstring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    promised = re.findall(r"# (?:.*?)\b([a-z]+):", Monitor.__doc__ or "")
    events = ["begin", "batch", "seen", "gradient", "ended", "before", "after", "collect", "log", "close", "write"]
    assert promised == ["attach", *events]
    story: list[str] = []
    model, batch = nn.Linear(2, 1), torch.ones(1, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with RunWriter(tmp_path / "run.json", header()) as writer:
        plain = writer.append_later
        monkeypatch.setattr(writer, "append_later", lambda *a: (story.append("write"), plain(*a)))
        monitor = Monitor(model, optimizer, [Recorder(story)], writer=writer, block=1)
        for name, event in (("log", "log"), ("end_step", "close")):
            real = getattr(monitor, name)
            monkeypatch.setattr(monitor, name, lambda *a, real=real, event=event: (story.append(event), real(*a)))
        with monitor:
            for step in range(2):
                with monitor.step(batch, step=step):
                    model(batch).sum().backward()
                    optimizer.step()
                monitor.log("train/x", 1.0)
                monitor.end_step()
    # step() and leaving close too, which finds nothing open
    once = ["close", *promised[1:]]
    assert story == ["attach", *once, *once, "close"]


def test_an_exception_leaves_earlier_rows_and_no_hooks(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with RunWriter(tmp_path / "run.json", header()) as writer:
        with pytest.raises(RuntimeError, match="broken"), Monitor(model, probes=["all"], writer=writer) as monitor:  # noqa: PT012
            for step in range(3):
                with monitor.step(step=step):
                    model(torch.ones(1, 2)).sum().backward()
                    if step == 2:
                        raise RuntimeError("broken")
        writer.finish("failed", "broken")
    assert load_run(tmp_path / "run.json").steps.tolist() == [0, 1]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("out", "name"), [("lr1e-3.5", "lr1e-3.5"), ("a.json", "a"), (".", None)])
def test_a_run_is_named_by_its_place(out: str, name: str | None) -> None:
    with Monitor(nn.Linear(2, 2), probes=["grads"], out=out):
        pass
    record = Path(out) if out.endswith(".json") else Path(out, "run.json")
    assert load_run(record).header.name == (name or Path.cwd().name)


def test_a_probe_that_cannot_attach_leaves_no_hooks() -> None:
    class Bad(Probe):
        prefix = "bad"

        def watches(self, name: str, module: nn.Module) -> bool:
            if name == "1":
                raise RuntimeError("cannot")
            return True

    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(RuntimeError, match="cannot"):
        Monitor(model, probes=[Bad()]).__enter__()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_schedule_leaves_gaps(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with RunWriter(path, header()) as writer:
        train([GradsProbe(every=lambda step: step % 3 == 0), "losses"], 7, writer)
    run = load_run(path)
    grads, loss = run.series("grads/zoo.twice/param_norm"), run.series("loss/total")
    assert grads is not None
    assert loss is not None
    assert grads.missing.tolist() == [0, 1, 1, 0, 1, 1, 0]
    assert loss.missing.sum() == 0
    assert run.steps.tolist() == list(range(7))


def test_forwards_outside_a_step_are_not_measured() -> None:
    model = Give()
    with Monitor(model, probes=["gate"]) as monitor:
        model(Gate(torch.zeros(1), torch.full((4, 1), 0.9)))
        with monitor.step():
            model(Gate(torch.zeros(1), torch.full((4, 1), 0.25)))
        model(Gate(torch.zeros(1), torch.full((4, 1), 0.9)))
        monitor.end_step()
        assert monitor.latest()["gate/mean"] == 0.25


def test_log_belongs_to_a_step() -> None:
    with Monitor(nn.Linear(1, 1), probes=[]) as monitor:
        with pytest.raises(UserError, match=r"log\('train/x'\): no step is open"):
            monitor.log("train/x", 1.0)
        with monitor.step():
            pass
        monitor.log("train/x", 1.0)
        monitor.log("train/x", torch.tensor(2.0, requires_grad=True))  # the later one holds
        monitor.end_step()
        assert monitor.latest() == {"train/x": 2.0}
        with pytest.raises(UserError, match="no step is open"):
            monitor.log("train/x", 1.0)


def test_one_name_twice_is_an_error(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run.json", header()) as writer, pytest.raises(UserError, match="gate/mean"):  # noqa: PT012
        model = Give()
        with Monitor(model, probes=["gate"], writer=writer) as monitor:
            with monitor.step():
                model(Gate(torch.zeros(1), torch.full((4, 1), 0.25)))
            monitor.log("gate/mean", 1.0)


def test_probes_by_name() -> None:
    assert [probe.prefix for probe in make_probes(["all"])] == [kind.prefix for kind in PROBES.values()]
    assert [type(probe) for probe in make_probes(["gate", "all"])].count(GateProbe) == 1
    assert [probe.name for probe in make_probes("gate")] == ["gate"]
    with pytest.raises(UserError, match=r"unknown probe 'grad'\. Did you mean 'grads'\?"):
        make_probes(["grad"])
    with pytest.raises(UserError, match=r"unknown probe 'xyz'\. Known: .*clip, .*gate"):
        make_probes(["xyz"])
    with pytest.raises(UserError, match="ClipProbe'> is no probe; give names of the catalogue, or probes such as"):
        make_probes([ClipProbe])  # type: ignore[list-item]
    with pytest.raises(UserError, match="two probes would record under 'clip'"):
        make_probes(["clip", ClipProbe()])


def test_a_loop_that_goes_on_keeps_the_steps_before(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)

    def loop(first: int, steps: int) -> None:
        with Monitor(model, probes=["weights"], out=tmp_path, first_step=first) as monitor:
            for _ in range(steps):
                with monitor.step():
                    model(torch.ones(1, 2))

    loop(5, 2)  # nothing is there to go on with
    assert load_run(tmp_path).steps.tolist() == [5, 6]
    loop(0, 4)
    first = load_run(tmp_path)
    loop(3, 2)
    again = load_run(tmp_path)
    assert again.steps.tolist() == [0, 1, 2, 3, 4]
    assert again.header.run_id == first.header.run_id
    assert [event.step for event in again.events if event.kind == "resume"] == [3]
    loop(0, 1)
    assert load_run(tmp_path).steps.tolist() == [0]


def test_what_is_no_model_and_no_optimizer() -> None:
    model: Any = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"a OrderedDict was given as the model; give a torch\.nn\.Module"):
        Monitor(model.state_dict())
    with pytest.raises(UserError, match=r"a Parameter was given as the optimizer; give a torch\.optim\.Optimizer"):
        Monitor(model, model.parameters())


def test_no_copy_to_the_host_before_a_block_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    real = bifusion_diag.probes.rows._to_host
    monkeypatch.setattr("bifusion_diag.probes.rows._to_host", lambda rows: (copies.append(len(rows)), real(rows))[1])
    with RunWriter(tmp_path / "run.json", header()) as writer:
        train(["all"], 7, writer)
    assert copies == [3, 3, 1]


def test_what_the_loop_does_not_log_probes_tell() -> None:
    tied = nn.Linear(3, 3)
    model = nn.Sequential(tied, nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 3))
    model[3].weight = tied.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    with Monitor(model, optimizer, ["grads", "updates"]) as monitor:
        with monitor.step():
            model(torch.ones(2, 3)).square().sum().backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 0.5
        monitor.end_step()
        row = monitor.latest()
        assert row["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-6)
        assert row["train/lr"] == 0.25
        with monitor.step():
            monitor.log("train/grad_norm", 7.0)
        monitor.end_step()
        assert monitor.latest()["train/grad_norm"] == 7.0


def test_what_a_probe_has_chosen_is_an_event(tmp_path: Path) -> None:
    class Chooser(Probe):
        prefix = "chooser"
        chosen: str | None = None

        def collect(self) -> Iterator[Reading]:
            yield Reading(("chooser/x",), torch.ones(1))

        def describe(self) -> str | None:
            return self.chosen

    probe = Chooser()
    with Monitor(nn.Linear(1, 1), probes=[probe], out=tmp_path / "run") as monitor:
        for chosen in (None, "a", "a", "b"):
            probe.chosen = chosen
            with monitor.step():
                pass
    events = [(event.step, event.message) for event in load_run(tmp_path / "run").events if event.kind == "note"]
    assert events == [(1, "a"), (3, "b")]
