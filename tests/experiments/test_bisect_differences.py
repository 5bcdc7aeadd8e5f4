"""What differs between two settings, and what of it can only change together."""

from __future__ import annotations

import itertools

import pytest

from bifusion_diag.config import ConfigError, load_settings
from bifusion_diag.errors import UserError
from bifusion_diag.experiments.bisect.differences import Space, digest, space_of


def space(*overrides: str, baseline: tuple[str, ...] = (), preset: str = "bifusion") -> Space:
    return space_of(load_settings(preset, overrides=baseline), load_settings(preset, overrides=overrides))


def test_what_cannot_make_a_run_unstable_is_not_compared() -> None:
    found = space("optim.lr=1", "training.threads=3", "incidents.policy=skip", "evaluation.every=5", "training.steps=9")
    assert found.names == ("optim.lr",)
    assert {change.key for change in found.ignored} == {
        "training.threads", "incidents.policy", "evaluation.every", "training.steps",
    }  # fmt: skip
    mixed = found.mixture(["optim.lr"], steps=4, seed=7)
    assert (mixed.optim.lr, mixed.training.threads, mixed.training.steps, mixed.training.seed) == (1, 0, 4, 7)
    assert mixed.evaluation.every == 0


def test_nothing_to_bisect_is_said() -> None:
    with pytest.raises(UserError, match=r"but for training\.threads: there is nothing to bisect"):
        space("training.threads=3")


def test_settings_that_are_only_valid_together_are_one_difference() -> None:
    found = space("losses.instance.style=esam", "losses.instance.parts=[1, 1, 1, 1, 1]", "optim.lr=1")
    assert found.names == ("optim.lr", "losses.instance.style + losses.instance.parts")
    assert found.mixture(found.names[1:]).losses.instance.style == "esam"


def test_a_setting_that_needs_others_comes_after_them() -> None:
    wanted = ("model.fusion=none", "model.decoder.masks=superpoint", "model.decoder.kind=mask3d")
    wanted += ("model.decoder.score_head=false", "optim.lr=1")
    found = space(*wanted)
    kind = found.named("model.decoder.kind")
    assert kind.needs == {"model.fusion", "model.decoder.masks", "model.decoder.score_head"}
    assert found.names[-1] == "model.decoder.kind"
    with pytest.raises(ConfigError):
        found.mixture(["model.decoder.kind"])
    valid = found.mixture([*kind.needs, "model.decoder.kind"])
    assert (valid.model.decoder.kind, valid.optim.lr) == ("mask3d", 2e-4)


@pytest.mark.parametrize("ends", list(itertools.permutations(["baseline-5cm", "bifusion-fragile", "mask3d"], 2)))
def test_between_presets_every_first_part_of_the_differences_is_valid(ends: tuple[str, str]) -> None:
    found = space_of(load_settings(ends[0]), load_settings(ends[1]))
    for count in range(len(found.names) + 1):
        found.mixture(found.names[:count])
    assert found.mixture(found.names) == found.candidate.model_copy(
        update={"evaluation": found.candidate.evaluation.model_copy(update={"every": 0})}
    )
    assert digest(found.mixture([])) == digest(found.baseline)
    changes = [change.key for one in found.differences for change in one.changes]
    assert len(changes) == len(set(changes))
