"""Rules of loss terms against each other."""

from __future__ import annotations

from typing import Any

import torch
from rule_runs import CLASSES, FEATURES, classifier, cross_entropy, found, look, train
from torch import Tensor, nn

from bifusion_diag.config import load_settings
from bifusion_diag.diagnosis import NotMeasured
from bifusion_diag.model.losses.schedule import group_weights
from bifusion_diag.record.schema import Run


def trunk() -> nn.ModuleDict:
    """Two heads on one matrix."""
    return nn.ModuleDict(
        {"trunk": nn.Linear(FEATURES, 16), "one": nn.Linear(16, CLASSES), "other": nn.Linear(16, CLASSES)}
    )


def heads(weight: float, constant: float = 0.0, opposed: bool = False) -> object:
    def losses(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = model["trunk"](x).tanh()  # type: ignore[index]
        one = nn.functional.cross_entropy(model["one"](h), labels)  # type: ignore[index]
        if opposed:
            other = -0.8 * nn.functional.cross_entropy(model["one"](h), labels).clamp(max=20)  # type: ignore[index]
            return {"one": one, "other": other}
        return {"one": weight * one, "other": nn.functional.cross_entropy(model["other"](h), labels) + constant}  # type: ignore[index]

    return losses


def test_a_term_that_takes_the_trunk_is_told_with_a_lighter_weight(healthy: Run) -> None:
    """The other term is most of the loss by a constant, and hardly any of the gradient."""
    settings = {"losses": {"one": {"weight": 100.0}}}
    run = train(trunk(), 120, losses=heads(100.0, constant=50.0), terms=10, probes=("losses",), settings=settings)  # type: ignore[arg-type]
    finding = found("dominant-term", run)
    assert (finding.term, finding.severity) == ("one", "warning")
    assert "gradient on the shared weights" in finding.title
    assert finding.remedy is not None
    share = finding.evidence[0].reading.value  # type: ignore[union-attr]
    assert abs(finding.remedy["losses.one.weight"] - 100 * (1 - share) / share) < 1
    assert look("dominant-term", healthy) == []


def test_a_term_that_is_small_by_intent_is_only_noted() -> None:
    run = train(trunk(), 120, losses=heads(1000.0), terms=10, probes=("losses",))  # type: ignore[arg-type]
    finding = found("dominant-term", run)
    assert (finding.term, finding.severity, finding.remedy) == ("one", "note", None)


def test_terms_that_undo_each_other_are_in_conflict(healthy: Run) -> None:
    run = train(trunk(), 120, losses=heads(1.0, opposed=True), terms=10, probes=("losses",))  # type: ignore[arg-type]
    finding = found("conflicting-terms", run)
    assert finding.evidence[0].reading.value < -0.99  # type: ignore[union-attr, operator]
    assert "loss_gradients: measured on" in finding.mechanism  # where
    assert look("conflicting-terms", healthy) == []


def test_too_few_comparisons_are_said() -> None:
    run = train(trunk(), 30, losses=heads(1.0, opposed=True), terms=10, probes=("losses",))  # type: ignore[arg-type]
    gap = look("conflicting-terms", run)
    assert isinstance(gap, NotMeasured)
    assert "3 steps were measured" in gap.reason
    torch.manual_seed(0)
    one = train(classifier(), 10, losses=cross_entropy, probes=("losses",))
    assert isinstance(look("conflicting-terms", one), NotMeasured)


def test_a_term_of_another_part_of_the_model_is_not_drowned() -> None:
    """A critic's loss shares no weight with the policy's: that it has no gradient there is by design."""

    def losses(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = model["trunk"](x).tanh()  # type: ignore[index]
        logits = model["one"](h)  # type: ignore[index]
        policy = nn.functional.cross_entropy(logits, labels)
        critic = model["other"](h.detach()).square().mean() + 1  # type: ignore[index]
        return {"policy": policy, "critic": critic, "entropy": 1e-3 * logits.softmax(1).square().mean()}

    finding = found("dominant-term", train(trunk(), 120, losses=losses, terms=10, probes=("losses",)))  # type: ignore[arg-type]
    assert (finding.term, finding.severity) == ("policy", "note")
    assert "hardly trained" not in finding.mechanism


def test_a_weight_that_a_schedule_replaces_is_no_remedy() -> None:
    """It is as the schedule of this program has it: under it the weight of the settings changes nothing."""
    settings: dict[str, Any] = load_settings("bifusion").model_dump(mode="json")
    own = load_settings("bifusion").losses
    other = own.model_copy(update={"clip_align": own.clip_align.model_copy(update={"weight": 0.001})})
    assert group_weights(own, 5, 10)["clip_align"] == group_weights(other, 5, 10)["clip_align"]

    def losses(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found = heads(100.0, constant=50.0)(model, x, labels)  # type: ignore[operator]
        return {"clip_align": found["one"], "other": found["other"]}

    run = train(trunk(), 120, losses=losses, terms=10, probes=("losses",), settings=settings)  # type: ignore[arg-type]
    assert found("dominant-term", run).remedy is None
    run.settings["losses"]["schedule"] = "constant"
    assert found("dominant-term", run).remedy is not None


def test_a_record_without_settings_is_not_said_to_have_no_alignment_loss(healthy: Run) -> None:
    """An imported log may just not list it: what is not in the record is not recorded, no more."""
    gap = look("alignment-collapse", healthy)
    assert isinstance(gap, NotMeasured)
    assert gap.reason == "loss/clip_align/raw was not recorded"
