"""MMEngine, and so ESAM, OneFormer3D and all of OpenMMLab.

In a config::

    custom_imports = dict(imports="bifusion_diag.integrations.mmengine")
    custom_hooks = [dict(type="BiFusionDiagHook", probes="all")]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from bifusion_diag.integrations.session import Session
from bifusion_diag.probes import Probe
from bifusion_diag.probes.base import Recorder


@HOOKS.register_module()
class BiFusionDiagHook(Hook):
    """Records a run. The loss terms are those that the model's ``loss`` mode returns, under their own names.

    Args:
        probes: names of the catalogue, "all", or probes.
        out: folder of the record. None: ``bifusion-diag`` in the work folder of this run.
        recorder: a :class:`~bifusion_diag.replay.FlightRecorder`, whose step function is given what the loader
            hands out.
    """

    priority = "VERY_LOW"  # after the hooks that change the step

    def __init__(
        self,
        probes: str | Sequence[str | Probe] = "all",
        out: str | Path | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.session = Session([probes] if isinstance(probes, str) else probes, out, recorder)

    def before_train(self, runner: Runner) -> None:
        """Open the record."""
        wrappers = _wrappers(runner.optim_wrapper)
        self.session.open(
            runner.model,
            [wrapper.optimizer for wrapper in wrappers],
            folder=Path(runner.work_dir) / runner.timestamp,
            settings=runner.cfg.to_dict(),
            first_step=runner.iter,
            scaler=next((scaler for wrapper in wrappers if (scaler := getattr(wrapper, "loss_scaler", None))), None),
        )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Begin a step, unless this batch is accumulated to the last."""
        self.session.begin(data_batch)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """End the step if this batch has ended it."""
        wrappers = _wrappers(runner.optim_wrapper)
        if all(wrapper.should_update() for wrapper in wrappers):
            self.session.end({"train/lr": wrappers[0].optimizer.param_groups[0]["lr"]})

    def after_train(self, runner: Runner) -> None:
        """Close the record."""
        self.session.close()


def _wrappers(wrapper: OptimWrapper | OptimWrapperDict) -> list[OptimWrapper]:
    return list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]
