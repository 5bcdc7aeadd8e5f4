"""Rules of the fusion on real runs: each fires where its mistake was planted, and keeps silent where it was not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fusion_runs import PLANTED, FusionClassifier, train_bifusion, train_fusion
from rule_runs import batch_of, cross_entropy, found, look, train
from torch import Tensor, nn

from bifusion_diag.config import load_settings
from bifusion_diag.config.settings import InstanceLossSettings
from bifusion_diag.diagnosis import Finding, NotMeasured, Quantity
from bifusion_diag.diagnosis.findings import Context
from bifusion_diag.diagnosis.measures import measure
from bifusion_diag.diagnosis.rules.pages import SECTIONS, page_of
from bifusion_diag.diagnosis.rules.schedule import planned_changes
from bifusion_diag.diagnosis.rules.weights_of_losses import PART_NAMES, loss_weights_vs_baseline
from bifusion_diag.model.losses.instance import INSTANCE_TERMS
from bifusion_diag.record.schema import Run, Series

FUSION = (
    "alignment-collapse",
    "alpha-out-of-band",
    "alpha-stuck",
    "augmentation-not-undone",
    "background-weight",
    "clip-leak",
    "clip-out-of-range",
    "data-range",
    "declared-vs-measured-flow",
    "gate-saturated",
    "loss-weights-vs-baseline",
    "low-valid-share",
    "near-zero-norm",
    "projection-nonfinite",
    "scale-mismatch",
    "schedule-fights-warm-up",
    "temperature-gain",
)


@pytest.fixture(scope="session")
def bifusion(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A healthy run of BiFusion, evaluated before its first step and after its last."""
    values = {"training.steps": 24, "evaluation.every": 23, "evaluation.scenes": 2}
    return train_bifusion(tmp_path_factory.mktemp("bifusion"), "bifusion", values)


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """BiFusion with the mistakes of `PLANTED`."""
    return train_bifusion(tmp_path_factory.mktemp("planted"), "bifusion", PLANTED)


@pytest.fixture(scope="session")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The 3D baseline."""
    return train_bifusion(tmp_path_factory.mktemp("baseline"), "baseline-5cm", {"training.steps": 4})


@pytest.fixture(scope="session")
def toy() -> Run:
    """Two branches that learn together."""
    torch.manual_seed(0)
    settings = {"losses": {"clip_align": {"gradient_flow": 1.0}}}
    return train_fusion(FusionClassifier(), settings=settings)


def evidence(finding: Finding, series: str) -> list[float | None]:
    """The numbers that come from a series."""
    return [one.reading.value for one in finding.evidence if one.series == series and isinstance(one.reading, Quantity)]


@pytest.mark.parametrize("rule", FUSION)
def test_every_rule_has_a_page_with_all_sections(rule: str) -> None:
    page = page_of(rule)
    assert page.startswith(f"# {rule}\n")
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")] == list(SECTIONS)


@pytest.mark.parametrize("rule", FUSION)
def test_a_healthy_run_gets_notes_at_most(bifusion: Run, baseline: Run, toy: Run, rule: str) -> None:
    for run in (bifusion, baseline, toy):
        findings = look(rule, run, min_steps=10)
        assert isinstance(findings, NotMeasured) or {one.severity for one in findings} <= {"note"}


@pytest.mark.parametrize(
    "rule",
    [
        "alpha-out-of-band",
        "alpha-stuck",
        "augmentation-not-undone",
        "clip-leak",
        "clip-out-of-range",
        "data-range",
        "declared-vs-measured-flow",
        "gate-saturated",
        "low-valid-share",
        "near-zero-norm",
        "projection-nonfinite",
        "scale-mismatch",
        "temperature-gain",
    ],
)
def test_on_a_healthy_bifusion_run_there_is_nothing_to_find(bifusion: Run, rule: str) -> None:
    assert look(rule, bifusion, min_steps=10) == []


def test_the_documents_formula_lets_through_what_it_says_it_holds_back(planted: Run) -> None:
    finding = found("declared-vs-measured-flow", planted)
    assert finding.remedy == {"losses.clip_align.gradient_formula": "as_declared"}
    assert evidence(finding, "losses.clip_align.gradient_flow") == [0.05]
    assert evidence(finding, "flow/share")[0] == pytest.approx(0.95, abs=1e-5)
    assert "Document 003" in finding.mechanism


def test_a_share_that_is_neither_the_declared_one_nor_its_rest_blames_no_formula(toy: Run) -> None:
    torch.manual_seed(0)
    settings = {"losses": {"clip_align": {"gradient_flow": 0.3}}}
    finding = found("declared-vs-measured-flow", train_fusion(FusionClassifier(), settings=settings, steps=12))
    assert finding.remedy is None
    assert "swapped" not in finding.mechanism
    assert look("declared-vs-measured-flow", toy) == []


def test_augmented_points_that_are_projected_are_told_from_captured_ones(planted: Run) -> None:
    finding = found("augmentation-not-undone", planted)
    assert (finding.severity, finding.remedy) == ("error", {"model.projection.coordinates": "captured"})
    (off,), (none,) = evidence(finding, "projection/off_captured"), evidence(finding, "projection/off_augmented")
    assert off is not None
    assert off > 0.5
    assert none == pytest.approx(0.0, abs=1e-5)
    share = found("low-valid-share", planted)
    assert evidence(share, "projection/valid_share")[0] == pytest.approx(0.0, abs=0.1)
    assert evidence(share, "projection/outside")


def test_zero_vectors_that_are_normalised_have_the_largest_gain(planted: Run) -> None:
    finding = found("near-zero-norm", planted)
    assert (finding.module, finding.count) == ("encoder.normalize2d", 12)
    assert evidence(finding, "normalize/encoder.normalize2d/smallest")[:2] == [0.0, 1e12]
    (gradient,) = evidence(finding, "grads/encoder.sampling/output_norm")
    assert gradient is not None
    assert gradient > 1e6  # measured where the zero vectors come from
    assert finding.remedy == {"model.projection.normalize": "before_sampling"}


def test_data_out_of_range_is_one_finding_a_kind(planted: Run) -> None:
    findings = look("data-range", planted)
    assert isinstance(findings, list)
    titles = {finding.title for finding in findings}
    assert titles == {
        "Colours are out of range",
        "Points lie far outside any room",
        "Scenes have only a handful of points",
    }
    (few,) = [finding for finding in findings if finding.title == "Scenes have only a handful of points"]
    (points,) = evidence(few, "data/point_counts/min")[:1]
    assert points is not None
    assert points <= 30


def test_lost_poses_that_the_run_lets_through_are_an_error_where_a_step_is_bad_with_them(planted: Run) -> None:
    remedy = {"model.projection.sanitize": "strict"}
    finding = found("projection-nonfinite", planted)
    assert (finding.severity, finding.remedy) == ("warning", remedy)
    assert finding.steps is not None
    loss = planted.all_series["loss/total"]
    values = np.where(loss.steps == finding.steps[0], np.nan, loss.value)
    broken = {**planted.all_series, "loss/total": Series.from_values("loss/total", loss.steps, values)}
    finding = found("projection-nonfinite", dataclasses.replace(planted, all_series=broken, events=[]))
    assert (finding.severity, finding.remedy) == ("error", remedy)


def test_a_background_that_weighs_nothing(planted: Run, baseline: Run) -> None:
    finding = found("background-weight", planted)
    queries, matched = evidence(finding, "matching/queries")[0], evidence(finding, "matching/queries_mean")[0]
    assert queries is not None
    assert matched is not None
    weight = 0.0005 * (queries - matched)
    assert evidence(finding, "losses.instance.no_object_weight")[0] == pytest.approx(weight / (weight + matched))
    assert finding.remedy is not None
    even = finding.remedy["losses.instance.no_object_weight"]
    assert even * (queries - matched) == pytest.approx(matched, rel=0.05)
    assert look("background-weight", baseline) == []  # ESAM's 0.1


def test_the_focal_loss_has_no_share_that_the_record_tells(bifusion: Run) -> None:
    assert isinstance(look("background-weight", bifusion), NotMeasured)


def test_weights_are_held_to_the_baseline_run_or_else_to_its_preset(bifusion: Run, planted: Run, baseline: Run) -> None:
    assert look("loss-weights-vs-baseline", baseline) == []
    finding = found("loss-weights-vs-baseline", bifusion)
    assert evidence(finding, "losses.semantic.weight") == [0.4]
    assert "the preset 'baseline'" in finding.mechanism
    held = loss_weights_vs_baseline(Context(planted, measure(planted), baseline=baseline))
    assert isinstance(held, list)
    assert evidence(held[0], "losses.instance.no_object_weight") == [0.0005]
    assert "the run that it is compared with (run)" in held[0].mechanism
    same = loss_weights_vs_baseline(Context(bifusion, measure(bifusion), baseline=bifusion))
    assert same == []


def test_the_parts_of_the_instance_losses_are_named_as_their_setting_says() -> None:
    told = InstanceLossSettings.model_fields["parts"].description
    assert told is not None
    for style, names in PART_NAMES.items():
        assert f"{style}: [{', '.join(names)}]" in told
        assert len(names) == len(INSTANCE_TERMS[style])


def test_003s_stages_and_weights_change_at_the_same_steps(bifusion: Run) -> None:
    findings = look("schedule-fights-warm-up", bifusion)
    assert isinstance(findings, list)
    assert [finding.severity for finding in findings] == ["note", "note"]
    assert findings[0].steps == (2, 3)  # S1, and the release of the gate
    assert {change.kind for change in planned_changes(bifusion)} == {"stage", "gate", "weight"}
    jumps = look("schedule-fights-warm-up", bifusion, schedule_jump=0.01)
    assert isinstance(jumps, list)
    assert "warning" in {finding.severity for finding in jumps}


def test_a_gate_that_is_released_at_the_end_of_the_decay_learns_nothing(planted: Run, bifusion: Run) -> None:
    late = look("schedule-fights-warm-up", planted, spent_rate=0.2)
    assert isinstance(late, list)
    (finding,) = [one for one in late if one.severity == "warning"]
    (rate,) = evidence(finding, "train/lr")[:1]
    assert rate is not None
    assert finding.steps == (11, 11)
    assert rate == pytest.approx(2e-4 * (1 / 12) ** 0.9, rel=1e-5)
    in_time = look("schedule-fights-warm-up", bifusion, spent_rate=0.2)
    assert isinstance(in_time, list)
    assert {one.severity for one in in_time} == {"note"}


def test_one_change_by_itself_fights_nothing() -> None:
    def halve(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if step == 20:
            optimizer.param_groups[0]["lr"] /= 10

    model = FusionClassifier()
    assert look("schedule-fights-warm-up", train_fusion(model, steps=40, before=halve)) == []
    settings = {"model": {"gate": {"early_steps": 20}}, "training": {"reference_steps": 40}}
    both = found("schedule-fights-warm-up", train_fusion(model, steps=40, before=halve, settings=settings))
    assert both.steps == (20, 20)


def test_an_alignment_loss_alone_makes_all_features_one() -> None:
    torch.manual_seed(0)
    collapsed = train_fusion(FusionClassifier(strangers=True), only_align=True, lr=0.03)
    finding = found("alignment-collapse", collapsed)
    assert finding.severity == "warning"
    for side in ("2d", "3d"):
        begin, end = evidence(finding, f"clip/alike_{side}")
        assert begin is not None
        assert end is not None
        assert begin < 0.5
        assert end > 0.99
    torch.manual_seed(0)
    held = train_fusion(FusionClassifier(strangers=True))
    assert look("alignment-collapse", held) == []


def test_a_bifusion_run_whose_alignment_outweighs_all_else_collapses(tmp_path: Path) -> None:
    values = {
        "training.steps": 20,
        "training.stages": "none",
        "losses.schedule": "constant",
        "losses.clip_align": {"weight": 10.0, "temperature": 1.0, "gradient_flow": 1.0},
        "optim": {"lr": 3e-3, "clip_grad": None},
    }
    run = train_bifusion(tmp_path, "bifusion", values, ("clip",))
    finding = found("alignment-collapse", run)
    assert finding.remedy == {"losses.schedule": "progressive_clip"}
    assert evidence(finding, "clip/alike_2d")


def test_features_that_only_the_evaluation_sees_alike_have_not_collapsed(bifusion: Run) -> None:
    finding = found("alignment-collapse", bifusion)
    assert finding.severity == "note"
    uniformity = evidence(finding, "eval/uniformity")
    (left,) = uniformity[2:]
    assert left == pytest.approx(0.98**24)
    (_, end) = evidence(finding, "clip/alike_3d")
    assert end is not None
    assert end < 0.6


@pytest.mark.parametrize(("temperature", "fires"), [(0.01, True), (0.07, False)])
def test_a_temperature_is_blamed_only_below_the_documents(temperature: float, fires: bool) -> None:
    torch.manual_seed(0)
    settings = {"losses": {"clip_align": {"temperature": temperature}}}
    model = FusionClassifier(temperature=temperature, strangers=True)
    run = train_fusion(model, weight=2.0, terms=5, steps=20, lr=1e-3, settings=settings)
    gain = run.series("flow/gain")
    assert gain is not None
    assert gain.stats.max == pytest.approx(1 / temperature, rel=1e-3)
    findings = look("temperature-gain", run)
    assert isinstance(findings, list)
    assert bool(findings) == fires
    if fires:
        assert findings[0].remedy == {"losses.clip_align.temperature": 0.1}
        assert evidence(findings[0], "losses.clip_align.temperature") == [pytest.approx(100.0)]


@pytest.mark.parametrize(
    ("fusion", "rules"),
    [
        ({"slope": 0.0}, {"alpha-stuck"}),
        ({"bias": 8.0}, {"gate-saturated", "alpha-out-of-band"}),
        ({"scale": 50.0}, {"clip-out-of-range", "scale-mismatch", "alpha-out-of-band"}),
        ({}, set()),
    ],
)
def test_gates_and_scales_that_are_off(fusion: dict[str, float], rules: set[str]) -> None:
    torch.manual_seed(0)
    run = train_fusion(FusionClassifier(**fusion), steps=80)
    of_gate = ("alpha-stuck", "gate-saturated", "alpha-out-of-band", "clip-out-of-range", "scale-mismatch")
    assert {rule for rule in of_gate if look(rule, run)} == rules


def test_a_low_mean_that_the_valid_share_explains_is_a_note(planted: Run) -> None:
    finding = found("alpha-out-of-band", planted)
    assert finding.severity == "note"
    assert evidence(finding, "gate/mean")[1] == pytest.approx(0.5, abs=0.05)  # held at ½ where a view sees the point


class Tower(nn.Module):
    """A classifier behind a tower, in our models' place of CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"clip": nn.Sequential(nn.Linear(8, 8), nn.Tanh())})
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.encoder["clip"](x))
        return logits


DECLARED = {"model": {"clip": {"tune": "none"}}}
Before = Callable[[int, nn.Module, torch.optim.Optimizer], Any]


def tower_run(frozen: bool, before: Before | None = None, **options: Any) -> Run:
    """Train with the tower frozen or not."""
    torch.manual_seed(0)
    model = Tower()
    model.encoder.requires_grad_(not frozen)
    return train(model, 40, before=before, losses=cross_entropy, batch=batch_of, settings=DECLARED, **options)


def test_a_gradient_that_reaches_the_frozen_tower_is_a_leak() -> None:
    leak = found("clip-leak", tower_run(frozen=False))
    assert (leak.severity, leak.module) == ("error", "encoder.clip.0")
    assert look("clip-leak", tower_run(frozen=True)) == []


def test_a_tower_that_requires_a_gradient_and_that_no_optimiser_holds_is_a_warning() -> None:
    torch.manual_seed(0)
    model = Tower()
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-2)
    run = train(model, 20, optimizer=optimizer, settings=DECLARED)
    leak = found("clip-leak", run)
    assert leak.severity == "warning"
    assert evidence(leak, "weights/encoder.clip.0/norm") == [0.0]


def test_momentum_moves_weights_after_they_were_frozen() -> None:
    torch.manual_seed(0)
    model = Tower()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)

    def freeze(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        assert isinstance(model, Tower)
        if step >= 10:
            model.head.requires_grad_(False)
            for parameter in model.head.parameters():
                parameter.grad = torch.zeros_like(parameter)

    def losses(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)  # as zero_grad(set_to_none=False) leaves it
        return dict(cross_entropy(model, x, labels))

    settings = {"model": {"clip": {"tune": "blocks"}}}
    run = train(model, 40, optimizer=optimizer, before=freeze, losses=losses, settings=settings)
    leak = found("clip-leak", run)
    assert (leak.severity, leak.module) == ("error", "head")
    assert "Momentum" in leak.mechanism


def test_the_default_of_the_rule_is_the_default_of_the_presets() -> None:
    settings = load_settings("bifusion").model_dump(mode="json")
    assert settings["losses"]["clip_align"]["gradient_formula"] == "as_declared"
    assert settings["model"]["projection"]["coordinates"] == "captured"
    assert np.isclose(1 / settings["losses"]["clip_align"]["temperature"], 14.29, atol=0.01)
