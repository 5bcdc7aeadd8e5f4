"""Lightning::

Trainer(callbacks=[BiFusionDiagCallback(probes="all")])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from bifusion_diag.integrations.session import Session
from bifusion_diag.probes import Probe
from bifusion_diag.probes.base import Recorder


class BiFusionDiagCallback(Callback):
    """Records a run.

    The total is what Lightning differentiates. Further scalars of the dict that ``training_step`` returns are recorded
    as its terms. Their gradients are known (probe ``loss_gradients``) where ``training_step`` tells the terms itself,
    by ``callback.losses(terms)``.

    Args:
        probes: names of the catalogue, "all", or probes.
        out: folder of the record. None: ``bifusion-diag`` in the logger's folder of this run.
        recorder: a :class:`~bifusion_diag.replay.FlightRecorder`, whose step function is given the batch.
    """

    def __init__(
        self,
        probes: str | Sequence[str | Probe] = "all",
        out: str | Path | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.session = Session([probes] if isinstance(probes, str) else probes, out, recorder)
        self._updates = 0
        self._told = False

    def losses(
        self,
        terms: Mapping[str, Tensor],
        weights: Mapping[str, float | Tensor] | None = None,
        total: Tensor | None = None,
    ) -> None:
        """Tell the loss terms, from ``training_step``; as :meth:`bifusion_diag.probes.Monitor.losses`."""
        if self.session.monitor is not None:
            self._told = True
            self.session.monitor.losses(terms, weights, total)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the record."""
        self._updates = trainer.global_step
        self.session.open(
            pl_module,
            trainer.optimizers,
            folder=trainer.log_dir or trainer.default_root_dir,
            settings=dict(pl_module.hparams),
            first_step=trainer.global_step,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin a step, unless this batch is accumulated to the last."""
        self.session.begin(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Take the loss, unless training_step has told its terms."""
        if not self._told and self.session.monitor is not None:
            whole = loss * trainer.accumulate_grad_batches  # Lightning has divided it
            self.session.monitor.losses({"loss": whole}, total=whole)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the step if this batch has ended it."""
        if trainer.global_step > self._updates:
            self._updates = trainer.global_step
            self.session.end({} if self._told else scalars(outputs))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the record."""
        self.session.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the record as that of a failed run."""
        self.session.close(exception)


def scalars(outputs: Any) -> dict[str, Tensor]:
    """The loss terms among what a training step returned, but for the total: names of series and () tensors."""
    if not isinstance(outputs, Mapping):
        return {}
    return {
        f"loss/{name}/raw": value.detach()
        for name, value in outputs.items()
        if name != "loss" and isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()
    }
