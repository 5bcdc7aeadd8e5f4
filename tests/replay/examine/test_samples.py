"""The guilty sample is the one that was spoilt, and nobody is guilty where nobody was."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bifusion_diag.errors import UserError
from bifusion_diag.replay.examine.samples import sample_shares
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Training


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))


def cnn() -> nn.Module:
    """BatchNorm over whole images, dropout, and at the end over one value a channel and sample."""
    return nn.Sequential(
        nn.Unflatten(1, (3, 2, 2)),
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(16, 4),
    )


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.1, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Unflatten(1, (1, 12)), encoder, nn.Flatten(), nn.Linear(12, 4))


class Task:
    """Classification that a model has learnt; batches are {"x", "y", "file"}."""

    def __init__(self, make: Any, size: int = 8, learn: int = 200) -> None:
        torch.manual_seed(0)
        self.size = size
        self.centres = torch.randn(4, 12) * 2
        self.model = make()
        self.training = Training(self.model, self.step)
        optimizer = torch.optim.Adam(self.model.parameters(), 1e-2)
        for _ in range(learn):
            optimizer.zero_grad()
            self.training.loss(self.batch(32)).total.backward()
            optimizer.step()
        optimizer.zero_grad()

    def step(self, batch: Any) -> dict[str, Tensor]:
        logits = self.model(batch["x"])
        return {"class": F.cross_entropy(logits, batch["y"]), "size": 1e-4 * logits.square().mean()}

    def batch(self, size: int | None = None) -> dict[str, Any]:
        y = torch.randint(4, (size or self.size,))
        return {
            "x": self.centres[y] + 0.3 * torch.randn(len(y), 12),
            "y": y,
            "file": [f"{i}.png" for i in range(len(y))],
        }

    def find(self, batch: Any, kind: str, contrast: bool = True) -> Any:
        before = StepNotes(self.model, 3, self.batch()) if contrast else None
        return sample_shares(self.training, StepNotes(self.model, 4, batch), kind, contrast=before)


#: BatchNorm over a handful of values makes healthy batches differ as much as spoilt ones.
TASKS = [(mlp, 2), (mlp, 5), (mlp, 40), (cnn, 8), (cnn, 40), (transformer, 2), (transformer, 8), (transformer, 40)]


@functools.cache
def learnt(make: Any) -> Task:
    return Task(make)


@pytest.fixture(params=TASKS, ids=lambda param: f"{param[0].__name__}-{param[1]}")
def task(request: Any) -> Task:
    make, size = request.param
    task = copy.copy(learnt(make))
    torch.manual_seed(size)
    task.size, task.model = size, copy.deepcopy(task.model)
    task.training = Training(task.model, task.step)
    return task


def guilty(finding: Any) -> list[int]:
    return [share.index for share in finding.shares]


def test_a_sample_with_one_nan(task):
    batch = task.batch()
    batch["x"][1, 3] = torch.nan
    finding = task.find(batch, "nonfinite-loss")
    assert guilty(finding) == [1], finding
    assert finding.shares[0].name == "1.png"
    assert "its input x holds 1 values that are not finite" in finding.shares[0].why
    assert "without it the step is finite" in finding.shares[0].why


@pytest.mark.parametrize("kind", ["loss-spike", "gradient-spike"])
def test_a_sample_with_a_wrong_label(task, kind):
    batch = task.batch()
    batch["y"][1] = (batch["y"][1] + 1) % 4
    finding = task.find(batch, kind)
    assert guilty(finding) == [1], finding


def test_a_sample_with_a_huge_input(task):
    batch = task.batch()
    batch["x"][0] *= -1000
    finding = task.find(batch, "gradient-spike")
    assert guilty(finding) == [0], finding
    assert guilty(task.find(batch, "input-outlier")) == [0]


@pytest.mark.parametrize("kind", ["loss-spike", "gradient-spike"])
def test_a_batch_whose_labels_are_all_wrong_has_no_single_guilty_sample(task, kind):
    batch = task.batch()
    batch["y"] = (batch["y"] + 1) % 4
    finding = task.find(batch, kind)
    assert guilty(finding) == [], finding


@pytest.mark.parametrize("kind", ["loss-spike", "gradient-spike", "nonfinite-loss", "input-outlier"])
def test_a_healthy_batch_has_none(task, kind):
    finding = task.find(task.batch(), kind)
    assert guilty(finding) == [], finding
    assert finding.reason


def test_spoilt_weights_are_no_samples_fault(task):
    with torch.no_grad():
        list(task.model.parameters())[-1][0] = torch.nan
    finding = task.find(task.batch(), "nonfinite-loss")
    assert (guilty(finding), finding.reason) == ([], "even the last healthy batch is bad in its place")
    with torch.no_grad():
        list(task.model.parameters())[-1][0] = 1000.0
    assert guilty(task.find(task.batch(), "loss-spike")) == []


# --- losses, batches and faults of other kinds -----------------------------------------------------------------------


def search(model: nn.Module, step: Any, batch: Any, kind: str, usual: Any = None, **options: Any) -> Any:
    before = None if usual is None else StepNotes(model, 0, usual)
    return sample_shares(Training(model, step), StepNotes(model, 1, batch), kind, contrast=before, **options)


def test_one_sample_is_guilty_only_beside_a_healthy_batch():
    model = nn.Linear(3, 1)

    def step(x: Tensor) -> Tensor:
        return model(x).square().mean()

    bad, fine = torch.full((1, 3), torch.nan), torch.ones(1, 3)
    assert guilty(search(model, step, bad, "nonfinite-loss", fine)) == [0]
    assert guilty(search(model, step, bad, "nonfinite-loss")) == []
    assert guilty(search(model, step, bad, "nonfinite-loss", bad)) == []
    finding = search(model, step, 1e4 * fine, "gradient-spike", fine)
    assert guilty(finding) == [0]
    assert "with the last healthy batch at the same weights it is not so" in finding.shares[0].why
    assert guilty(search(model, step, fine, "gradient-spike", fine)) == []


def test_a_finite_loss_with_a_gradient_that_is_not():
    """The norm of a zero vector, taken by hand: only a backward shows it."""
    model = nn.Linear(4, 4, bias=False)

    def step(x: Tensor) -> Tensor:
        return model(x).square().sum(1).sqrt().mean()

    x = torch.randn(6, 4)
    x[4] = 0
    assert guilty(search(model, step, x, "nonfinite-gradient", torch.randn(6, 4))) == [4]
    assert guilty(search(model, step, x * 0, "nonfinite-gradient", torch.randn(6, 4))) == []


def test_a_loss_that_is_nan_for_any_sample_alone_is_judged_by_leaving_out():
    """The spread of a batch is not defined for one sample."""
    model = nn.Linear(4, 4)

    def step(x: Tensor) -> Tensor:
        y = model(x)
        return (y / y.std(0)).square().mean()

    x = torch.randn(6, 4)
    x[2, 0] = torch.inf
    with pytest.warns(UserWarning, match="degrees of freedom"):
        assert guilty(search(model, step, x, "nonfinite-loss", torch.randn(6, 4))) == [2]


def test_a_model_that_refuses_any_other_batch_size():
    model = nn.Linear(4, 4)

    def step(x: Tensor) -> Tensor:
        return (model(x) + torch.zeros(5, 4)).exp().mean() if len(x) == 5 else model(x).reshape(5, 4)

    x = torch.randn(5, 4)
    x[3] = 1e6
    assert guilty(search(model, step, x, "nonfinite-loss", torch.randn(5, 4))) == [3]


def test_the_sample_that_makes_a_step_raise():
    model = nn.Linear(4, 3)

    def step(batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 7, 1, 0])
    finding = search(model, step, (x, y), "exception", (x, y.clamp(max=2)))
    assert guilty(finding) == [3]
    assert "alone, the step raises IndexError: Target 7 is out of bounds" in finding.shares[0].why
    assert "without it the step runs" in finding.shares[0].why


def test_an_empty_target_of_one_image():
    """As detectors are given: a list of images of different sizes, and a list of targets."""
    model = nn.Conv2d(3, 1, 1)

    def step(batch: Any) -> Any:
        means = [model(image[None]).flatten()[target["pixels"]].mean() for image, target in zip(*batch, strict=True)]
        return {"pixels": torch.stack(means).square().mean()}

    def make() -> Any:
        images = [torch.randn(3, 8, 8 + i) for i in range(4)]
        return images, [{"pixels": torch.arange(3 + i), "file_name": f"img{i}.jpg"} for i in range(4)]

    images, targets = make()
    targets[2]["pixels"] = torch.arange(0)
    finding = search(model, step, (images, targets), "nonfinite-loss", make())
    assert [(share.index, share.name) for share in finding.shares] == [(2, "img2.jpg")]


@pytest.mark.parametrize("size", [16, 64])
def test_two_of_many(size):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))

    def step(batch: Any) -> Tensor:
        return F.mse_loss(model(batch["x"])[:, 0], batch["y"])

    batch = {"x": torch.randn(size, 4), "y": torch.randn(size)}
    usual = {"x": torch.randn(size, 4), "y": torch.randn(size)}
    wrong = {"x": batch["x"], "y": batch["y"].clone()}
    wrong["y"][[3, 9]] = torch.tensor([90.0, -100.0])
    assert guilty(search(model, step, wrong, "loss-spike", usual)) == [9, 3]  # the stronger first
    assert sorted(guilty(search(model, step, wrong, "gradient-spike", usual))) == [3, 9]
    batch["x"][[1, 13]] = torch.nan
    assert guilty(search(model, step, batch, "nonfinite-loss", usual)) == [1, 13]


def test_accumulated_micro_batches_are_numbered_through():
    model = nn.Linear(4, 1)

    def step(parts: Any) -> Tensor:
        return sum((F.mse_loss(model(x)[:, 0], y) for x, y in parts), torch.zeros(())) / len(parts)

    def make() -> Any:
        return [(torch.randn(3, 4), torch.randn(3)) for _ in range(3)]

    parts = make()
    parts[1][1][2] = 1e4
    assert guilty(search(model, step, parts, "loss-spike", make())) == [5]
    parts[2][0][0] = torch.nan
    assert guilty(search(model, step, parts, "nonfinite-loss", make())) == [6]


def test_a_users_split_and_names():
    model = nn.Linear(4, 1)

    class Packed:
        __slots__ = ("rows",)

        def __init__(self, rows: list[Tensor]) -> None:
            self.rows = rows

    def step(batch: Packed) -> Tensor:
        return torch.stack([model(rows).mean() for rows in batch.rows]).square().mean()

    def split(batch: Packed) -> list[Packed]:
        return [Packed([rows]) for rows in batch.rows]

    def make() -> Packed:
        return Packed([torch.randn(2 + i, 4) for i in range(5)])

    batch = make()
    batch.rows[3][1, 1] = torch.inf
    options = {"split": split, "names": lambda batch: [f"scan {len(rows)}" for rows in batch.rows]}
    finding = search(model, step, batch, "nonfinite-loss", make(), **options)
    assert [(share.index, share.name) for share in finding.shares] == [(3, "scan 5")]
    with pytest.raises(UserError, match=r"names\(batch\) returned 1 names; the batch has 5 samples"):
        search(model, step, batch, "nonfinite-loss", make(), split=split, names=lambda batch: ["one"])
    assert "split" in search(model, step, batch, "nonfinite-loss", make()).reason


def test_the_training_is_as_it_was():
    task = learnt(cnn)
    model = task.model
    batch = task.batch(6)
    batch["x"][2] *= 1e5
    task.training.backward(task.training.loss(task.batch(6)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    notes = [StepNotes(model, number, part) for number, part in enumerate((batch, task.batch(6)))]
    state = torch.get_rng_state()
    for kind in ("gradient-spike", "nonfinite-loss", "loss-spike", "exception"):
        sample_shares(task.training, notes[0], kind, contrast=notes[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(gradients[name], p.grad) for name, p in model.named_parameters())
    model.zero_grad()


@pytest.mark.parametrize("kind", ["nonfinite-weights", "detached-module", "not-updated"])
def test_what_is_no_matter_of_samples_is_not_run(kind):
    task = learnt(mlp)
    finding = sample_shares(task.training, StepNotes(task.model, 0, task.batch(6)), kind)
    assert (finding.shares, finding.runs) == ((), 0)
    assert finding.reason == f"{kind} is no matter of single samples"
