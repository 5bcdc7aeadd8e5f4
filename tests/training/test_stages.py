"""Which parts learn when."""

from __future__ import annotations

import torch
from torch import nn

from bifusion_diag.config import load_settings
from bifusion_diag.training.stages import StageSwitch, stage_at, stages_of


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("clip", "spatial_head", "backbone", "head3d", "film", "gate"):
            self.add_module(name, nn.Linear(1, 1))
        self.clip.requires_grad_(False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), nn.Linear(1, 1)

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
