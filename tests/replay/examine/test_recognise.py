"""Samples that are tiny, selections of one sample's shape, and inputs that are bad and do no harm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bifusion_diag.probes import Monitor
from bifusion_diag.replay import FlightRecorder, Incident

BAD = 24


class Clouds(nn.Module):
    """Point clouds one after another; the loss of each is divided by its points, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, batch: dict[str, Any]) -> Tensor:
        values = self.net(batch["xyz"].nan_to_num(0.0))[:, 0]
        losses = []
        for i in range(4):
            mine = values[batch["batch_index"] == i]
            losses.append((mine - 1).square().sum() / len(mine) * (200 / len(mine)))
        return torch.stack(losses).mean()


def clouds(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    counts = [190, 210, 200, 220]
    index = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    return {
        "xyz": torch.randn(len(index), 3, generator=generator),
        "batch_index": index,
        "names": [f"cloud {step}-{i}" for i in range(4)],
        "notes": [["empty crop"] if i == 1 and step == BAD else [] for i in range(4)],
    }


def incidents_with(edit: Any, on_incident: str = "record") -> list[Incident]:
    torch.manual_seed(0)
    model = Clouds()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    recorder = FlightRecorder(model, on_incident=on_incident)  # type: ignore[arg-type]
    with Monitor(model, optimizer, ["losses"], recorder=recorder) as monitor:
        for step in range(BAD + 3):
            batch = clouds(step)
            if step == BAD:
                batch = edit(batch)
            optimizer.zero_grad()
            with monitor.step(batch):
                model(batch).backward()
                optimizer.step()
    return recorder.incidents


def only_two_points_of_cloud_1(batch: dict[str, Any]) -> dict[str, Any]:
    keep = (batch["batch_index"] != 1) | (torch.cumsum(batch["batch_index"] == 1, 0) <= 2)
    return batch | {"xyz": batch["xyz"][keep], "batch_index": batch["batch_index"][keep]}


def test_a_sample_of_a_handful_of_rows_is_called_that(recwarn: Any) -> None:
    (found,) = incidents_with(only_two_points_of_cloud_1)
    assert (found.step, found.mechanism) == (BAD, "tiny-sample")
    assert [sample.name for sample in found.samples] == [f"cloud {BAD}-1"]
    assert found.cause is not None
    assert found.cause.direction == "data"
    assert "it has 2 rows of input xyz, the others 20" in found.explanation
    assert "empty crop" in found.explanation


def test_a_bad_input_that_the_model_copes_with_is_harmless_and_not_left_out(recwarn: Any) -> None:
    def one_nan(batch: dict[str, Any]) -> dict[str, Any]:
        batch["xyz"][5, 1] = torch.nan
        return batch

    (found,) = incidents_with(one_nan, on_incident="skip")
    assert (found.kind, found.family, found.mechanism) == ("nonfinite-input", "nonfinite-input", "nonfinite-input")
    assert (found.harmless, found.action) == (True, "record")
    assert [sample.name for sample in found.samples] == [f"cloud {BAD}-0"]


class Drawn(nn.Module):
    """Draws its queries at random: of a sample whose objects none meets, the loss is a mean over nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        losses = []
        for i in range(2):
            mine = self.net(batch["xyz"][batch["batch_index"] == i])[:, 0]
            drawn = torch.rand(4)
            met = drawn > (0.999 if batch["hard"][i] and torch.rand(1) > 0.3 else -1.0)
            masks = mine[None].expand(4, -1)[met]
            losses.append(nn.functional.binary_cross_entropy_with_logits(masks, torch.ones_like(masks)))
        return torch.stack(losses).mean()


def test_the_sample_of_an_empty_selection_is_known_by_its_shape(recwarn: Any) -> None:
    torch.manual_seed(1)
    model = Drawn()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    recorder = FlightRecorder(model)
    with Monitor(model, optimizer, ["losses"], recorder=recorder) as monitor:
        for step in range(40):
            index = torch.repeat_interleave(torch.arange(2), torch.tensor([31, 47]))
            batch = {"xyz": torch.randn(78, 3), "batch_index": index, "hard": [False, step >= 15]}
            optimizer.zero_grad()
            with monitor.step(batch):
                model(batch).backward()
                optimizer.step()
    empty = [incident for incident in recorder.incidents if incident.mechanism == "empty-selection"]
    assert len(empty) >= 2
    assert all(incident.harmless for incident in empty)
    assert {sample.index for incident in empty for sample in incident.samples} == {1}
    assert all(incident.samples for incident in empty)
