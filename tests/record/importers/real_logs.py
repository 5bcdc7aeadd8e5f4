"""Logs that the frameworks themselves write, of short trainings of a small model.

Every training notes what really happened at each of its steps, to which an import is held.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

WINDOW = 10
PER_EPOCH = 12  # iterations
EPOCHS = 4
Truth = dict[str, list[float]]  # by name, a value a step


class Points(Dataset[dict[str, Tensor]]):
    """Twenty-four samples of a linear problem."""

    def __len__(self) -> int:
        return 2 * PER_EPOCH

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
        return {"seg_loss": (self.head(hidden) - y).square().mean(), "inst_loss": 0.1 * hidden.square().mean()}


def train_mmengine(
    folder: Path, *, interval: int = 1, nan_at: int | None = None, resume: bool = False, window: int = WINDOW
) -> Truth:
    """A Runner's training of four epochs with a validation after each, as its users begin one.

    Args:
        folder: the work dir.
        interval: of LoggerHook.
        nan_at: the iteration, from 1, whose inst_loss is NaN, as in ESAM where a scene has no match: its gradient is
            left out, so that the weights are unharmed.
        resume: go on from the last checkpoint.
        window: of LogProcessor.

    Returns:
        The terms, their sum and the gradient norm of every iteration of this process.
    """
    from mmengine.config import Config
    from mmengine.evaluator import BaseMetric
    from mmengine.hooks import Hook
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    truth: Truth = {"loss": [], "seg_loss": [], "inst_loss": []}

    class Model(BaseModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.step = 0

        def forward(self, x: Tensor, y: Tensor, mode: str = "tensor") -> Any:
            if mode == "predict":
                return [x]
            terms = self.net.terms(x, y)
            if self.step == nan_at:
                terms["inst_loss"] = torch.full((), torch.nan) + 0 * terms["inst_loss"].detach()
            for name, value in {**terms, "loss": torch.stack(list(terms.values())).sum()}.items():
                truth[name].append(value.item())
            return terms

    class Count(Hook):  # type: ignore[misc]
        def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            runner.model.step = runner.iter + 1

    class Metric(BaseMetric):  # type: ignore[misc]
        def process(self, data_batch: Any, data_samples: Any) -> None:
            self.results.append(1)

        def compute_metrics(self, results: list[Any]) -> dict[str, float]:
            return {"miou": 0.5, "all_ap_50%": 0.25, "recall": 0.75}

    processor = {"type": "LogProcessor", "window_size": window, "by_epoch": True}
    torch.manual_seed(0)
    runner = Runner(
        Model(), str(folder), train_dataloader=DataLoader(Points(), batch_size=2),
        val_dataloader=DataLoader(Points(), batch_size=12), val_evaluator=[Metric()], val_cfg={},
        train_cfg={"by_epoch": True, "max_epochs": EPOCHS, "val_interval": 1},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01}, "clip_grad": {"max_norm": 5}},
        default_hooks={
            "logger": {"type": "LoggerHook", "interval": interval},
            "checkpoint": {"type": "CheckpointHook", "interval": 2, "max_keep_ckpts": 1 if resume else 2},
        },
        custom_hooks=[Count()], log_processor=processor, resume=resume, randomness={"seed": 3}, log_level="INFO",
        experiment_name=f"{folder.name}{interval}{resume}",
        cfg=Config({"log_processor": processor, "train_cfg": {"max_epochs": EPOCHS}, "model": {"type": "Model"}}),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner.train()
    return truth


def smoothed(values: list[float], window: int = WINDOW) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The mean of the last `window` values at each, of fewer at the beginning."""
    return np.array([np.mean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)])


def train_lightning(folder: Path, *, tensorboard: bool) -> Truth:
    """A Trainer's training of two epochs that logs every step."""
    import lightning.pytorch as lightning
    from lightning.pytorch.callbacks import LearningRateMonitor
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    truth: Truth = {"loss": [], "grad_norm": []}

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            terms = self.net.terms(**batch)
            total = torch.stack(list(terms.values())).sum()
            truth["loss"].append(total.item())
            self.log("train_loss", total, on_step=True, on_epoch=True)
            self.log_dict({f"train/{name}": value for name, value in terms.items()})
            return total

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            norm = torch.stack([p.grad.norm() for p in self.parameters() if p.grad is not None]).norm()
            truth["grad_norm"].append(norm.item())
            self.log("grad_norm", norm)

        def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
            self.log("val/miou", torch.tensor(0.5))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    torch.manual_seed(0)
    data = DataLoader(Points(), batch_size=2)
    logger = TensorBoardLogger(folder, "") if tensorboard else CSVLogger(folder, "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=2, logger=logger, callbacks=[LearningRateMonitor("step")], accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(Module(), data, data)
    return truth


def train_transformers(folder: Path) -> Truth:
    """A Trainer's training of twenty steps that logs every fifth."""
    from transformers import Trainer, TrainingArguments

    truth: Truth = {"loss": []}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            total = torch.stack(list(self.net.terms(x, y).values())).sum()
            if self.training:
                truth["loss"].append(total.item())
            return {"loss": total}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = TrainingArguments(
            str(folder), max_steps=20, logging_steps=5, save_steps=10, eval_strategy="steps", eval_steps=10,
            report_to=[], use_cpu=True, per_device_train_batch_size=2, disable_tqdm=True,
        )  # fmt: skip
        Trainer(Model(), arguments, train_dataset=Points(), eval_dataset=Points()).train()
    return truth
