"""Trials of changes: against closed forms, and how they are ranked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bifusion_diag.config import Settings, load_settings
from bifusion_diag.errors import UserError
from bifusion_diag.experiments.courses import patched
from bifusion_diag.replay.examine.mechanisms import MECHANISMS
from bifusion_diag.replay.incident import Incident, SampleShare, Trigger
from bifusion_diag.replay.step import Training
from bifusion_diag.replay.trials import remedies
from bifusion_diag.replay.trials.remedies import REMEDIES, Action
from bifusion_diag.replay.trials.what_if import Change, Course, Trial, TrialStep, follow, helpful, ranked, try_all

RATE = 0.25


class Bowl(nn.Module):
    """½·‖w‖², the gradient of which is w."""

    def __init__(self, start: tuple[float, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, factor: Tensor) -> Tensor:
        return 0.5 * (self.weight * factor).square().sum()


class BowlCourse(Course):
    """A bowl under gradient descent; ``factors`` are the batches."""

    def __init__(self, start: tuple[float, ...] = (3.0, 4.0), factors: tuple[Any, ...] = (1.0,)) -> None:
        self.model = Bowl(start)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE)
        self.training = Training(self.model, self.model, (optimizer,))
        self.factors = factors

    def batch(self, ahead: int) -> Tensor:
        return torch.as_tensor(self.factors[ahead % len(self.factors)], dtype=torch.float64)

    def yardstick(self) -> tuple[float | None, dict[str, float]]:
        return float(self.model(torch.ones(())).detach()), {}


def closed_form(norm: float, steps: int, update: Callable[[float], float]) -> list[float]:
    """‖w‖ before each step; the gradient is w, so that w keeps its direction."""
    norms = [norm]
    for _ in range(steps):
        norms.append(norms[-1] - update(norms[-1]))
    return norms


@pytest.mark.parametrize(
    ("action", "update"),
    [
        (Action(), lambda g: RATE * g),
        (Action(rate=0.1), lambda g: 0.1 * RATE * g),
        (Action(clip=1.0), lambda g: RATE * min(g, 1.0)),
        (Action(clip=1.0, exact=True), lambda g: RATE * min(g, 1.0)),
        (Action(clip=2.0, rate=0.5), lambda g: 0.5 * RATE * min(g, 2.0)),
    ],
)
def test_the_update_is_changed_as_it_is_asked(action: Action, update: Callable[[float], float]) -> None:
    trial = follow(BowlCourse(), Change("x", action=action), steps=6)
    expected = closed_form(5.0, 7, update)
    # 1e-6: clip_grad_norm_ adds that to the norm
    assert [step.grad_norm for step in trial.steps] == pytest.approx(expected[:7], rel=2e-6)
    assert trial.loss == pytest.approx(0.5 * expected[7] ** 2, rel=4e-6)
    assert [step.loss for step in trial.steps] == pytest.approx([0.5 * g * g for g in expected[:7]], rel=4e-6)
    assert (trial.nonfinite, trial.spikes, trial.error) == (0, 0, "")


def test_a_bad_step_that_is_skipped_changes_neither_weights_nor_buffers() -> None:
    def count(module: Any, args: tuple[Tensor]) -> None:
        module.seen += args[0]

    class Counted(BowlCourse):
        def __init__(self) -> None:
            super().__init__(factors=(math.nan, 1.0, 1.0, math.nan, 1.0))
            self.model.register_buffer("seen", torch.zeros(()))
            self.model.register_forward_pre_hook(count)

    plain = follow(Counted(), Change("x"), steps=4)
    assert [step.finite for step in plain.steps] == [False] * 5
    assert set(plain.bad_state) == {"weight", "seen"}
    assert (plain.loss, plain.nonfinite) == (None, 6)
    course = Counted()
    skipped = follow(course, Change("x", action=Action(skip=True)), steps=4)
    assert [step.updated for step in skipped.steps] == [False, True, True, False, True]
    assert [step.finite for step in skipped.steps] == [False, True, True, False, True]
    assert skipped.bad_state == ()
    assert float(course.model.seen) == 3.0 + 1.0  # three good steps, and the yardstick
    assert skipped.loss == pytest.approx(0.5 * (5 * (1 - RATE) ** 3) ** 2)


def test_one_bad_element_stays_one_only_if_it_becomes_zero_before_clipping() -> None:
    factors = ([math.nan, 1.0], [1.0, 1.0])
    clipped = follow(BowlCourse(factors=factors), Change("x", action=Action(clip=1.0)), steps=1)
    assert clipped.bad_state == ("weight",)
    assert not clipped.steps[1].finite
    course = BowlCourse(factors=factors)
    cured = follow(course, Change("x", action=Action(zero_bad=True, clip=1.0)), steps=1)
    assert [step.finite for step in cured.steps] == [False, True]
    # the first element is as it was before the last step, the second was clipped to 1
    assert cured.steps[1].grad_norm == pytest.approx(math.hypot(3.0, 4.0 - RATE), rel=1e-5)


def test_a_norm_that_float32_cannot_hold_loses_the_step_unless_it_is_exact() -> None:
    def course() -> BowlCourse:
        found = BowlCourse((3e25, 4e25))
        found.model.float()
        optimizer = torch.optim.SGD(found.model.parameters(), lr=RATE)
        found.training = Training(found.model, lambda batch: (found.model.weight * 1e10).sum() * 1e15, (optimizer,))
        return found

    def moved(action: Action) -> float:
        found = course()
        before = found.model.weight.detach().clone()
        follow(found, Change("x", action=action), steps=1)
        return float((found.model.weight.detach() - before).abs().max())

    assert moved(Action(clip=1e25)) == 0.0  # two steps whose gradient is multiplied by 0
    # two steps of norm 1e25 along the diagonal
    assert moved(Action(clip=1e25, exact=True)) == pytest.approx(2 * RATE * 1e25 / math.sqrt(2), rel=1e-5)


def test_batchnorm_takes_its_running_statistics() -> None:
    norm = nn.BatchNorm1d(2)
    model = nn.Sequential(norm)
    rows = torch.tensor([[1.0, 2.0], [1.0 + 1e-4, 5.0]])

    class Few(Course):
        training = Training(model, lambda x: model(x).square().sum(), (torch.optim.SGD(model.parameters(), 0.1),))

        def batch(self, ahead: int) -> Tensor:
            return rows

        def yardstick(self) -> tuple[float | None, dict[str, float]]:
            return 0.0, {}

    trial = follow(Few(), Change("x", action=Action(freeze_batchnorm=True)), steps=1)
    assert trial.steps[0].loss == pytest.approx(float(rows.square().sum() / (1 + norm.eps)), rel=1e-6)
    assert torch.equal(norm.running_mean, torch.zeros(2))


def test_a_step_that_raises_ends_its_trial_and_no_other() -> None:
    class Breaks(BowlCourse):
        def batch(self, ahead: int) -> Tensor:
            if ahead == 2:
                raise RuntimeError("no such scene")
            return super().batch(ahead)

    broken = follow(Breaks(), Change("x"), steps=4)
    assert (len(broken.steps), broken.loss) == (2, None)
    assert broken.error == "step 2 after the incident: RuntimeError: no such scene"
    trials = try_all(lambda change: Breaks() if change.name == "x" else BowlCourse(), [Change("x")], steps=4)
    assert [trial.change.name for trial in trials] == ["as it was", "x"]


def test_spikes_are_those_of_the_definition_or_of_the_trial_itself() -> None:
    calm = tuple(2.0 if place == 3 else 1.0 for place in range(6))  # gradient × 4: natural
    wild = tuple(10.0 if place == 3 else 1.0 for place in range(6))  # × 100

    def spikes(factors: tuple[float, ...], previous: tuple[float, ...] = ()) -> list[bool]:
        course = BowlCourse(factors=factors)
        course.training.optimizers[0].param_groups[0]["lr"] = 0.0
        return [step.spike for step in follow(course, Change("x"), 5, previous).steps]

    assert spikes(calm) == [False] * 6
    assert spikes(wild) == [place == 3 for place in range(6)]
    assert spikes(wild, (4.0, 5.0, 6.0) * 5) == [place == 3 for place in range(6)]
    assert spikes(calm, (0.1, 0.11, 0.12) * 5)[0] is True  # 5 after norms of 0.1
    assert spikes(wild, (5.0, 400.0, 60.0, 1.0) * 5) == [False] * 6  # such swings were usual


def trial(name: str, loss: float | None, bad: int = 0, spikes: int = 0, size: int = 1, **more: Any) -> Trial:
    steps = [TrialStep(math.nan if k < bad else 1.0, {}, 1.0, True, k < spikes, 1.0) for k in range(4)]
    patch = {f"{name}.{k}": 0 for k in range(size)}
    return Trial(Change(name, patch=patch), tuple(steps), loss, **more)


def test_the_ranking() -> None:
    best_first = [
        trial("small change", 1.005),
        trial("two changes", 1.0, size=2),
        trial("larger loss", 1.02),
        trial("no loss", None),
        trial("spike", 0.5, spikes=1),
        trial("not finite", 0.1, bad=1),
        trial("ends badly", None, bad=1, bad_state=("w",)),
        trial("raises", None, error="step 1"),
        trial("not tried", None, refused="does not fit"),
    ]
    for order in (best_first, best_first[::-1], best_first[4:] + best_first[:4]):
        assert [one.change.name for one in ranked(order)] == [one.change.name for one in best_first]
    as_it_was = trial("as it was", 0.504, spikes=1, size=0)  # less than 1 % from "spike"
    assert [one.change.name for one in helpful(best_first, as_it_was)] == [one.change.name for one in best_first[:4]]
    assert helpful(best_first, trial("as it was", 1.0)) == []


def test_the_best_two_are_tried_together_if_that_is_more_than_each() -> None:
    # Under lr 2.1 descent diverges; a smaller rate and clipping each help.
    def start(change: Change) -> Course | str:
        course = BowlCourse()
        course.training.optimizers[0].param_groups[0]["lr"] = 2.1
        return "does not fit" if change.name == "other" else course

    clip, rate = Change("clip", ("clip",), action=Action(clip=1.0)), Change("rate", ("rate",), action=Action(rate=0.1))
    other, none = Change("other"), Change("refused", refused="is so already")
    told: list[str] = []
    trials = try_all(start, [clip, rate, other, none], steps=8, combine=True, progress=told.append)
    assert told == ["as it was", "clip", "rate", "other", "rate + clip"]
    names = [one.change.name for one in trials]
    assert names[:4] == ["rate", "clip", "rate + clip", "as it was"]  # clipped steps of a tenth of the rate are slow
    assert {one.change.name: one.refused for one in trials[-2:]} == {
        "other": "does not fit",
        "refused": "is so already",
    }
    together = next(one for one in trials if one.change.name == "rate + clip")
    assert (together.change.action, together.change.remedies) == (Action(clip=1.0, rate=0.1), ("rate", "clip"))
    twice = try_all(start, [rate, Change("again", action=Action(rate=0.1))], steps=3, combine=True)
    assert "rate + again" in [one.change.name for one in twice]  # a hundredth of the rate is another change
    same = try_all(start, [clip, Change("again", action=Action(clip=1.0))], steps=3, combine=True)
    assert len(same) == 3  # clipped twice is clipped


def test_a_change_with_a_part_that_does_not_apply_is_not_tried() -> None:
    whole = Change("a", refused="is so already") | Change("b", action=Action(rate=0.1))
    trials = try_all(lambda change: BowlCourse(), [whole], steps=1)
    assert trials[-1].refused == "a: is so already"


def test_a_yardstick_that_raises_is_said() -> None:
    class Bent(BowlCourse):
        def yardstick(self) -> tuple[float | None, dict[str, float]]:
            raise ValueError("no batch is left")

    assert follow(Bent(), Change("x"), steps=1).error == "the yardstick: ValueError: no batch is left"


def test_a_trial_that_changes_nothing_is_told_from_one_that_does() -> None:
    trials = try_all(lambda change: BowlCourse(), [Change("a", patch={"x": 1}), Change("b", action=Action(rate=2.0))])
    assert {one.change.name: one.same for one in trials} == {"as it was": False, "a": True, "b": False}
    assert next(one for one in trials if one.change.name == "as it was").cost == 1.0


# --- the catalogue


def incident(*samples: SampleShare) -> Incident:
    return Incident(7, "nonfinite-loss", (Trigger("nonfinite-loss", "term is NaN"),), samples=samples)


GUILTY = SampleShare(1, "scene0002", "its loss is NaN")
EVERY_PRESET = ("baseline", "bifusion", "bifusion-fragile", "bifusion-phase2", "bifusion-safe", "bifusion-simple")


@pytest.mark.parametrize("preset", [*EVERY_PRESET, "mask3d", "oneformer3d"])
def test_every_remedy_is_a_change_of_valid_settings_or_says_why_it_does_not_apply(preset: str) -> None:
    settings = load_settings(preset)
    stored = remedies.Settings(settings.model_dump(mode="json"))
    for one in REMEDIES.values():
        if one.patch is None:
            continue
        patch = one.patch(stored, incident(GUILTY))
        if isinstance(patch, str):
            assert patch, one.id
            continue
        changed = patched(settings, patch)
        assert changed != settings, one.id
        if one.documented and one.id != "lower-lr":  # once is enough
            again = one.patch(remedies.Settings(changed.model_dump(mode="json")), incident(GUILTY))
            assert isinstance(again, str) or patched(changed, again) == changed, one.id


def test_the_failing_state_has_all_remedies_and_the_phases_are_made_of_them() -> None:
    fragile = load_settings("bifusion-fragile")
    stored = remedies.Settings(fragile.model_dump(mode="json"))

    def with_(*names: str) -> Settings:
        settings = fragile
        for name in names:
            patch = REMEDIES[name].patch
            assert patch is not None
            found = patch(stored, incident())
            assert not isinstance(found, str)
            settings = patched(settings, found)
        return settings

    phase1 = load_settings("bifusion-phase1")
    assert with_("isolate-clip", "clip-grad", "sanitize") == phase1.model_copy(update={"preset": "bifusion-fragile"})
    instance = load_settings("bifusion-phase2").losses.instance
    assert with_("baseline-instance-weights").losses.instance == instance
    assert with_("empty-match-zero").losses.instance.empty_match == "zero"
    assert with_("normalize-order").model.projection.normalize == "before_sampling"
    safe = load_settings("bifusion-safe").losses.clip_align
    found = with_("temperature", "clamp-features").losses.clip_align
    assert (found.temperature, found.clamp) == (safe.temperature, safe.clamp) == (0.1, 10.0)


def test_a_sample_is_left_out_by_its_name_or_place() -> None:
    drop = REMEDIES["drop-sample"]
    assert drop.patch is not None
    assert drop.action is not None
    stored = remedies.Settings(load_settings(overrides=["data.exclude=[a]"]).model_dump(mode="json"))
    assert drop.patch(stored, incident(GUILTY)) == {"data.exclude": ["a", "scene0002"]}
    assert drop.action(incident(GUILTY)) == Action(drop=(1,))
    nameless = dataclasses.replace(GUILTY, name=None)
    assert drop.patch(stored, incident(nameless)) == "the sample has no name"
    assert drop.patch(stored, incident()) == drop.action(incident()) == "no sample stands out"


def test_every_remedy_that_a_mechanism_names_exists() -> None:
    named = {name for mechanism in MECHANISMS.values() for name in mechanism.remedies}
    assert named <= set(REMEDIES)
    with pytest.raises(UserError, match=r"no remedy 'clip-gard'. Did you mean 'clip-grad'"):
        remedies.remedy("clip-gard")
    assert remedies.remedy("clip-grad") is REMEDIES["clip-grad"]
