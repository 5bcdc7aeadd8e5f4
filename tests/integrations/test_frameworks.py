"""Each framework itself trains a small model with our callback; the record is what its own loop says it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bifusion_diag.errors import UserError
from bifusion_diag.probes import Monitor
from bifusion_diag.record import Run, load_run
from bifusion_diag.replay import FlightRecorder

STEPS = 6


class Points(Dataset[dict[str, Tensor]]):
    """Twelve samples of a linear problem."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.randn(4, generator=torch.Generator().manual_seed(index))
        return {"x": x, "y": x.sum()[None]}


class Net(nn.Module):
    """Two linear layers and two loss terms."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 1)

    def terms(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x).tanh()
        return {"loss_fit": (self.head(hidden) - y).square().mean(), "loss_small": 0.1 * hidden.square().mean()}


def values(run: Run, name: str) -> list[float]:
    series = run.series(name)
    assert series is not None, f"{name} was not recorded; there are {run.names()}"
    return series.value.tolist()


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class OneBadSample(Points):
    """The tenth sample of twelve, in the fifth batch of two, is NaN."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = super().__getitem__(index)
        return item if index != 9 else {**item, "x": item["x"] * torch.nan}


def check_incident(run: Run, recorder: FlightRecorder, *, again: bool) -> None:
    """The fifth step is bad, as its second sample is; its update was left out."""
    assert run.status == "completed"
    assert recorder.incidents[0].step == 4
    stored = next(event.data["incident"] for event in run.events if "incident" in event.data)
    assert stored["action"] == "skip"
    if again:
        assert stored["reproduction"]["identical"] is True, stored["reproduction"]
        assert [sample["index"] for sample in stored["samples"]] == [1]
        assert Path(stored["capsule"]).name == "000004"


def check(run: Run, model: nn.Module, prefix: str = "", steps: int = STEPS) -> None:
    """What holds in every framework."""
    assert (run.status, len(run.steps)) == ("completed", steps)
    for key in (
        "grads/{}body/param_norm",
        "grads/{}head/output_norm",
        "activations/{}body/rms",
        "updates/{}head/ratio",
    ):
        series = values(run, key.format(prefix))
        assert np.isfinite(series).all()
        assert min(series) > 0
    assert hooks_of(model) == 0
    assert run.settings


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_mmengine(tmp_path: Path, accumulate: int) -> None:
    hooks = pytest.importorskip("mmengine.hooks", reason="or one of its libraries", exc_type=ImportError)
    from mmengine.config import Config
    from mmengine.model import BaseModel
    from mmengine.registry import DATASETS, MODELS
    from mmengine.runner import Runner

    class Model(BaseModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor, y: Tensor, mode: str = "tensor") -> Any:
            return self.net.terms(x, y)

    logged: list[dict[str, float]] = []

    class Listener(hooks.Hook):  # type: ignore[misc,name-defined]
        def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            logged.append({name: float(value) for name, value in outputs.items()})

    MODELS.register_module(name="Tiny", module=Model, force=True)
    DATASETS.register_module(name="Points", module=Points, force=True)
    settings = {
        "model": {"type": "Tiny"},
        "work_dir": str(tmp_path),
        "train_dataloader": {
            "dataset": {"type": "Points"}, "batch_size": 2, "num_workers": 0, "collate_fn": {"type": "default_collate"},
            "sampler": {"type": "DefaultSampler", "shuffle": False},
        },
        "train_cfg": {"by_epoch": False, "max_iters": STEPS * accumulate},
        "optim_wrapper": {
            "optimizer": {"type": "SGD", "lr": 0.05}, "accumulative_counts": accumulate, "clip_grad": {"max_norm": 0.1},
        },
        "custom_imports": {"imports": "bifusion_diag.integrations.mmengine"},
        "custom_hooks": [{"type": "BiFusionDiagHook", "probes": "all"}],
        "experiment_name": f"accumulate{accumulate}",
        "log_level": "ERROR",
    }  # fmt: skip
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings))
    runner = Runner.from_cfg(Config.fromfile(config))
    runner.register_hook(Listener())
    runner.train()
    (path,) = tmp_path.glob("*/bifusion-diag/run.json")
    run = load_run(path)
    check(run, runner.model, "net.")
    told = {key: np.array([step[key] for step in logged]).reshape(STEPS, accumulate).mean(1) for key in logged[0]}
    for term in ("loss_fit", "loss_small"):
        np.testing.assert_allclose(values(run, f"loss/{term}/raw"), told[term], rtol=1e-5)
    np.testing.assert_allclose(values(run, "loss/total"), told["loss"], rtol=1e-5)
    assert values(run, "train/lr") == pytest.approx([0.05] * STEPS)
    assert run.series("data/x/max") is not None


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("told", [False, True])
def test_lightning(tmp_path: Path, accumulate: int, told: bool) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    from bifusion_diag.integrations.lightning import BiFusionDiagCallback

    callback = BiFusionDiagCallback("all")
    seen: list[dict[str, float]] = []

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self, width: int = 8) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = Net()

        def training_step(self, batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
            terms = self.net.terms(**batch)
            if told:
                callback.losses(terms)
            total = torch.stack(list(terms.values())).sum()
            seen.append({"loss": total.item()} | {name: term.item() for name, term in terms.items()})
            return {"loss": total} | terms

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.05)

    torch.manual_seed(0)
    module = Module()
    trainer = lightning.Trainer(
        default_root_dir=tmp_path, max_steps=STEPS, accelerator="cpu", callbacks=[callback], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        accumulate_grad_batches=accumulate, gradient_clip_val=0.1,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Points(), batch_size=2))
    run = load_run(tmp_path / "bifusion-diag" / "run.json")
    check(run, module, "net.")
    mean = {key: np.array([step[key] for step in seen]).reshape(STEPS, accumulate).mean(1) for key in seen[0]}
    np.testing.assert_allclose(values(run, "loss/total"), mean["loss"], rtol=1e-5)
    if told or accumulate == 1:
        np.testing.assert_allclose(values(run, "loss/loss_fit/raw"), mean["loss_fit"], rtol=1e-5)
    assert bool(run.names("loss_gradients/")) == told
    assert run.settings == {"width": 8}


@pytest.mark.filterwarnings("default")
def test_mmengine_with_the_flight_recorder(tmp_path: Path) -> None:
    pytest.importorskip("mmengine.hooks", reason="or one of its libraries", exc_type=ImportError)
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    from bifusion_diag.integrations.mmengine import BiFusionDiagHook

    class Model(BaseModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor, y: Tensor, mode: str = "tensor") -> Any:
            return self.net.terms(x, y)

    model = Model()
    recorder = FlightRecorder(lambda batch: model(**batch), on_incident="skip")
    runner = Runner(
        model, str(tmp_path), train_dataloader=DataLoader(OneBadSample(), batch_size=2),
        train_cfg={"by_epoch": False, "max_iters": STEPS}, optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.05}},
        custom_hooks=[BiFusionDiagHook("grads", tmp_path / "mine", recorder)], experiment_name="recorder",
        log_level="ERROR",
    )  # fmt: skip
    runner.train()
    check_incident(load_run(tmp_path / "mine" / "run.json"), recorder, again=True)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.filterwarnings("default")
def test_lightning_with_the_flight_recorder(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    from bifusion_diag.integrations.lightning import BiFusionDiagCallback

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return torch.stack(list(self.net.terms(**batch).values())).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    module = Module()
    recorder = FlightRecorder(lambda batch: module.training_step(batch, 0), on_incident="skip")
    trainer = lightning.Trainer(
        max_steps=STEPS, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[BiFusionDiagCallback("grads", tmp_path / "mine", recorder)], enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(OneBadSample(), batch_size=2))
    check_incident(load_run(tmp_path / "mine" / "run.json"), recorder, again=True)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.filterwarnings("default")
def test_lightning_tells_of_an_error(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    from bifusion_diag.integrations.lightning import BiFusionDiagCallback

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            if index == 3:
                raise RuntimeError("the loader broke")
            return torch.stack(list(self.net.terms(**batch).values())).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    module = Module()
    trainer = lightning.Trainer(
        max_steps=STEPS, accelerator="cpu", callbacks=[BiFusionDiagCallback("grads", tmp_path / "mine")], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="the loader broke"):
        trainer.fit(module, DataLoader(Points(), batch_size=2))
    run = load_run(tmp_path / "mine" / "run.json")
    assert (run.status, run.error, len(run.steps)) == ("failed", "RuntimeError: the loader broke", 3)
    assert hooks_of(module) == 0


@pytest.mark.filterwarnings("default")
def test_an_optimizer_of_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model, optimizer = accelerate.Accelerator(cpu=True).prepare(model, optimizer)
    with Monitor(model, optimizer, probes=["updates"]) as monitor:
        with monitor.step():
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
        monitor.end_step()
        row = monitor.latest()
    assert row["updates/skipped"] == 0
    assert row["train/lr"] == 0.5
    assert row["updates/(root)/ratio"] > 0  # type: ignore[operator]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_transformers(tmp_path: Path, accumulate: int) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    from bifusion_diag.integrations.transformers import BiFusionDiagCallback

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
            self.seen: list[float] = []

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            logits = self.head(self.body(x).tanh())
            loss = (logits - labels).square().mean()
            self.seen.append(loss.item())
            return transformers.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)

    class Renamed(Points):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            item = super().__getitem__(index)
            return {"x": item["x"], "labels": item["y"]}

    torch.manual_seed(0)
    model = Model()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        gradient_accumulation_steps=accumulate, disable_tqdm=True, save_strategy="no", max_grad_norm=0.1,
        logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=Renamed(), callbacks=[BiFusionDiagCallback(probes="all")]
    )
    trainer.train()
    run = load_run(tmp_path / "bifusion-diag" / "run.json")
    check(run, model)
    expected = np.array(model.seen).reshape(STEPS, accumulate).mean(1)
    np.testing.assert_allclose(values(run, "loss/total"), expected, rtol=1e-5)


@pytest.mark.filterwarnings("default")
def test_transformers_with_the_flight_recorder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    from bifusion_diag.integrations.transformers import BiFusionDiagCallback

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            loss = self.net.terms(x, labels)["loss_fit"]
            return transformers.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=labels)

    class Renamed(OneBadSample):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            item = super().__getitem__(index)
            return {"x": item["x"], "labels": item["y"]}

    model = Model()
    recorder = FlightRecorder(on_incident="skip")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no", logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip

    class InOrder(transformers.Trainer):  # type: ignore[misc,name-defined]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    callback = BiFusionDiagCallback("grads", tmp_path / "mine", recorder=recorder)
    InOrder(model, arguments, train_dataset=Renamed(), callbacks=[callback]).train()
    check_incident(load_run(tmp_path / "mine" / "run.json"), recorder, again=False)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("named", [False, True])
def test_a_step_in_the_optimizers_closure_is_judged_after_its_backward(tmp_path: Path, named: bool) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recorder = FlightRecorder(lambda batch: model(batch).square().mean(), on_incident="skip")
    calls = []
    with Monitor(model, optimizer, ["grads"], tmp_path / "run", recorder=recorder) as monitor:
        for step in range(3):
            batch = torch.ones(2, 4)
            batch[1, 0] = torch.nan if step == 2 else 1.0
            before = model.weight.detach().clone()

            def closure(batch: Tensor = batch) -> Tensor:
                calls.append(1)
                optimizer.zero_grad()
                loss = model(batch).square().mean()
                loss.backward()
                return loss

            with monitor.step(batch):
                loss = optimizer.step(closure=closure) if named else optimizer.step(closure)
            assert isinstance(loss, Tensor)  # what the closure returned
            assert torch.equal(before, model.weight) == (step == 2)
    assert len(calls) == 3
    (incident,) = recorder.incidents
    assert (incident.step, incident.action, incident.reproduction.identical) == (2, "skip", True)
    assert "gradients" in incident.reproduction.compared


def test_an_unknown_probe_is_told_before_anything_is_built(tmp_path: Path) -> None:
    from bifusion_diag.integrations.session import Session

    with pytest.raises(UserError, match="unknown probe 'grad'"):
        Session(["grad"], tmp_path)


def test_a_process_that_dies_by_an_error_closes_its_record(tmp_path: Path) -> None:
    import subprocess
    import sys

    program = f"""
import torch
from bifusion_diag.integrations.session import Session
model = torch.nn.Linear(2, 1)
session = Session(["grads"], {str(tmp_path / "run")!r})
session.open(model, [], folder=".", settings={{"a": torch.float32}})
for step in range(3):
    session.begin()
    model(torch.ones(1, 2)).sum().backward()
    if step == 2:
        raise RuntimeError("broken")
    session.end()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.strip().endswith("RuntimeError: broken")
    run = load_run(tmp_path / "run" / "run.json")
    assert (run.status, run.error, len(run.steps)) == ("failed", "RuntimeError: broken", 2)
    assert run.settings == {"a": "torch.float32"}
