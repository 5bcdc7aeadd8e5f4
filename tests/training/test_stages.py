"""Which parts learn when."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from bifusion_diag.config import load_settings
from bifusion_diag.training.stages import StageSwitch, stage_at, stages_of


class Encoder(nn.Module):
    def __init__(self, *, tuned: bool) -> None:
        super().__init__()
        for name in ("clip", "spatial_head", "backbone", "head3d", "film", "gate"):
            self.add_module(name, nn.Linear(1, 1))
        self.clip.requires_grad_(tuned)


class Model(nn.Module):
    def __init__(self, *, tuned: bool = False) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(tuned=tuned), nn.Linear(1, 1)

    def learning(self) -> set[str]:
        return {name.rpartition(".")[0] for name, p in self.named_parameters() if p.requires_grad}


def test_stages_begin_at_the_documents_shares_of_the_run() -> None:
    stages = stages_of(load_settings("bifusion"))
    names = [stage_at(stages, step, 33).name for step in range(33)]
    assert names == ["S0"] * 3 + ["S1"] * 20 + ["S2"] * 10


def test_a_run_of_three_steps_visits_every_stage() -> None:
    stages = stages_of(load_settings("bifusion"))
    assert [stage_at(stages, step, 3).name for step in range(3)] == ["S0", "S1", "S2"]
    assert [stage_at(stages, step, 2).name for step in range(2)] == ["S0", "S1"]


def test_the_baseline_has_no_stages() -> None:
    assert [stage.name for stage in stages_of(load_settings("baseline"))] == ["all"]


def test_s0_trains_the_heads_s1_the_whole_3d_branch_and_clip_never() -> None:
    model = Model()
    switch = StageSwitch(model, stages_of(load_settings("bifusion")), 33)
    everything = {
        "encoder.spatial_head",
        "encoder.backbone",
        "encoder.head3d",
        "encoder.film",
        "encoder.gate",
        "decoder",
    }
    assert switch.enter(0).name == "S0"
    assert model.learning() == everything - {"encoder.backbone", "encoder.film"}
    assert switch.enter(1) is None
    assert switch.enter(3).name == "S1"
    assert model.learning() == everything


def test_what_the_model_freezes_itself_stays_frozen() -> None:
    model = Model()
    switch = StageSwitch(model, stages_of(load_settings("bifusion")), 33)
    switch.enter(0)
    model.encoder.gate.requires_grad_(False)
    switch.enter(3)
    assert "encoder.gate" not in model.learning()


def test_resuming_in_the_middle_enters_the_stage_of_that_step() -> None:
    torch.manual_seed(0)
    model = Model()
    switch = StageSwitch(model, stages_of(load_settings("bifusion")), 33)
    assert switch.enter(1) is None  # S0 began at step 0
    assert "encoder.backbone" not in model.learning()
    assert switch.enter(23).name == "S2"
    assert switch.enter(30) is None


THREE_PHASE = ("training.stages=three_phase",)
ALL = {f"encoder.{name}" for name in ("spatial_head", "backbone", "head3d", "film", "gate")} | {"decoder"}


def test_three_phases_begin_at_the_epochs_of_001() -> None:
    stages = stages_of(load_settings("bifusion", overrides=THREE_PHASE))
    names = [stage_at(stages, epoch, 129).name for epoch in range(129)]
    assert names == ["P1"] * 21 + ["P2"] * 40 + ["P3"] * 68
    assert [stage_at(stages, step, 3).name for step in range(3)] == ["P1", "P2", "P3"]


def test_three_phase_trains_3d_alone_then_everything_with_clip_slow_and_then_fast() -> None:
    settings = load_settings("bifusion", overrides=[*THREE_PHASE, "model.clip.tune=lora"])
    model = Model(tuned=True)
    switch = StageSwitch(model, stages_of(settings), 129)
    seen = {}
    for step in (0, 21, 61):
        stage = switch.enter(step)
        assert switch.stage is stage
        seen[stage.name] = (model.learning(), stage.slow_clip)
    assert seen == {
        "P1": ({"encoder.backbone", "encoder.head3d", "decoder"}, False),
        "P2": (ALL | {"encoder.clip"}, True),
        "P3": (ALL | {"encoder.clip"}, False),
    }


@pytest.mark.parametrize(("tune", "clip"), [("none", set()), ("lora", {"encoder.clip"}), ("blocks", {"encoder.clip"})])
def test_s2_releases_what_is_tuned_of_clip_and_says_so(tune: str, clip: set[str]) -> None:
    model = Model(tuned=tune != "none")
    stages = stages_of(load_settings("bifusion", overrides=[f"model.clip.tune={tune}"]))
    switch = StageSwitch(model, stages, 33)
    switch.enter(0)
    assert "encoder.clip" not in model.learning()
    switch.enter(3)
    assert model.learning() == ALL
    said = switch.enter(23).description
    assert model.learning() == ALL | clip
    assert said == ("fine-tuning; and what is tuned of CLIP" if clip else "fine-tuning; CLIP stays frozen: as S1")
    assert not any(stage.slow_clip for stage in stages)


@pytest.mark.parametrize("kind", ["heads_first", "three_phase"])
def test_without_a_2d_branch_the_stages_speak_of_none(kind: str) -> None:
    given = stages_of(load_settings("bifusion", overrides=[f"training.stages={kind}"]))
    plain = stages_of(load_settings("bifusion-simple", overrides=[f"training.stages={kind}"]))
    assert [(stage.name, stage.begin, stage.frozen) for stage in plain] == [
        (stage.name, stage.begin, stage.frozen) for stage in given
    ]
    for stage in plain:
        assert not any(part in stage.description for part in ("2D", "gate", "CLIP")), stage
        assert stage.description


def test_what_the_model_releases_within_a_stage_stays_frozen_until_the_stage_ends() -> None:
    model = Model()
    switch = StageSwitch(model, stages_of(load_settings("bifusion", overrides=THREE_PHASE)), 129)
    model.encoder.gate.requires_grad_(False)  # the gate's early phase
    switch.enter(0)
    model.encoder.gate.requires_grad_(True)
    assert switch.enter(12) is None
    assert "encoder.gate" not in model.learning()
    switch.enter(21)
    assert "encoder.gate" in model.learning()


@pytest.mark.parametrize(("old", "new"), [("true", "heads_first"), ("false", "none")])
def test_stages_may_still_be_a_switch(old: str, new: str, tmp_path: Path) -> None:
    assert load_settings("bifusion", overrides=[f"training.stages={old}"]).training.stages == new
    config = tmp_path / "old.yaml"
    config.write_text(f"training: {{stages: {old}}}\n")
    assert load_settings("bifusion", config=config).training.stages == new


def test_without_stages_everything_learns_throughout() -> None:
    model = Model(tuned=True)
    switch = StageSwitch(model, stages_of(load_settings("bifusion", overrides=["training.stages=none"])), 33)
    assert switch.enter(0) is None
    assert (switch.stage.name, model.learning()) == ("all", ALL | {"encoder.clip"})
