"""The mechanisms of the documents and others, each made in a real training and told from the others; with the cure."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bifusion_diag.config import load_settings
from bifusion_diag.data.batch import Batch
from bifusion_diag.data.loader import BatchLoader
from bifusion_diag.model.build import build_model
from bifusion_diag.probes import Monitor
from bifusion_diag.replay.examine.mechanisms import MECHANISMS
from bifusion_diag.replay.incident import Incident
from bifusion_diag.replay.recorder import FlightRecorder
from bifusion_diag.replay.trials.remedies import REMEDIES
from bifusion_diag.training.trainer import training_source

AT = 18  # the step at which it is made
Edit = Callable[["Loop"], None]
PAGE = Path(__file__).parents[3] / "docs" / "mechanisms.md"


class Net(nn.Module):
    """Rows of eight numbers into classes and one number; `inside` is done to the hidden features while `active`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.mid = nn.Linear(6, 16)
        self.head = nn.Linear(16, 4)
        self.side = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.mid(self.body(x))
        return self.head(hidden), self.side(hidden)


class Loop:
    """A training under the flight recorder; `at` edits it at one step, before its batch, after its backward, ..."""

    def __init__(self, *, clip: float | None = None, lr: float = 1e-2, at: int = AT) -> None:
        torch.manual_seed(0)
        self.model = Net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr)
        self.recorder = FlightRecorder(self.losses)
        self.clip = clip
        self.step, self.at = 0, at
        self.margin = 0.0  # of the classes, which are then easy to tell
        self.extra: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda terms: terms

    def batch(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.step)
        x = torch.randn(8, 8, generator=generator)
        x[:, :4] += self.margin * F.one_hot(x[:, :4].argmax(1), 4)
        names = [f"row{self.step}-{i}" for i in range(8)]
        return {"x": x, "label": x[:, :4].argmax(1), "y": x.mean(1, keepdim=True), "names": names}

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        logits, y = self.model(batch["x"])
        return self.extra({"class": F.cross_entropy(logits, batch["label"]), "value": F.mse_loss(y, batch["y"])})

    def run(
        self,
        edit: Edit | None = None,
        *,
        batch: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        gradients: Edit | None = None,
        after: int = 0,
    ) -> list[Incident]:
        with Monitor(self.model, self.optimizer, probes=(), recorder=self.recorder) as monitor:
            for step in range(self.at + 1 + after):
                self.step = step
                if self.step == self.at and edit is not None:
                    edit(self)
                given = self.batch()
                if self.step == self.at and batch is not None:
                    given = batch(given)
                with monitor.step(given):
                    terms = self.losses(given)
                    total = torch.stack(list(terms.values())).sum()
                    monitor.losses(terms, total=total)
                    self.optimizer.zero_grad()
                    total.backward()
                    if self.step == self.at and gradients is not None:
                        gradients(self)
                    if self.clip is not None:
                        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
                    self.optimizer.step()
        return self.recorder.incidents

    @property
    def finite(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self.model.state_dict().values())


@pytest.fixture(autouse=True)
def _quiet(recwarn: pytest.WarningsRecorder) -> None:
    """Without a record, incidents are warned of."""


def _scale_gradient(loop: Loop, factor: float) -> None:
    """What `mid` hands on in the backward is larger at the one step."""

    def hook(module: nn.Module, inward: Any, outward: Any) -> Any:
        return tuple(g * factor for g in inward) if loop.step == AT else None

    loop.model.mid.register_full_backward_hook(hook)


def only(incidents: list[Incident], at: int = AT) -> Incident:
    assert len(incidents) == 1, [incident.message for incident in incidents]
    incident = incidents[0]
    assert incident.step == at
    return incident


# --- the catalogue ---------------------------------------------------------------------------------------------------


def test_the_page_has_a_section_for_each_and_no_other() -> None:
    sections = re.findall(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sections == list(MECHANISMS)


def test_remedies_are_known() -> None:
    for mechanism in MECHANISMS.values():
        assert set(mechanism.remedies) <= set(REMEDIES), mechanism.id


# --- those of the documents ------------------------------------------------------------------------------------------


def test_early_training_from_scratch_is_healthy() -> None:
    assert Loop(lr=3e-2, at=40).run() == []


def test_our_own_empty_match_is_harmless() -> None:
    settings = load_settings("baseline", scale="small", overrides=OURS)
    torch.manual_seed(0)
    model = build_model(settings)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    recorder = FlightRecorder(lambda batch: model(batch).loss)
    loader = BatchLoader(training_source(settings), settings.data, batch_size=2, seed=0)
    batches = [loader.batch(0), _with_one_lonely_point(loader.batch(1))]
    with Monitor(model, optimizer, probes=(), recorder=recorder) as monitor:
        for batch in batches:
            with monitor.step(batch):
                optimizer.zero_grad()
                model(batch).loss.total.backward()
                optimizer.step()
    assert len(recorder.incidents) == 1
    incident = recorder.incidents[0]
    assert (incident.step, incident.kind, incident.mechanism) == (1, "nonfinite-loss", "empty-selection")
    assert incident.harmless, "every gradient is finite"
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert incident.reproduction.identical
    assert set(incident.terms) == {"instance_bce", "instance_dice"}
    assert incident.remedies[0] == "empty-match-zero"
    assert "skip-step" not in incident.remedies
    cured = build_model(load_settings("baseline", scale="small", overrides=[*OURS, "losses.instance.empty_match=zero"]))
    assert torch.isfinite(cured(batches[1]).loss.total), "the cure"


OURS = (
    "data.scenes=4",
    "data.max_points=300",
    "data.image_height=48",
    "data.image_width=64",
    "data.superpoint_size=0.5",
    "losses.instance.empty_match=nan",
)


def _with_one_lonely_point(batch: Batch) -> Batch:
    """All scenes have one object, a single point of their largest superpoint: less than half of any, so that no query
    is inside the object."""
    instance = torch.full_like(batch.instance, -1)
    for scene in range(batch.batch_size):
        mine = batch.scene_index == scene
        largest = batch.superpoint[mine].bincount().argmax()
        instance[int((batch.superpoint == largest).nonzero()[0])] = 0
    return replace(batch, instance=instance)


def test_batchnorm_over_a_handful_of_rows() -> None:
    def close_up(batch: dict[str, Any]) -> dict[str, Any]:
        """Two rows that differ, and that the layer before BatchNorm hardly tells apart."""
        few: dict[str, Any] = {name: value[:2] for name, value in batch.items()}
        weight = current[0].model.body[0].weight
        assert isinstance(weight, Tensor)
        alike = torch.linalg.svd(weight.detach())[2][-1]
        return few | {"x": batch["x"][:1] + torch.tensor([[0.0], [2.0]]) * alike + 1e-4 * batch["x"][:2]}

    current: list[Loop] = []
    loop = Loop()
    current.append(loop)
    incident = only(loop.run(batch=close_up))
    assert "gradient-spike" in {trigger.kind for trigger in incident.triggers}
    assert incident.mechanism == "few-row-batchnorm"
    assert incident.evidence["rows"] == 2
    assert incident.evidence["layer"] == "body.1"
    assert incident.cause is not None
    assert (incident.cause.module, incident.cause.op) == ("body.1", "aten.native_batch_norm")
    held, now = map(float, str(incident.evidence["with its running statistics"]).split(" instead of "))
    assert held < now / 50, "it is the statistics that make the gradient large"
    assert "freeze-batchnorm" in incident.remedies
    cured = current[0] = Loop()

    def freeze(loop: Loop) -> None:
        loop.model.body[1].eval()

    assert cured.run(freeze, batch=close_up) == [], "the cure"


def test_the_time_of_a_diagnosis_is_measured_by_usual_steps() -> None:
    """A step on a handful of rows is over at once, and what it is compared with is not."""
    loop = Loop()

    def work(terms: dict[str, Tensor]) -> dict[str, Tensor]:
        time.sleep(0.0 if loop.step == AT else 0.02)
        return terms

    loop.extra = work
    incident = only(loop.run(batch=lambda batch: batch | {"x": batch["x"] * torch.nan}))
    assert incident.step_seconds > 0.02


@pytest.mark.parametrize(("value", "mechanism"), [(torch.nan, "nan-through-clipping"), (1e30, "gradient-scaled")])
def test_a_gradient_that_is_lost_at_once_after_a_stage_begins(value: float, mechanism: str) -> None:
    """An element is written after the backward, and clipping makes all of it NaN, or by an infinite norm zero: bad in
    whatever step, when nothing is known yet of what the loop does to its gradients."""

    def write(loop: Loop) -> None:
        gradient = loop.model.mid.weight.grad
        assert gradient is not None
        gradient[2, 3] = value

    def new_stage(loop: Loop) -> None:
        loop.recorder.announce("stage S2")

    incident = Loop(clip=1.0).run(new_stage, gradients=write)[0]
    assert (incident.step, incident.kind, incident.mechanism) == (AT, "altered-gradient", mechanism)
    assert ("clipped by an infinite norm" in incident.explanation) == (value == 1e30)


def test_nan_through_clipping() -> None:
    def one_nan(loop: Loop) -> None:
        gradient = loop.model.mid.weight.grad
        assert gradient is not None
        gradient[2, 3] = torch.nan

    loop = Loop(clip=1.0)
    incident = loop.run(gradients=one_nan)[0]
    assert (incident.step, incident.mechanism) == (AT, "nan-through-clipping")
    assert incident.cause is not None
    assert incident.cause.direction == "after backward"
    assert incident.evidence["bad when the optimiser steps"] == len(list(loop.model.parameters()))
    assert not loop.finite
    assert not incident.samples

    def zeroed(loop: Loop) -> None:
        one_nan(loop)
        for parameter in loop.model.parameters():
            assert parameter.grad is not None
            parameter.grad.nan_to_num_(0, 0, 0)

    cured = Loop(clip=1.0)
    cured.run(gradients=zeroed)
    assert cured.finite, "the cure: zero-bad-gradients"


def test_nan_in_one_parameters_gradient_spread_by_clipping() -> None:
    loop = Loop(clip=1.0)
    loop.model.head.bias.register_hook(lambda g: g * torch.nan if loop.step == AT else g)
    incident = loop.run()[0]
    assert incident.mechanism == "nan-through-clipping"
    assert incident.cause is not None
    assert (incident.cause.module, incident.cause.parameter) in (
        ("head", "head.bias"),
        ("head", None),
    )


def test_overflowed_norm() -> None:
    loop = Loop(clip=1.0)
    _scale_gradient(loop, 1e25)
    incident = only(loop.run())
    assert (incident.kind, incident.mechanism) == ("overflowed-norm", "overflowed-norm")
    assert incident.evidence["norm in float64"] > 1e19
    assert incident.evidence["norm in float32"] == torch.inf
    assert incident.cause is not None
    assert incident.cause.module == "mid"
    assert incident.remedies[0] == "exact-norm"
    assert "drop-sample" not in incident.remedies
    assert loop.finite


@pytest.mark.parametrize("policy", ["record", "skip"])
def test_nan_input_poisons_buffers(policy: str) -> None:
    def nan_row(batch: dict[str, Any]) -> dict[str, Any]:
        x = batch["x"].clone()
        x[5, 2] = torch.nan
        return batch | {"x": x}

    loop = Loop()
    loop.recorder.policy = policy  # type: ignore[assignment]
    incident = only(loop.run(batch=nan_row))
    assert incident.mechanism == "poisoned-buffers"
    assert incident.cause is not None
    assert (incident.cause.direction, incident.cause.parameter) == ("data", "x")
    assert [sample.name for sample in incident.samples] == [f"row{AT}-5"]
    assert "body.1.running_mean" in incident.evidence["buffers that are NaN after the forward"]
    assert loop.finite == (policy == "skip"), "the cure takes the buffers back too"


# --- operations ------------------------------------------------------------------------------------------------------


def _inside(change: Callable[[Tensor], Tensor]) -> Edit:
    """The module `mid` does this to its output from now on."""

    def edit(loop: Loop) -> None:
        forward = nn.Linear.forward
        loop.model.mid.forward = lambda x: change(forward(loop.model.mid, x))  # type: ignore[method-assign, assignment]

    return edit


class _Wrong(torch.autograd.Function):
    """The identity, with a backward that is 10,000 times too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1e4


class _Undefined(torch.autograd.Function):
    """The identity, with a backward that divides one element by zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        scale = torch.ones_like(gradient)
        scale[0, 0] = 0
        return gradient * scale / scale


def _naive_softmax(x: Tensor) -> Tensor:
    """Overflows, and beside it a mask of −∞, as attention has."""
    raised = torch.exp(torch.where(torch.arange(16) < 3, -torch.inf, x * 1e4))
    return x * (raised / raised.sum(1, keepdim=True))


def _mean_of_the_counted(x: Tensor) -> Tensor:
    """A mean of each row's chosen features, of which the first row has none."""
    chosen = torch.ones(len(x), 16, dtype=torch.bool)
    chosen[0] = False
    return x + ((x * chosen).sum(1) / chosen.sum(1))[:, None]


@pytest.mark.parametrize(
    ("mechanism", "change"),
    [
        ("log-of-zero", lambda x: x + torch.log(torch.relu(x) * 0)),
        ("sqrt-at-zero", lambda x: x + (x - x.detach()).square().sum(1, keepdim=True).sqrt()),
        ("division-by-zero", lambda x: x + 1 / (x - x.detach())),
        ("exp-overflow", lambda x: torch.log1p(torch.exp(x * 1e4))),
        ("half-overflow", lambda x: x + (x.half() * 6e4 * 100).float() * 0),
        ("masked-softmax-row", lambda x: x * torch.softmax(torch.where(x.new_ones(1) > 0, -torch.inf, x), 1)),
        ("normalise-near-zero", lambda x: x + F.normalize(x - x.detach(), dim=1)),
        ("inverse-trig-edge", lambda x: x + torch.acos((x - x.detach()) + 1)),
        ("custom-function", _Wrong.apply),
        ("custom-function", _Undefined.apply),
        ("exp-overflow", _naive_softmax),
        ("empty-selection", _mean_of_the_counted),
        ("module-output-jump", lambda x: x * 1e5),
        ("detached", lambda x: x.detach()),
        ("dead-units", lambda x: x * 0),
    ],
)  # fmt: skip
def test_operations_in_a_module(mechanism: str, change: Callable[[Tensor], Tensor]) -> None:
    incidents = Loop().run(_inside(change), after=3)
    found = [incident for incident in incidents if incident.mechanism == mechanism]
    assert found, [(incident.kind, incident.mechanism) for incident in incidents]
    cause = found[0].cause
    assert cause is not None
    assert cause.module == "mid"
    assert found[0].samples == ()
    assert "drop-sample" not in found[0].remedies
    assert found[0].step <= AT + 3
    assert found[0].explanation


# --- losses, data, updates -------------------------------------------------------------------------------------------


def test_a_mean_over_nothing_in_a_loss() -> None:
    def edit(loop: Loop) -> None:
        loop.extra = lambda terms: terms | {"value": terms["value"] + loop.model.side.weight[:0].mean()}

    incident = only(Loop().run(edit))
    assert incident.mechanism == "empty-selection"
    assert incident.harmless
    assert incident.terms == ("value",)
    assert incident.samples == ()
    assert incident.cause is not None
    assert incident.cause.direction == "loss"


def test_a_loss_term_that_jumps() -> None:
    def edit(loop: Loop) -> None:
        loop.extra = lambda terms: terms | {"value": terms["value"] * 1e4}

    incident = only(Loop().run(edit))
    assert incident.mechanism == "loss-term-jump"
    assert incident.terms == ("value",)
    assert incident.samples == ()
    assert incident.cause is not None
    assert (incident.cause.module, incident.cause.direction) == (None, "loss")


def test_a_loss_term_whose_sign_turns() -> None:
    def edit(loop: Loop) -> None:
        loop.extra = lambda terms: terms | {"value": -terms["value"] - 5}

    def steady(loop: Loop) -> Loop:
        loop.extra = lambda terms: terms | {"value": terms["value"] + 5}
        return loop

    every = steady(Loop()).run(edit, after=6)
    found = [i for i in every if i.mechanism == "loss-term-jump"]
    assert found, [(i.kind, i.mechanism, i.message) for i in every]
    assert found[0].terms == ("value",)
    assert "its sign has turned" in found[0].explanation


class _Criterion(nn.Module):
    """A criterion whose gradient can be made steep while its value stays small."""

    steep = 1.0

    def forward(self, y: Tensor, target: Tensor) -> Tensor:
        difference = (y - target) * self.steep
        return (difference.square() + 1).sqrt().mean() / self.steep**0.5


def test_a_loss_that_becomes_steep_is_a_term_that_jumps() -> None:
    class Steep(Loop):
        def __init__(self) -> None:
            super().__init__()
            self.model.criterion = _Criterion()

        def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
            logits, y = self.model(batch["x"])
            value: Tensor = self.model.criterion(y, batch["y"])  # type: ignore[operator]
            return {"class": F.cross_entropy(logits, batch["label"]), "value": value}

    def edit(loop: Loop) -> None:
        loop.model.criterion.steep = 1e6  # type: ignore[union-attr, assignment]

    found = Steep().run(edit)
    assert found
    assert found[0].mechanism == "loss-term-jump", found[0].explanation
    assert found[0].terms == ("value",)


class _WithLosses(Net):
    """A model that computes its losses in its own forward, as many do."""

    factor = 1.0

    def forward(self, x: Tensor, label: Tensor, y: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        logits, value = super().forward(x)
        return {"class": F.cross_entropy(logits, label), "value": F.mse_loss(value, y) * self.factor}


def test_a_loss_that_the_model_computes_itself() -> None:
    class Inside(Loop):
        def __init__(self) -> None:
            super().__init__()
            self.model = _WithLosses()
            self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)

        def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
            return self.model(batch["x"], batch["label"], batch["y"])

    def edit(loop: Loop) -> None:
        loop.model.factor = 1e4  # type: ignore[assignment]

    incident = only(Inside().run(edit))
    assert incident.mechanism == "loss-term-jump"
    assert incident.terms == ("value",)
    assert "the model's own forward" in incident.explanation


def test_one_outlier_and_one_wrong_target() -> None:
    def outlier(batch: dict[str, Any]) -> dict[str, Any]:
        x = batch["x"].clone()
        x[3] *= 1e4
        return batch | {"x": x}

    incident = only(Loop().run(batch=outlier))
    assert incident.mechanism == "input-outlier"
    assert [sample.index for sample in incident.samples] == [3]
    assert incident.cause is not None
    assert (incident.cause.direction, incident.cause.parameter) == ("data", "x")

    def wrong(batch: dict[str, Any]) -> dict[str, Any]:
        label = batch["label"].clone()
        label[6] = (label[6] + 1) % 4
        return batch | {"label": label}

    loop = Loop(lr=2e-2, at=60)
    loop.margin = 10.0
    incident = only(loop.run(batch=wrong), at=60)
    assert incident.mechanism == "wrong-labels"
    assert [sample.index for sample in incident.samples] == [6]
    assert incident.terms[0] == "class"


def test_wrong_labels_from_some_step_on() -> None:
    """The shift is seen at its fifth step: the contrast is from before its first."""
    loop = Loop(at=60)
    loop.margin = 1.0
    right = loop.batch

    def batch() -> dict[str, Any]:
        given = right()
        return given | {"label": (given["label"] + 1) % 4} if loop.step >= 60 else given

    loop.batch = batch  # type: ignore[method-assign]
    incident = loop.run(after=6)[0]
    assert (incident.step, incident.triggers[0].kind) == (64, "loss-shift")
    assert incident.mechanism == "wrong-labels", incident.explanation
    assert incident.evidence["the last healthy step with these weights"] == "healthy"
    assert incident.terms[0] == "class"
    assert incident.samples == ()


def _larger_moments(loop: Loop) -> None:
    loop.optimizer.state[loop.model.mid.weight]["exp_avg"].mul_(1e4)


def _nan_moment(loop: Loop) -> None:
    loop.optimizer.state[loop.model.mid.weight]["exp_avg"][0, 0] = torch.nan


def _larger_weights(loop: Loop) -> None:
    with torch.no_grad():
        loop.model.mid.weight.mul_(50)


def _nan_weight(loop: Loop) -> None:
    with torch.no_grad():
        loop.model.mid.weight[0, 0] = torch.nan


def _higher_rate(loop: Loop) -> None:
    loop.optimizer.param_groups[0]["lr"] *= 1000


def _freeze(loop: Loop) -> None:
    loop.model.mid.requires_grad_(False)


def _without_optimizer(loop: Loop) -> None:
    mine = {id(p) for p in loop.model.mid.parameters()}
    group = loop.optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if id(p) not in mine]


def _zero_rate(loop: Loop) -> None:
    _without_optimizer(loop)
    loop.optimizer.add_param_group({"params": list(loop.model.mid.parameters()), "lr": 0.0})


@pytest.mark.parametrize(
    ("mechanism", "edit", "module", "direction"),
    [
        ("corrupt-optimizer-state", _larger_moments, "mid", "update"),
        ("corrupt-optimizer-state", _nan_moment, "mid", "update"),
        ("weights-changed-outside", _larger_weights, "mid", "update"),
        ("nonfinite-weights", _nan_weight, "mid", "update"),
        ("lr-jump", _higher_rate, "(root)", "update"),
        ("frozen", _freeze, "mid", "graph"),
        ("not-in-optimizer", _without_optimizer, "mid", "update"),
        ("zero-lr", _zero_rate, "mid", "update"),
    ],
)
def test_updates(mechanism: str, edit: Edit, module: str, direction: str) -> None:
    incident = Loop().run(edit, after=3)[0]
    assert incident.mechanism == mechanism, incident.explanation
    assert incident.cause is not None
    assert (incident.cause.module, incident.cause.direction) == (module, direction)
    assert incident.samples == ()
    assert incident.step <= AT + 3


def test_a_gradient_scaled_on_its_way() -> None:
    loop = Loop()
    _scale_gradient(loop, 1e4)
    incident = only(loop.run())
    assert incident.mechanism == "gradient-scaled"
    assert incident.samples == ()
    assert incident.cause is not None
    assert (incident.cause.module, incident.cause.direction) == ("mid", "backward")

    def double(loop: Loop) -> None:
        gradient = loop.model.mid.weight.grad
        assert gradient is not None
        gradient.mul_(100)

    incident = only(Loop().run(gradients=double))
    assert incident.mechanism == "gradient-scaled"
    assert incident.cause is not None
    assert (incident.cause.parameter, incident.cause.direction) == ("mid.weight", "after backward")


def test_gradients_that_are_not_cleared() -> None:
    """Run again, the step begins without what was left of the last: its losses are compared alone."""
    loop = Loop()

    def keep(loop: Loop) -> None:
        loop.optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]

    incident = loop.run(keep, after=2)[0]
    assert incident.mechanism == "gradients-not-cleared", incident.explanation
    assert incident.cause is not None
    assert (incident.cause.module, incident.cause.direction) == ("(root)", "after backward")
    assert incident.reproduction.identical


def test_an_error_is_followed_to_its_module() -> None:
    def edit(loop: Loop) -> None:
        _inside(lambda x: x.reshape(3, 3, 3))(loop)

    loop = Loop()
    with pytest.raises(RuntimeError, match="shape"):
        loop.run(edit)
    incident = only(loop.recorder.incidents)
    assert (incident.kind, incident.mechanism) == ("exception", "raised")
    assert incident.cause is not None
    assert incident.cause.module == "mid"
    assert incident.reproduction.identical
