"""Lively healthy runs raise no alarm; every kind of fault does, at its step and place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vital_runs import Classifier, Watch, images, train

from bifusion_diag.probes.monitor import Monitor
from bifusion_diag.replay.watch.detect import Detector
from bifusion_diag.replay.watch.vitals import Vitals


def adam(model: nn.Module, rate: float = 3e-3) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), rate)


def cross_entropy(model: nn.Module) -> Callable[[int, tuple[Tensor, Tensor]], Tensor]:
    return lambda step, batch: F.cross_entropy(model(batch[0]), batch[1])


# --- healthy and lively ----------------------------------------------------------------------------------------------


def warm_up(seed: int) -> Watch:
    """Learning rate from 0, AdamW."""
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 20))
    return train(
        model,
        optimizer,
        cross_entropy(model),
        batches=lambda step: images(step, seed=seed),
        after=lambda step: schedule.step(),
        steps=70,
    )


def restart(seed: int) -> Watch:
    """Cosine to almost 0, and back to the first rate, twice."""
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 25, eta_min=1e-5)
    return train(
        model,
        optimizer,
        cross_entropy(model),
        batches=lambda step: images(step, seed=seed),
        after=lambda step: schedule.step(),
        steps=80,
    )


def restart_adam(seed: int) -> Watch:
    model = Classifier()
    optimizer = adam(model, 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 25, eta_min=0)
    return train(
        model,
        optimizer,
        cross_entropy(model),
        batches=lambda step: images(step, seed=seed),
        after=lambda step: schedule.step(),
        steps=80,
    )


def plateau(seed: int) -> Watch:
    """Labels that nothing can be learnt about."""
    model = Classifier()

    def batches(step: int) -> tuple[Tensor, Tensor]:
        x, labels = images(step, seed=seed)
        return x, torch.randint(0, 4, labels.shape)

    return train(model, adam(model), cross_entropy(model), batches=batches, steps=80)


def hard_batch(seed: int) -> Watch:
    """Now and then a batch whose inputs are three times as large and of which half the labels are noise."""
    model = Classifier()

    def batches(step: int) -> tuple[Tensor, Tensor]:
        x, labels = images(step, seed=seed)
        if step % 17 == 16:
            return 3 * x, torch.where(torch.arange(8) < 2, torch.randint(0, 4, (8,)), labels)
        return x, labels

    return train(model, adam(model, 1e-3), cross_entropy(model), batches=batches, steps=80)


def stages(seed: int) -> Watch:
    """A stage ends unannounced: the stem freezes as the head begins to learn; later all learns."""
    model = Classifier()
    model.head.requires_grad_(False)

    def before(step: int) -> None:
        if step == 30:
            model.head.requires_grad_(True)
            model.stem.requires_grad_(False)
        if step == 55:
            model.requires_grad_(True)

    return train(
        model,
        adam(model),
        cross_entropy(model),
        batches=lambda step: images(step, seed=seed),
        before=before,
        steps=80,
    )


class Gated(nn.Module):
    """Two branches under a gate that returns α."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(12, 1)
            nn.init.zeros_(self.score.weight)
            nn.init.zeros_(self.score.bias)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"alpha": torch.sigmoid(self.score(x))}

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(12, 16), nn.Linear(12, 16)
        self.gate = Gated.Gate()
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.gate(x)["alpha"]
        logits: Tensor = self.head(torch.relu(alpha * self.left(x) + (1 - alpha) * self.right(x)))
        return logits


def vectors(step: int, seed: int = 0, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    x = torch.randn(size, 12, generator=generator)
    rule = torch.randn(12, 4, generator=torch.Generator().manual_seed(3))
    return x, (x @ rule).argmax(1)


def gate_opens(seed: int) -> Watch:
    """α is a constant 0.5 and then learns, fast."""
    model = Gated()
    model.gate.requires_grad_(False)
    optimizer = torch.optim.Adam(
        [
            {"params": model.gate.parameters(), "lr": 5e-2},
            {"params": [*model.left.parameters(), *model.right.parameters(), *model.head.parameters()]},
        ],
        1e-2,
    )
    return train(
        model,
        optimizer,
        cross_entropy(model),
        batches=lambda step: vectors(step, seed),
        before=lambda step: model.gate.requires_grad_(step >= 30) and None,
        steps=80,
    )


def from_scratch(seed: int) -> Watch:
    """A deep net without normalisation and a sum as loss: norms of hundreds that swing."""
    model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(12, 12), nn.GELU())], nn.Linear(12, 4))
    return train(
        model,
        torch.optim.SGD(model.parameters(), 2e-4, momentum=0.9),
        lambda step, batch: 10 * F.cross_entropy(3 * model(3 * batch[0]), batch[1], reduction="sum"),
        batches=lambda step: vectors(step, seed),
        steps=80,
    )


class Deep(nn.Module):
    """A transformer with dropout and stochastic depth, a token of its own and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, 0.2, batch_first=True) for _ in range(3))
        self.out = nn.Linear(16, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(ids), 1, 16), self.embed(ids)], 1)
        for block in self.blocks:
            if not self.training or torch.rand(()) > 0.3:
                x = block(x)
        logits: Tensor = self.out(x[:, 0])
        return logits


def stochastic_depth(seed: int) -> Watch:
    model = Deep()

    def batches(step: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(0, 20, (8, 6), generator=torch.Generator().manual_seed(step + 99 * seed))
        return ids, ids[:, 2]

    return train(model, adam(model, 5e-3), cross_entropy(model), batches=batches, steps=80)


def accumulation(seed: int) -> Watch:
    """Four backwards a step, clipped; a last batch that is smaller."""
    model = Classifier()
    optimizer = adam(model)
    watch = Watch()
    with Monitor(model, optimizer, [], recorder=watch) as monitor:
        for step in range(60):
            x, labels = images(step, size=16 if step % 10 < 9 else 5, seed=seed)
            with monitor.step((x, labels)):
                for part, expected in zip(x.chunk(4), labels.chunk(4), strict=True):
                    (F.cross_entropy(model(part), expected) / 4).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
    return watch


def overflows(seed: int) -> Watch:
    """A GradScaler that looks for its scale, and one overflow later."""
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=20, growth_factor=2.0**3)
    watch = Watch()
    with Monitor(model, optimizer, [], scaler=scaler, recorder=watch) as monitor:
        for step in range(70):
            x, labels = images(step, seed=seed)
            with monitor.step((x, labels)):
                loss = 30 * F.cross_entropy(model(x), labels)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
    assert sum(vitals.scaled_out for vitals in watch.vitals) >= 2
    return watch


def tiny_batches(seed: int) -> Watch:
    """Two samples a step: everything is noise."""
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    return train(
        model, adam(model, 1e-2), cross_entropy(model), batches=lambda step: vectors(step, seed, size=2), steps=80
    )


class Experts(nn.Module):
    """A mixture of experts that each get some of the samples, and now and then none; one helper runs by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.route = nn.Linear(12, 4)
        self.experts = nn.ModuleList(nn.Linear(12, 4) for _ in range(4))
        self.sometimes = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.route(x).softmax(1).max(1)
        out = torch.zeros(len(x), 4)
        for i, expert in enumerate(self.experts):
            if (chosen == i).any():
                out = out.index_put((torch.where(chosen == i)[0],), weight[chosen == i, None] * expert(x[chosen == i]))
        return out + self.sometimes(x) if torch.rand(()) < 0.3 else out


def experts(seed: int) -> Watch:
    model = Experts()
    return train(
        model, adam(model, 1e-2), cross_entropy(model), batches=lambda step: vectors(step, seed, size=6), steps=80
    )


class TwoTerms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(12, 16)
        self.main, self.side = nn.Linear(16, 4), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.body(x))
        return self.main(hidden), self.side(hidden)


def two_terms(seed: int, weight_at: Callable[[int], float]) -> Watch:
    model = TwoTerms()
    optimizer = adam(model, 5e-3)
    watch = Watch()
    with Monitor(model, optimizer, [], recorder=watch) as monitor:
        for step in range(70):
            x, labels = vectors(step, seed)
            with monitor.step({"x": x, "labels": labels}):
                logits, rebuilt = model(x)
                terms = {"class": F.cross_entropy(logits, labels), "rebuild": F.mse_loss(rebuilt, x)}
                weights = {"class": 1.0, "rebuild": weight_at(step)}
                monitor.losses(terms, weights)
                optimizer.zero_grad()
                (terms["class"] + weights["rebuild"] * terms["rebuild"]).backward()
                optimizer.step()
    return watch


def term_schedule(seed: int) -> Watch:
    """A term's weight rises from nothing, and is 0 later on."""
    return two_terms(seed, lambda step: 0.0 if step >= 50 else step / 10)


def term_dropped(seed: int) -> Watch:
    return two_terms(seed, lambda step: 1.0 if step < 40 else 0.0)


def label_smoothing(seed: int) -> Watch:
    model = Classifier()
    return train(
        model,
        adam(model, 1e-3),
        lambda step, batch: F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1 if step >= 40 else 0.0),
        batches=lambda step: images(step, seed=seed),
        steps=80,
    )


def eval_pauses(seed: int) -> Watch:
    """Evaluation between steps, an average of weights kept, a frozen teacher inside of the model, last batches."""
    model = Classifier()
    model.teacher = Classifier().requires_grad_(False)
    kept = [p.detach().clone() for p in model.head.parameters()]

    def after(step: int) -> None:
        if step % 10 == 9:
            model.eval()
            with torch.no_grad():
                model(images(5000)[0])
                now = [p.detach().clone() for p in model.head.parameters()]
                for p, average in zip(model.head.parameters(), kept, strict=True):
                    p.copy_(average)
                model(images(5001)[0])
                for p, value, average in zip(model.head.parameters(), now, kept, strict=True):
                    p.copy_(value)
                    average.lerp_(value, 0.5)
            model.train()
        for p, slow in zip(model.stem.parameters(), model.teacher.stem.parameters(), strict=True):
            slow.data.lerp_(p.detach(), 0.1)

    return train(
        model,
        adam(model),
        cross_entropy(model),
        batches=lambda step: images(step, 8 if step % 10 < 9 else 3, seed=seed),
        after=after,
        steps=70,
    )


def clipped_by_value(seed: int) -> Watch:
    """Norms clipped by module, then values; a rare step is scaled down by much."""
    model = Classifier()

    def ended(step: int) -> None:
        for part in (model.stem, model.body, model.head):
            torch.nn.utils.clip_grad_norm_(part.parameters(), 0.1 if step % 9 else 0.003)
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)

    return train(
        model,
        torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
        cross_entropy(model),
        batches=lambda step: images(step, seed=seed),
        ended=ended,
        steps=60,
    )


def adversaries(seed: int) -> Watch:
    """A generator and a discriminator, each with its optimiser, one after the other in a step; weights are clamped."""
    generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 12))
    judge = nn.Sequential(nn.Linear(12, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    model = nn.ModuleDict({"generator": generator, "judge": judge})
    first, second = adam(judge, 2e-3), adam(generator, 2e-3)
    watch = Watch()
    torch.manual_seed(seed)
    with Monitor(model, [first, second], [], recorder=watch) as monitor:
        for step in range(70):
            real = vectors(step, seed)[0]
            with monitor.step(real):
                fake = generator(torch.randn(16, 4))
                first.zero_grad()
                (F.softplus(-judge(real)).mean() + F.softplus(judge(fake.detach())).mean()).backward()
                first.step()
                with torch.no_grad():
                    for p in judge.parameters():
                        p.clamp_(-0.5, 0.5)
                second.zero_grad()
                F.softplus(-judge(fake)).mean().backward()
                second.step()
    return watch


def learnt_by_heart(seed: int) -> Watch:
    """Sixteen samples over and over: the loss falls by orders of magnitude."""
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))
    return train(
        model,
        adam(model, 1e-2),
        cross_entropy(model),
        batches=lambda step: vectors(step % 4, seed, size=4),
        steps=80,
    )


def frozen_from_the_start(seed: int) -> Watch:
    """A frozen trunk, a head behind a zero scale, BatchNorm in evaluation mode, weight decay."""
    model = Classifier()
    model.stem.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3, weight_decay=0.1)
    return train(model, optimizer, cross_entropy(model), batches=lambda step: images(step, seed=seed), steps=60)


class ZeroScale(nn.Module):
    """Residual branches behind a scale of zero (ReZero): what is inside gets no gradient at first."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.scale = nn.Parameter(torch.zeros(3))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        for scale, layer in zip(self.scale, self.inside, strict=True):
            x = x + scale * torch.tanh(layer(x))
        logits: Tensor = self.head(x)
        return logits


def zero_scale(seed: int) -> Watch:
    model = ZeroScale()
    return train(model, adam(model, 5e-3), cross_entropy(model), batches=lambda step: vectors(step, seed), steps=80)


HEALTHY = [
    warm_up,
    restart,
    restart_adam,
    plateau,
    hard_batch,
    stages,
    gate_opens,
    from_scratch,
    stochastic_depth,
    accumulation,
    overflows,
    tiny_batches,
    experts,
    term_schedule,
    term_dropped,
    label_smoothing,
    eval_pauses,
    clipped_by_value,
    adversaries,
    learnt_by_heart,
    frozen_from_the_start,
    zero_scale,
]


@pytest.mark.parametrize("run", HEALTHY, ids=lambda run: run.__name__)
def test_no_alarm_in_a_healthy_run(run: Callable[[int], Watch]) -> None:
    torch.manual_seed(0)
    watch = run(0)
    assert len(watch.vitals) >= 60
    assert watch.vitals[-1].grad_norm is not None  # it was measured
    assert {step: [t.message for t in triggers] for step, triggers in watch.alarms.items()} == {}


def test_what_was_seen_goes_through_json() -> None:
    model = Gated()
    watch = train(model, adam(model), cross_entropy(model), batches=vectors, steps=20)
    stored = json.dumps(watch.detector.state())
    watch.detector.restore(json.loads(stored))
    assert json.dumps(watch.detector.state()) == stored


# --- faults ----------------------------------------------------------------------------------------------------------

AT = 25  # the step of the fault


def only(watch: Watch, step: int, kind: str) -> list:
    """The triggers of the first alarm, which is at this step and of this kind."""
    assert watch.alarms, "no alarm"
    first = min(watch.alarms)
    messages = {at: [t.message for t in triggers] for at, triggers in watch.alarms.items()}
    assert first == step, messages
    assert watch.alarms[first][0].kind == kind, messages
    return watch.alarms[first]


def spoilt(
    spoil: Callable[[int, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]], rate: float = 3e-3, steps: int = AT + 12
) -> Watch:
    """A classifier whose batches are changed."""
    torch.manual_seed(0)
    model = Classifier()
    return train(
        model, adam(model, rate), cross_entropy(model), batches=lambda step: spoil(step, images(step)), steps=steps
    )


def edited(
    *,
    before: Callable[[int, Classifier, torch.optim.Optimizer], None] = lambda *_: None,
    ended: Callable[[int, Classifier, torch.optim.Optimizer], None] = lambda *_: None,
    loss: Callable[[int, Classifier, Tensor, Tensor], Tensor] | None = None,
    optimizer: Callable[[Classifier], torch.optim.Optimizer] = adam,
    steps: int = AT + 12,
) -> Watch:
    """A classifier in whose training something is edited before a step, or after its backward."""
    torch.manual_seed(0)
    model = Classifier()
    made = optimizer(model)
    plain = cross_entropy(model)
    return train(
        model,
        made,
        plain if loss is None else lambda step, batch: loss(step, model, *batch),
        before=lambda step: before(step, model, made),
        ended=lambda step: ended(step, model, made),
        steps=steps,
    )


def test_nan_loss_term() -> None:
    torch.manual_seed(0)
    model = TwoTerms()
    optimizer, watch = adam(model), Watch()
    with Monitor(model, optimizer, [], recorder=watch) as monitor:
        for step in range(AT + 1):
            x, labels = vectors(step)
            with monitor.step((x, labels)):
                logits, rebuilt = model(x)
                if step == AT:
                    rebuilt = rebuilt - rebuilt.detach() - 1
                    rebuilt = rebuilt.log()
                terms = {"class": F.cross_entropy(logits, labels), "rebuild": F.mse_loss(rebuilt, x)}
                monitor.losses(terms)
                optimizer.zero_grad()
                sum(terms.values()).backward()
                optimizer.step()
    assert only(watch, AT, "nonfinite-loss")[0].term == "rebuild"
    assert set(watch.fingerprints[AT].gradients) == {name for name, _ in model.named_parameters()}
    assert not watch.fingerprints[AT - 1].gradients


def test_nan_gradient_of_a_finite_loss() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square().sqrt()  # the derivative at zero is 0 × ∞

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.root, self.last = nn.Linear(12, 8), Root(), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.root(self.first(x) * (x[:, :1] != 0)))

    def batches(step: int) -> tuple[Tensor, Tensor]:
        x, labels = vectors(step)
        if step == AT:
            x[3, 0] = 0
        return x, labels

    torch.manual_seed(0)
    model = Net()
    watch = train(model, adam(model), cross_entropy(model), batches=batches, steps=AT + 1)
    trigger = only(watch, AT, "nonfinite-gradient")[0]
    assert (trigger.module, trigger.parameter) == ("first", "first.bias")


def test_nan_in_the_batch_and_in_a_buffer() -> None:
    def spoil(step: int, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if step == AT:
            batch[0][5, 1, 2, 3] = math.nan
        return batch

    triggers = only(spoilt(spoil, steps=AT + 1), AT, "nonfinite-input")
    assert (triggers[0].sample, triggers[0].parameter) == (5, "0")
    assert {"nonfinite-loss", "nonfinite-buffers"} <= {trigger.kind for trigger in triggers}
    assert {t.parameter for t in triggers if t.kind == "nonfinite-buffers"} == {
        f"{part}.1.running_{what}" for part in ("stem", "body") for what in ("mean", "var")
    }


def test_a_poisoned_buffer_alone() -> None:
    def before(step: int, model: Classifier, _: object) -> None:
        if step == AT:
            model.body[1].running_var[2] = math.inf

    triggers = only(edited(before=before), AT, "nonfinite-buffers")
    assert (triggers[0].module, triggers[0].parameter) == ("body.1", "body.1.running_var")


def test_an_outlier_pixel() -> None:
    def spoil(step: int, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if step == AT:
            batch[0][6, 0, 1, 1] = 300.0
        return batch

    assert only(spoilt(spoil), AT, "input-outlier")[0].sample == 6


def test_an_overflowed_norm() -> None:
    def loss(step: int, model: Classifier, x: Tensor, labels: Tensor) -> Tensor:
        value = F.cross_entropy(model(x), labels)
        return value + 1e25 * (value - value.detach()) if step == AT else value

    watch = edited(loss=loss, steps=AT + 1)
    assert "overflowed-norm" in [t.kind for t in only(watch, AT, "overflowed-norm")]


@pytest.mark.parametrize("factor", [1000.0, 0.0, -1.0, math.nan])
def test_a_gradient_altered_after_the_backward(factor: float) -> None:
    def ended(step: int, model: Classifier, _: object) -> None:
        if step == AT:
            model.body[0].weight.grad.mul_(factor)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)

    trigger = only(edited(ended=ended), AT, "altered-gradient")[0]
    assert trigger.module == "body.0" or math.isnan(factor)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("since", [1, AT])
def test_gradients_that_are_not_cleared(since: int, to_none: bool) -> None:
    torch.manual_seed(0)
    model = Classifier()
    optimizer = adam(model)
    watch = Watch()
    with Monitor(model, optimizer, [], recorder=watch) as monitor:
        for step in range(AT + 12):
            if step < since:
                optimizer.zero_grad(set_to_none=to_none)
            batch = images(step)
            with monitor.step(batch):
                for part in (slice(4), slice(4, 8)):  # two backwards a step, as gradients are accumulated
                    F.cross_entropy(model(batch[0][part]), batch[1][part]).backward()
                optimizer.step()
    assert [t.parameter for t in only(watch, since, "altered-gradient")] == ["stem.0.weight"]
    assert sum(kinds.count("altered-gradient") for kinds in watch.kinds().values()) == 1


@pytest.mark.parametrize("factor", [0.0, 1e25])
def test_every_gradient_lost_after_the_backward(factor: float) -> None:
    """Set to zero too early, or so large that clipping by an infinite float32 norm makes them zero."""

    def ended(step: int, model: Classifier, _: object) -> None:
        if step == AT:
            for parameter in model.parameters():
                parameter.grad.mul_(factor)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)

    only(edited(ended=ended), AT, "altered-gradient")


def test_one_element_altered_where_no_sample_is() -> None:
    def ended(step: int, model: Classifier, _: object) -> None:
        if step == AT:
            model.body[0].weight.grad.view(-1)[1151 // 2 + 7] = math.nan

    trigger = only(edited(ended=ended), AT, "altered-gradient")[0]
    assert trigger.parameter == "body.0.weight"


def test_a_module_whose_gradient_is_a_thousand_times_too_large() -> None:
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return 1000 * gradient

    def before(step: int, model: Classifier, _: object) -> None:
        if step == AT:
            model.stem.register_forward_hook(lambda module, inputs, output: Scale.apply(output))

    trigger = only(edited(before=before), AT, "gradient-spike")[0]
    assert trigger.module in ("stem.0", "stem.1")


def test_a_parameter_whose_gradient_a_hook_scales() -> None:
    def before(step: int, model: Classifier, _: object) -> None:
        if step == AT:
            model.head.bias.register_hook(lambda gradient: 1000 * gradient)

    assert only(edited(before=before), AT, "gradient-spike")[0].module == "head"


def test_wrong_labels_in_one_batch() -> None:
    def spoil(step: int, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return (batch[0], (batch[1] + 1) % 4) if step == 40 else batch

    assert only(spoilt(spoil, 1e-2, 41), 40, "loss-spike")[0].term == "loss"


def test_wrong_labels_from_some_step_on() -> None:
    """At a time when little is learnt: no single loss is a spike."""

    def spoil(step: int, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return (batch[0], (batch[1] + 1) % 4) if step >= 40 else batch

    watch = spoilt(spoil, 3e-3, 52)
    first = min(watch.alarms)
    assert 40 <= first < 50
    assert watch.alarms[first][0].kind in ("loss-shift", "loss-spike")


def test_a_gate_that_saturates() -> None:
    torch.manual_seed(0)
    model = Gated()

    def before(step: int) -> None:
        if step == AT:
            with torch.no_grad():
                model.gate.score.bias.fill_(-20.0)

    watch = train(model, adam(model), cross_entropy(model), batches=vectors, before=before, steps=AT + 12)
    alarms = [(step, t) for step, triggers in watch.alarms.items() for t in triggers if t.kind == "alpha-collapse"]
    assert [(step, t.module, t.since) for step, t in alarms] == [(AT + 2, "gate", AT)]


def test_a_frozen_part() -> None:
    def before(step: int, model: Classifier, _: object) -> None:
        if step == AT:
            model.body.requires_grad_(False)

    watch = edited(before=before)
    assert only(watch, AT, "frozen-module")[0].module == "body"
    assert list(watch.alarms) == [AT]  # told once


def test_a_frozen_parameter() -> None:
    def before(step: int, model: Classifier, _: object) -> None:
        if step == AT:
            model.head.bias.requires_grad_(False)

    trigger = only(edited(before=before), AT, "frozen-module")[0]
    assert (trigger.module, trigger.parameter) == ("head", "head.bias")


def test_a_detached_part() -> None:
    def before(step: int, model: Classifier, _: object) -> None:
        if step == AT:
            model.stem.register_forward_hook(lambda module, inputs, output: output.detach())

    watch = edited(before=before)
    trigger = only(watch, AT + 2, "detached-module")[0]
    assert (trigger.module, trigger.since) == ("stem", AT)
    assert list(watch.alarms) == [AT + 2]


def test_a_part_that_was_detached_from_the_start() -> None:
    def before(step: int, model: Classifier, _: object) -> None:
        if step == 0:
            model.stem.register_forward_hook(lambda module, inputs, output: output.detach())

    assert only(edited(before=before), 7, "detached-module")[0].module == "stem"


def test_a_dead_part() -> None:
    def before(step: int, model: Classifier, _: object) -> None:
        if step == AT:
            model.stem.register_forward_hook(lambda module, inputs, output: output.detach() + 0 * output)

    watch = edited(before=before)
    kinds = {t.kind: t for triggers in watch.alarms.values() for t in triggers}
    assert kinds["dead-module"].since == AT
    assert kinds["dead-module"].module == "stem"


def test_a_group_whose_learning_rate_is_zero() -> None:
    def grouped(model: Classifier) -> torch.optim.Optimizer:
        rest = [*model.stem.parameters(), *model.body.parameters()]
        return torch.optim.Adam([{"params": rest}, {"params": model.head.parameters(), "name": "head"}], 3e-3)

    def before(step: int, model: Classifier, optimizer: torch.optim.Optimizer) -> None:
        if step == AT:
            optimizer.param_groups[1]["lr"] = 0.0

    trigger = only(edited(before=before, optimizer=grouped), AT + 2, "not-updated")[0]
    assert (trigger.module, trigger.since) == ("head", AT)


def test_a_part_that_no_optimizer_holds() -> None:
    def forgetful(model: Classifier) -> torch.optim.Optimizer:
        return torch.optim.Adam([*model.stem.parameters(), *model.head.parameters()], 3e-3)

    assert only(edited(optimizer=forgetful), 7, "not-updated")[0].module == "body"


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_a_learning_rate_that_is_a_thousand_times_too_large(kind: type[torch.optim.Optimizer]) -> None:
    def before(step: int, model: Classifier, optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[0]["lr"] = 0.02 if step != AT else 20.0

    watch = edited(before=before, optimizer=lambda model: kind(model.parameters(), 0.02), steps=AT + 1)
    only(watch, AT, "update-jump")


def test_second_moments_set_to_zero() -> None:
    def before(step: int, model: Classifier, optimizer: torch.optim.Optimizer) -> None:
        if step == 40:
            optimizer.state[model.body[0].weight]["exp_avg_sq"].zero_()

    assert only(edited(before=before, steps=41), 40, "update-jump")[0].module == "body.0"


def test_moments_that_are_nan() -> None:
    def before(step: int, model: Classifier, optimizer: torch.optim.Optimizer) -> None:
        if step == AT:
            optimizer.state[model.body[0].weight]["exp_avg"].fill_(math.nan)

    trigger = only(edited(before=before, steps=AT + 1), AT, "nonfinite-weights")[0]
    assert trigger.parameter == "body.0.weight"


@pytest.mark.parametrize("factor", [100.0, 0.0])
def test_weights_changed_outside_an_update(factor: float) -> None:
    def before(step: int, model: Classifier, _: object) -> None:
        if step == AT:
            with torch.no_grad():
                model.body[0].weight.mul_(factor)

    triggers = edited(before=before).alarms[AT]
    jump = next(trigger for trigger in triggers if trigger.kind == "update-jump")
    assert jump.module == "body.0"
    assert "changed outside an update" in jump.message


def test_an_overflow_that_no_scale_explains() -> None:
    torch.manual_seed(0)
    model = Classifier()
    optimizer, watch = adam(model), Watch()
    scaler = torch.amp.GradScaler("cpu")
    with Monitor(model, optimizer, [], scaler=scaler, recorder=watch) as monitor:
        for step in range(AT + 1):
            x, labels = images(step)
            if step == AT:
                model.head.weight.register_hook(lambda gradient: gradient / 0)
            with monitor.step((x, labels)):
                optimizer.zero_grad()
                scaler.scale(F.cross_entropy(model(x), labels)).backward()
                scaler.step(optimizer)
                scaler.update()
    assert only(watch, AT, "nonfinite-gradient")[0].module == "head"


def test_an_announced_change_is_no_alarm() -> None:
    torch.manual_seed(0)
    model = Classifier()
    watch = Watch()

    def before(step: int) -> None:
        if step == AT:
            watch.detector.forget("freeze the body")
            model.body.requires_grad_(False)

    train(model, adam(model), cross_entropy(model), before=before, steps=AT + 20, watch=watch)
    assert watch.alarms == {}


def judged(values: Sequence[float]) -> list[int]:
    """Steps at which a series of one loss term raises an alarm."""
    detector, found = Detector(), []
    for step, value in enumerate(values):
        vitals = Vitals(step, terms={"nll": value}, total=value, grad_norm=1.0)
        if detector.judge(vitals):
            found.append(step)
        detector.remember(vitals)
    return found


def test_a_term_whose_sign_has_changed() -> None:
    noise = torch.randn(60, generator=torch.Generator().manual_seed(0)).tolist()
    falling = [3 * 0.98**step + 0.05 * noise[step] for step in range(60)]
    assert judged([-value if step >= 40 else value for step, value in enumerate(falling)]) == [40]


@pytest.mark.parametrize("slope", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.2])
def test_a_term_that_may_be_negative_comes_down_to_zero(slope: float, noise: float) -> None:
    """As the log-likelihood of a density does."""
    drawn = torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist()
    assert judged([20 * slope - slope * step + noise * drawn[step] + 0.5 for step in range(200)]) == []


@pytest.mark.parametrize(("level", "expected"), [(4.2, [44]), (3.6, [])])
def test_a_term_above_what_it_began_with_has_learnt_for_nothing(level: float, expected: list[int]) -> None:
    """It began at 4 and came down to some 2.9. One between them may be another loss."""
    noise = torch.randn(60, generator=torch.Generator().manual_seed(0)).tolist()
    fell = [4 * (0.7 + 0.3 * 0.9**step) + 0.03 * noise[step] for step in range(60)]
    assert judged([level + 0.03 * noise[step] if step >= 40 else fell[step] for step in range(60)]) == expected


@pytest.mark.parametrize(("value", "expected"), [(0.5, []), (50.0, [30])])
def test_a_term_that_is_switched_on_is_a_stage(value: float, expected: list[int]) -> None:
    """Its weight in the loop was zero; the gradient grows tenfold. Far above the others it is a spike."""
    detector = Detector()
    found = []
    for step in range(60):
        added = value if step >= 30 else 0.0
        vitals = Vitals(step, terms={"nll": 1.0, "kl": added}, total=1.0 + added, grad_norm=10.0 if added else 1.0)
        if detector.judge(vitals):
            found.append(step)
        detector.remember(vitals)
    assert found[:1] == expected


@pytest.mark.parametrize(("weight", "expected"), [(1.0, ["kl"]), (0.01, [])])
def test_a_term_that_hardly_counts_is_not_suspect(weight: float, expected: list[str]) -> None:
    noise = torch.randn(40, generator=torch.Generator().manual_seed(0)).tolist()
    detector = Detector()
    for step in range(40):
        detector.remember(_with_kl(step, 0.5 + 0.02 * noise[step], weight))
    assert [trigger.term for trigger in detector.suspects(_with_kl(40, 1.2, weight))] == expected


def _with_kl(step: int, value: float, weight: float) -> Vitals:
    terms, weights = {"nll": 1.0, "kl": value}, {"nll": 1.0, "kl": weight}
    return Vitals(step, terms=terms, weights=weights, total=1.0 + weight * value, grad_norm=1.0)


@pytest.mark.parametrize(("later", "expected"), [([6.0, 7.0, 116.0, 6.0], [32]), ([60.0, 70.0, 66.0, 58.0], [])])
def test_a_spike_soon_after_an_announced_stage(later: list[float], expected: list[int]) -> None:
    """A new level is what was announced; a spike above the new level too, and above all of the run, is not."""
    detector = Detector()
    spikes = []
    for step, norm in enumerate([5.0, 4.0, 6.0] * 10 + later):
        if step == 30:
            detector.forget("stage S2")
        vitals = Vitals(step, grad_norm=norm)
        spikes += [step for trigger in detector.judge(vitals) if trigger.kind == "gradient-spike"]
        detector.remember(vitals)
    assert spikes == expected
