"""Faults and healthy but lively trainings on the models of `fault_models`, written as a third party would: patched
forwards, hooks, edited batches, an optimiser that is meddled with."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.fault_models import Pairs, Task, fusion, images, sequences

Kinds = tuple[str, ...]
LOSS, GRADIENT, SPIKE = ("nonfinite-loss",), ("nonfinite-gradient",), ("gradient-spike", "loss-spike")
CUT, JUMP = ("detached-module", "dead-module"), ("update-jump", "gradient-spike", "loss-spike", "loss-shift")
LABELS, ALTERED = ("loss-spike", "loss-shift", "gradient-spike"), ("altered-gradient", "nonfinite-gradient")


class Job:
    """A training with a fault in it, or a lively one."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.task = case.make()
        self.model: Any = self.task.model
        self.optimizer = self.task.optimizer
        self.batch: Callable[[int], Any] = self.task.batch
        self.loss: Callable[[Any], Any] = self.task.loss
        self.recorder: Any = None
        case.patch(self)

    @property
    def on(self) -> bool:
        """The step is the fault's."""
        return bool(self.model.iteration == self.case.at)

    @property
    def since(self) -> bool:
        """The step is the fault's or a later one."""
        return bool(self.model.iteration >= self.case.at)


def nothing(job: Job) -> None:
    """No change."""


def same(job: Job, batch: Any) -> Any:
    """The batch as it is."""
    return batch


@dataclass(frozen=True)
class Case:
    """A training, and what is to be found of it.

    Attributes:
        name: with the task's name before it.
        place: "forward" ... as in the library of faults; "healthy": a control.
        kinds: an incident of one of these is right; empty for a control.
        at: the fault's step.
        steps: how many are trained.
        silent: nothing becomes NaN or infinite: to be found within 10 steps, else in the step.
        modules: one of these is the right module, or a module inside it; empty: no module is to blame.
        term: the right loss term; None: not judged.
        samples: one of these is the right sample; empty: no sample is to blame.
        make: builds the task.
        patch: changes the model's code, once; it also builds the model that replays a capsule.
        edit: changes the batch.
        before: runs before each step.
        after_backward: runs between backward and clipping.
        before_update: runs just before optimizer.step().
        after: runs after each step, outside of the step block.
        micro: batches a step.
        scaler: mixed precision on the CPU, with this initial scale.
    """

    name: str
    place: str
    kinds: Kinds = ()
    at: int = 40
    steps: int = 52
    silent: bool = False
    modules: tuple[str, ...] = ()
    term: str | None = None
    samples: tuple[int, ...] = ()
    make: Callable[[], Task] = images
    patch: Callable[[Job], None] = nothing
    edit: Callable[[Job, Any], Any] = same
    before: Callable[[Job], None] = nothing
    after_backward: Callable[[Job], None] = nothing
    before_update: Callable[[Job], None] = nothing
    after: Callable[[Job], None] = nothing
    micro: int = 1
    scaler: float | None = None


# --- how models are broken --------------------------------------------------------------------------------------------


def forward_of(name: str, change: Callable[[Any], Any], *, lasts: bool = False) -> Callable[[Job], None]:
    """A patch of a module's forward: what it returns is changed."""

    def patch(job: Job) -> None:
        module = job.model.get_submodule(name)
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            return change(output) if (job.since if lasts else job.on) else output

        module.forward = forward

    return patch


def hook_on(name: str, change: Callable[[Tensor], Tensor], *, lasts: bool = False) -> Callable[[Job], None]:
    """A forward hook that hooks the output's gradient."""

    def patch(job: Job) -> None:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if (job.since if lasts else job.on) and output.requires_grad:
                output.register_hook(change)

        job.model.get_submodule(name).register_forward_hook(hook)

    return patch


def of_batch(change: Callable[[Any], None], *, lasts: bool = False) -> Callable[[Job, Any], Any]:
    """An edit of a copy of the batch."""

    def edit(job: Job, batch: Any) -> Any:
        if not (job.since if lasts else job.on):
            return batch
        batch = copy.deepcopy(batch)
        change(batch)
        return batch

    return edit


def once(change: Callable[[Job], None]) -> Callable[[Job], None]:
    """At the fault's step alone."""
    return lambda job: change(job) if job.on else None


def from_then_on(change: Callable[[Job], None]) -> Callable[[Job], None]:
    """From the fault's step on."""
    return lambda job: change(job) if job.since else None


def weights_of(name: str, change: Callable[[Tensor], Any]) -> Callable[[Job], None]:
    """A change of a module's parameters outside of autograd."""

    def act(job: Job) -> None:
        with torch.no_grad():
            for parameter in job.model.get_submodule(name).parameters():
                change(parameter)

    return once(act)


def gradients_of(name: str, change: Callable[[Tensor], Any]) -> Callable[[Job], None]:
    """A change of a module's gradients after the backward."""

    def act(job: Job) -> None:
        for parameter in job.model.get_submodule(name).parameters():
            change(parameter.grad)

    return once(act)


def state_of(name: str, key: str, change: Callable[[Tensor], Any]) -> Callable[[Job], None]:
    """A change of what the optimiser remembers of a module."""

    def act(job: Job) -> None:
        for parameter in job.model.get_submodule(name).parameters():
            change(job.optimizer.state[parameter][key])

    return once(act)


def set_first(value: float) -> Callable[[Tensor], None]:
    """One element."""

    def change(x: Tensor) -> None:
        x.view(-1)[0] = value

    return change


def term_changed(name: str, change: Callable[[Tensor], Tensor], *, lasts: bool = False) -> Callable[[Job], None]:
    """The loop's own loss function with one term changed."""

    def patch(job: Job) -> None:
        original = job.loss

        def loss(batch: Any) -> Any:
            found = original(batch)
            if not (job.since if lasts else job.on):
                return found
            _, terms = found
            terms = {**terms, name: change(terms[name])}
            return sum(terms.values()), terms

        job.loss = loss

    return patch


def rate_times(factor: float) -> Callable[[Job], None]:
    """The learning rate of one update."""

    def act(job: Job) -> None:
        for group in job.optimizer.param_groups:
            group.setdefault("usual", group["lr"])
            group["lr"] = group["usual"] * (factor if job.on else 1)

    return act


def left_out(name: str) -> Callable[[Job], None]:
    """A patch: the optimiser was built without a module."""

    def patch(job: Job) -> None:
        gone = {id(p) for p in job.model.get_submodule(name).parameters()}
        for group in job.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in gone]

    return patch


class PoisonedBackward(torch.autograd.Function):
    """Identity whose backward makes one element 0 / 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        scale = torch.ones_like(gradient)
        scale.view(-1)[0] = 0
        return gradient * scale / scale


# --- images -----------------------------------------------------------------------------------------------------------


def _nan_pixel(batch: dict[str, Any]) -> None:
    batch["image"][5, 1, 7, 9] = float("nan")


def _hot_pixel(batch: dict[str, Any]) -> None:
    batch["image"][3, :, 20, 20] = 3e4


def _wrong_label(batch: dict[str, Any]) -> None:
    batch["label"][7] = (batch["label"][7] + 3) % 8


def _labels_shuffled(batch: dict[str, Any]) -> None:
    batch["label"] = (batch["label"] + 1 + torch.arange(len(batch["label"])) % 7) % 8


def _pixels_for_shares(batch: dict[str, Any]) -> None:
    batch["centre"][2] *= 32


def _class_out_of_range(batch: dict[str, Any]) -> None:
    batch["label"][4] = 8


def _lost_after_backward(job: Job) -> None:
    for parameter in job.model.parameters():
        parameter.grad.zero_()


def _frozen(*names: str) -> Callable[[Job], None]:
    def act(job: Job) -> None:
        for name in names:
            job.model.get_submodule(name).requires_grad_(False)

    return from_then_on(act)


def _heads_stand_still(job: Job) -> None:
    job.optimizer.param_groups[1]["lr"] = 0.0


def _poisoned_statistics(job: Job) -> None:
    job.model.blocks[0].norm2.running_var[3] = float("inf")


IMAGES = [
    Case("log-of-empty-channel", "forward", LOSS, modules=("blocks.1",),
         patch=forward_of("blocks.1", lambda x: x + 0.1 * torch.log(x))),
    Case("zero-over-zero", "forward", LOSS, modules=("stem.1",),
         patch=forward_of("stem.1", lambda x: x * (x - x).mean() / (x - x).mean())),
    Case("infinite-activation", "forward", LOSS, modules=("blocks.0.conv2",),
         patch=forward_of("blocks.0.conv2", lambda x: x.index_fill(1, torch.tensor([2]), float("inf")))),
    Case("activation-x10000", "forward", SPIKE, silent=True, modules=("blocks.1",),
         patch=forward_of("blocks.1", lambda x: x * 1e4)),
    Case("zeroed-features", "forward", (*CUT, *LABELS), silent=True, modules=("blocks.1", "blocks.0", "stem"),
         patch=forward_of("blocks.1", lambda x: x * 0, lasts=True)),
    Case("root-of-zero-loss", "loss", GRADIENT, term="place",
         patch=term_changed("place", lambda t: t + (t - t.detach()).square().sqrt())),
    Case("nan-term", "loss", LOSS, term="class", patch=term_changed("class", lambda t: t + torch.log(t - t - 1))),
    Case("term-x1000", "loss", SPIKE, silent=True, term="place", patch=term_changed("place", lambda t: t * 1e3)),
    Case("term-turned", "loss", LABELS, silent=True, term="class",
         patch=term_changed("class", lambda t: -t, lasts=True)),
    Case("custom-backward", "backward", GRADIENT, modules=("blocks.0",),
         patch=forward_of("blocks.0", PoisonedBackward.apply)),
    Case("gradient-x1000", "backward", ("gradient-spike",), silent=True, modules=("blocks.0",),
         patch=hook_on("blocks.0", lambda g: g * 1e3)),
    Case("nan-gradient-hook", "backward", GRADIENT, modules=("stem.0",),
         patch=hook_on("stem.0", lambda g: torch.where(g == g.amax(), float("nan"), g))),
    Case("stem-detached", "backward", CUT, silent=True, modules=("stem",),
         patch=forward_of("stem", lambda x: x.detach(), lasts=True)),
    Case("nan-pixel", "data", ("nonfinite-input", "nonfinite-loss"), samples=(5,), edit=of_batch(_nan_pixel)),
    Case("hot-pixel", "data", ("input-outlier", *SPIKE), silent=True, samples=(3,), edit=of_batch(_hot_pixel)),
    Case("wrong-label", "data", LABELS, silent=True, term="class", samples=(7,), edit=of_batch(_wrong_label)),
    Case("labels-shuffled", "data", LABELS, silent=True, term="class", edit=of_batch(_labels_shuffled, lasts=True)),
    Case("target-in-pixels", "data", (*LABELS, "input-outlier"), silent=True, term="place", samples=(2,),
         edit=of_batch(_pixels_for_shares)),
    Case("class-out-of-range", "data", ("exception",), samples=(4,), edit=of_batch(_class_out_of_range)),
    Case("lr-x1000", "optimizer", JUMP, silent=True, before_update=rate_times(1e3)),
    Case("nan-momentum", "optimizer", ("nonfinite-weights",), modules=("blocks.1.conv1",),
         before=state_of("blocks.1.conv1", "momentum_buffer", set_first(float("nan")))),
    Case("weights-x100", "optimizer", JUMP, silent=True, modules=("blocks.1.conv2",),
         before=weights_of("blocks.1.conv2", lambda p: p.mul_(100))),
    Case("frozen-block", "optimizer", ("frozen-module", "detached-module"), silent=True, modules=("blocks.0",),
         before=_frozen("blocks.0")),
    Case("heads-lr-0", "optimizer", ("not-updated",), silent=True, modules=("classifier", "locator"),
         before_update=from_then_on(_heads_stand_still)),
    Case("left-out-of-optimizer", "optimizer", ("not-updated",), silent=True, at=0, steps=14, modules=("locator",),
         patch=left_out("locator")),
    Case("infinite-running-variance", "optimizer", ("nonfinite-buffers",), modules=("blocks.0.norm2",),
         before=once(_poisoned_statistics)),
    # clipping makes every gradient NaN: whose was the first cannot be seen when the optimiser steps
    Case("nan-before-clipping", "after backward", ALTERED,
         after_backward=gradients_of("classifier", set_first(float("nan")))),
    Case("zero_grad-too-early", "after backward", ("altered-gradient", "dead-module"), silent=True,
         after_backward=once(_lost_after_backward)),
]  # fmt: skip

# --- sequences --------------------------------------------------------------------------------------------------------


def _naive_softmax(job: Job) -> None:
    attention = job.model.layers[1].attention
    original = attention.softmax

    def softmax(scores: Tensor) -> Tensor:
        if not job.on:
            return original(scores)
        raised = torch.exp(scores * 1000)
        return raised / raised.sum(-1, keepdim=True)

    attention.softmax = softmax


def _empty_sequence(batch: dict[str, Tensor]) -> None:
    batch["length"][3] = 0


def _nothing_labelled(batch: dict[str, Tensor]) -> None:
    batch["target"][4] = -100


def _targets_shuffled(batch: dict[str, Tensor]) -> None:
    row = batch["target"][2]
    batch["target"][2] = torch.where(row >= 0, (row * 3 + torch.arange(20)) % 32, row)


def _off_by_one(batch: dict[str, Tensor]) -> None:
    batch["target"] = torch.where(batch["target"] >= 0, batch["tokens"], batch["target"])


def _parameter_hook(job: Job) -> None:
    weight = job.model.layers[0].mlp[2].weight
    weight.register_hook(lambda g: g * float("nan") if job.on else g)


def _warm_up(job: Job) -> None:
    for group in job.optimizer.param_groups:
        group["lr"] = 3e-3 * min(1.0, job.model.iteration / 20)


def with_warm_up(act: Callable[[Job], None]) -> Callable[[Job], None]:
    """The usual schedule, and then the fault."""

    def both(job: Job) -> None:
        _warm_up(job)
        act(job)

    return both


def _times_1000(job: Job) -> None:
    for group in job.optimizer.param_groups:
        group["lr"] *= 1000


_text = Case("", "", make=sequences, before=_warm_up)

SEQUENCES = [
    replace(_text, name="naive-softmax", place="forward", kinds=LOSS, modules=("layers.1.attention",),
            patch=_naive_softmax),
    replace(_text, name="empty-sequence", place="data", kinds=LOSS, modules=("layers.0.attention",), samples=(3,),
            edit=of_batch(_empty_sequence)),
    replace(_text, name="huge-scores", place="forward", kinds=LOSS, modules=("layers.1.attention.qkv",),
            patch=forward_of("layers.1.attention.qkv", lambda x: x * 1e30)),
    replace(_text, name="sharp-logits", place="forward", kinds=SPIKE, silent=True, modules=("head",),
            patch=forward_of("head", lambda x: x / 1e-3)),
    replace(_text, name="nothing-labelled", place="data", kinds=LOSS, term="loss_next", samples=(4,),
            edit=of_batch(_nothing_labelled)),
    replace(_text, name="targets-shuffled", place="data", kinds=LABELS, silent=True, term="loss_next", samples=(2,),
            edit=of_batch(_targets_shuffled)),
    replace(_text, name="off-by-one-targets", place="data", kinds=LABELS, silent=True, term="loss_next",
            edit=of_batch(_off_by_one, lasts=True)),
    replace(_text, name="parameter-hook-nan", place="backward", kinds=GRADIENT, modules=("layers.0.mlp.2",),
            patch=_parameter_hook),
    replace(_text, name="gradient-x1000", place="backward", kinds=("gradient-spike",), silent=True,
            modules=("layers.1.mlp",), patch=hook_on("layers.1.mlp", lambda g: g * 1e3)),
    replace(_text, name="embedding-gradient-0", place="backward", kinds=CUT, silent=True, modules=("embed",),
            patch=hook_on("embed", lambda g: g * 0, lasts=True)),
    replace(_text, name="layer-detached", place="backward", kinds=CUT, silent=True, modules=("layers.0", "embed", ""),
            patch=forward_of("layers.0", lambda x: x.detach(), lasts=True)),
    replace(_text, name="frozen-layer", place="optimizer", kinds=("frozen-module", "detached-module"), silent=True,
            modules=("layers.1",), before=with_warm_up(_frozen("layers.1"))),
    replace(_text, name="nan-weight", place="optimizer", kinds=("nonfinite-loss", "nonfinite-weights"),
            modules=("layers.1.mlp.0",), before=with_warm_up(weights_of("layers.1.mlp.0", set_first(float("nan"))))),
    replace(_text, name="second-moment-0", place="optimizer", kinds=JUMP, silent=True, modules=("layers.2.mlp",),
            before=with_warm_up(state_of("layers.2.mlp", "exp_avg_sq", lambda m: m.zero_()))),
    replace(_text, name="nan-moment", place="optimizer", kinds=("nonfinite-weights",), modules=("head",),
            before=with_warm_up(state_of("head", "exp_avg", set_first(float("nan"))))),
    replace(_text, name="lr-x1000", place="optimizer", kinds=JUMP, silent=True,
            before=with_warm_up(once(_times_1000))),
    replace(_text, name="inf-before-clipping", place="after backward", kinds=ALTERED, modules=("norm",),
            after_backward=gradients_of("norm", set_first(float("inf")))),
    replace(_text, name="norm-overflow", place="after backward", kinds=(*ALTERED, "overflowed-norm"),
            modules=("head",), after_backward=gradients_of("head", lambda g: g.mul_(1e25))),
]  # fmt: skip

# --- fusion -----------------------------------------------------------------------------------------------------------


def _cold(job: Job) -> None:
    job.model.temperature = 1e-3 if job.on else 0.1


def _empty_cloud(batch: Pairs) -> None:
    batch.points[2] = 0


def _size_zero(batch: Pairs) -> None:
    batch.size[6] = 0


def _images_swapped(batch: Pairs) -> None:
    other = int((batch.label != batch.label[1]).nonzero()[0])
    batch.image[[1, other]] = batch.image[[other, 1]]


def _nan_point(batch: Pairs) -> None:
    batch.points[8, 11, 0] = float("nan")


def _far_point(batch: Pairs) -> None:
    batch.points[9, 3] = 5e3


def _wrong_shape(batch: Pairs) -> None:
    batch.label[0] = (batch.label[0] + 2) % 6


def _gamma_of_negative(batch: Pairs) -> None:
    batch.image[1] = batch.image[1] ** 0.45


def _saturated(job: Job) -> None:
    with torch.no_grad():
        job.model.gate.mlp[2].bias.fill_(60.0)


def _weighted_term(job: Job) -> None:
    original = job.model.forward

    def forward(batch: Pairs) -> Any:
        found = original(batch)
        if job.on:
            found.total = found.total + 999 * found.weights["align"] * found.terms["align"]
            found.terms["align"] = found.terms["align"] * 1000
        return found

    job.model.forward = forward


def _branch_stands_still(job: Job) -> None:
    job.optimizer.param_groups[1]["lr"] = 0.0


_pairs = Case("", "", at=70, steps=82, make=fusion)

FUSION = [
    replace(_pairs, name="empty-cloud", place="data", kinds=LOSS, modules=("point_encoder",), samples=(2,),
            edit=of_batch(_empty_cloud)),
    replace(_pairs, name="nan-point", place="data", kinds=("nonfinite-input", "nonfinite-loss"), samples=(8,),
            edit=of_batch(_nan_point)),
    replace(_pairs, name="gamma-of-negative", place="data", kinds=("nonfinite-input", "nonfinite-loss"), samples=(1,),
            edit=of_batch(_gamma_of_negative)),
    replace(_pairs, name="far-point", place="data", kinds=("input-outlier", *SPIKE), silent=True, samples=(9,),
            edit=of_batch(_far_point)),
    replace(_pairs, name="size-of-zero", place="data", kinds=LOSS, term="size", samples=(6,),
            edit=of_batch(_size_zero)),
    replace(_pairs, name="wrong-label", place="data", kinds=LABELS, silent=True, samples=(0,),
            edit=of_batch(_wrong_shape)),
    replace(_pairs, name="images-swapped", place="data", kinds=LABELS, silent=True, samples=(1, 0, 2),
            edit=of_batch(_images_swapped)),
    replace(_pairs, name="cold-temperature", place="loss", kinds=SPIKE, silent=True, term="align", before=_cold),
    replace(_pairs, name="term-x1000", place="loss", kinds=SPIKE, silent=True, term="align", patch=_weighted_term),
    replace(_pairs, name="gate-saturated", place="forward", kinds=("alpha-collapse", *JUMP), silent=True,
            modules=("gate",), before=once(_saturated)),
    replace(_pairs, name="exp-overflow", place="forward", kinds=LOSS, modules=("point_encoder.out",),
            patch=forward_of("point_encoder.out", lambda x: torch.log1p(torch.exp(x * 500)) / 500)),
    replace(_pairs, name="branch-gradient-x1000", place="backward", kinds=("gradient-spike",), silent=True,
            modules=("image_encoder",), patch=hook_on("image_encoder.6", lambda g: g * 1e3)),
    replace(_pairs, name="branch-detached", place="backward", kinds=CUT, silent=True, modules=("image_encoder",),
            patch=forward_of("image_encoder", lambda x: x.detach(), lasts=True)),
    replace(_pairs, name="branch-lr-0", place="optimizer", kinds=("not-updated",), silent=True,
            modules=("image_encoder",), before_update=from_then_on(_branch_stands_still)),
    replace(_pairs, name="branch-not-in-optimizer", place="optimizer", kinds=("not-updated",), silent=True, at=0,
            steps=14, modules=("image_encoder",), patch=left_out("image_encoder")),
    replace(_pairs, name="frozen-encoder", place="optimizer", kinds=("frozen-module", "detached-module"), silent=True,
            modules=("point_encoder",), before=_frozen("point_encoder")),
]  # fmt: skip

# --- healthy ----------------------------------------------------------------------------------------------------------


def rate(of_step: Callable[[int], float]) -> Callable[[Job], None]:
    """A schedule of the learning rate, as a share of the usual one."""

    def act(job: Job) -> None:
        for group in job.optimizer.param_groups:
            group.setdefault("usual", group["lr"])
            group["lr"] = group["usual"] * of_step(job.model.iteration)

    return act


def _hard_images(batch: dict[str, Any]) -> None:
    g = torch.Generator().manual_seed(9)
    batch["image"] += 0.5 * torch.randn(batch["image"].shape, generator=g)


def _announced(job: Job) -> None:
    if job.model.iteration in (30, 60):
        job.recorder.announce("stage")
        job.model.image_encoder.requires_grad_(job.model.iteration == 60)


def _freeze_one_release_other(job: Job) -> None:
    if job.model.iteration == 0:
        job.model.image_encoder.requires_grad_(False)
    if job.model.iteration == 40:
        job.model.image_encoder.requires_grad_(True)
        job.model.point_encoder.requires_grad_(False)


def _held_gate(job: Job) -> None:
    job.model.gate.held = job.model.iteration < 40


def _evaluates(job: Job) -> None:
    if job.model.iteration % 10 == 9:
        job.model.eval()
        with torch.no_grad():
            job.loss(job.batch(100_000 + job.model.iteration))
        job.model.train()


def _small_last(job: Job, batch: Any) -> Any:
    if job.model.iteration % 12 != 11:
        return batch
    return {name: value[:3] for name, value in batch.items()}


def _ramp(job: Job) -> None:
    step = job.model.iteration
    job.model.weights = {"class": 1.0, "align": 0.6 * min(1.0, step / 50), "size": 0.5 if step < 45 else 0.1}


def _sometimes(job: Job) -> None:
    model: Any = job.model
    model.expert = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 48))
    job.optimizer.add_param_group({"params": list(model.expert.parameters())})
    original = model.norm.forward

    def forward(x: Tensor) -> Tensor:
        y: Tensor = original(x)
        return y + model.expert(x) if model.iteration % 7 == 3 else y

    model.norm.forward = forward


def _smoothing(job: Job) -> None:
    original = job.loss

    def loss(batch: Any) -> Any:
        if not job.since:
            return original(batch)
        logits, place = job.model(batch["image"])
        terms = {
            "class": F.cross_entropy(logits, batch["label"], label_smoothing=0.1),
            "place": F.smooth_l1_loss(place, batch["centre"]),
        }
        return terms["class"] + terms["place"], terms

    job.loss = loss


def _noisy() -> Task:
    return images(noise=0.3)


def _dropping() -> Task:
    return sequences(dropout=0.4, path_drop=0.3)


CONTROLS = {
    "images": [
        Case("from-scratch", "healthy", steps=60, at=0),
        Case("noisy-images", "healthy", steps=80, at=0, make=_noisy),
        Case("warm-up", "healthy", steps=60, before=rate(lambda step: min(1.0, step / 30))),
        Case("cosine-restarts", "healthy", steps=80,
             before=rate(lambda step: 0.5 + 0.5 * math.cos(math.pi * (step % 25) / 25))),
        Case("lr-decay", "healthy", steps=60, before=rate(lambda step: 1.0 if step < 35 else 0.1)),
        Case("plateau", "healthy", steps=70, before=rate(lambda step: 1.0 if step < 30 else 1e-4)),
        Case("hard-batch", "healthy", edit=of_batch(_hard_images)),
        Case("accumulation", "healthy", micro=4),
        Case("overflow-skips", "healthy", scaler=2.0**126),
        Case("evaluation", "healthy", after=_evaluates),
        Case("label-smoothing", "healthy", patch=_smoothing),
    ],
    "sequences": [
        replace(_text, name="from-scratch", place="healthy", steps=60, before=nothing),
        replace(_text, name="dropout-and-path-drop", place="healthy", steps=60, make=_dropping),
        replace(_text, name="small-last-batch", place="healthy", steps=60, edit=_small_last),
        replace(_text, name="conditional-module", place="healthy", steps=60, patch=_sometimes),
    ],
    "fusion": [
        replace(_pairs, name="from-scratch", place="healthy", steps=90),
        replace(_pairs, name="announced-stages", place="healthy", steps=80, before=_announced),
        replace(_pairs, name="freeze-and-release", place="healthy", steps=60, before=_freeze_one_release_other),
        replace(_pairs, name="gate-released", place="healthy", steps=60, before=_held_gate),
        replace(_pairs, name="weight-schedule", place="healthy", steps=80, before=_ramp),
    ],
}  # fmt: skip

CASES: dict[str, Case] = {
    f"{workload}/{case.name}": replace(case, name=f"{workload}/{case.name}")
    for workload, cases in (("images", IMAGES), ("sequences", SEQUENCES), ("fusion", FUSION))
    for case in (*cases, *CONTROLS[workload])
}
