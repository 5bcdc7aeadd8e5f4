"""Transformers::

Trainer(model, arguments, callbacks=[BiFusionDiagCallback(probes="all")])
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bifusion_diag.integrations.session import Session
from bifusion_diag.probes import Probe
from bifusion_diag.probes.base import Recorder


class BiFusionDiagCallback(TrainerCallback):
    """Records a run. The loss is that of the model's output.

    Args:
        probes: names of the catalogue, "all", or probes.
        out: folder of the record. None: ``bifusion-diag`` in the output folder of this run.
        scaler: ``trainer.accelerator.scaler``, with fp16.
        recorder: a :class:`~bifusion_diag.replay.FlightRecorder`. Transformers gives its callbacks no batch, so that a
            bad step is told, and judged before its update, but not run again.
    """

    def __init__(
        self,
        probes: str | Sequence[str | Probe] = "all",
        out: str | Path | None = None,
        scaler: GradScaler | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.session = Session([probes] if isinstance(probes, str) else probes, out, recorder)
        self._scaler = scaler

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **_: Any,
    ) -> None:
        """Open the record."""
        assert model is not None
        self.session.open(
            model,
            [] if optimizer is None else [optimizer],
            folder=args.output_dir or ".",
            settings=args.to_dict(),
            first_step=state.global_step,
            scaler=self._scaler,
        )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begin a step, of as many batches as are accumulated."""
        self.session.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """End the step."""
        self.session.end()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the record."""
        self.session.close()
