"""A Monitor for loops that call back: its two `with` blocks, opened and closed by separate calls."""

from __future__ import annotations

import atexit
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from bifusion_diag.probes import Monitor, Probe, make_probes
from bifusion_diag.probes.base import Recorder


class Session:
    """One run of a framework's loop.

    A step is a step of the optimiser: with gradient accumulation it spans several batches. A run that ends by an error
    is closed when the process ends, if nobody closes it before: most frameworks do not tell of errors.

    Args:
        probes: names of the catalogue, "all", or probes.
        out: folder of the record, or a path that ends in .json. None: the framework's own folder.
        recorder: judges every step before its update; its capsules lie beside the record.

    Raises:
        UserError: unknown probe.
    """

    def __init__(self, probes: Sequence[str | Probe], out: Path | str | None, recorder: Recorder | None = None) -> None:
        make_probes(probes)  # an unknown one is told before the model is built
        self.probes = probes
        self.out = out
        self.recorder = recorder
        self.monitor: Monitor | None = None
        self._block: AbstractContextManager[None] | None = None

    def open(
        self,
        model: nn.Module,
        optimizers: Iterable[Optimizer],
        *,
        folder: Path | str,
        settings: Mapping[str, Any],
        first_step: int = 0,
        scaler: GradScaler | None = None,
    ) -> None:
        """Training begins.

        Args:
            model: what is trained.
            optimizers: that train it.
            folder: of the framework; the record goes to ``bifusion-diag`` in it unless `out` was given.
            settings: of the run; what JSON cannot hold is kept as text.
            first_step: number of the first step.
            scaler: of mixed precision.
        """
        self.close()
        out = Path(folder) / "bifusion-diag" if self.out is None else self.out
        monitor = Monitor(
            model,
            optimizers,
            self.probes,
            out,
            scaler=scaler,
            settings=plain(settings),
            first_step=first_step,
            recorder=self.recorder,
        )
        self.monitor = monitor.__enter__()
        atexit.register(self.close_late)

    def begin(self, batch: Any = None) -> None:
        """A step begins; does nothing while one is under way."""
        if self.monitor is not None and self._block is None:
            self._block = self.monitor.step(batch)
            self._block.__enter__()

    def end(self, numbers: Mapping[str, Any] | None = None) -> None:
        """The step ends.

        Args:
            numbers: of the loop, for the step's row.
        """
        if self.monitor is not None and self._block is not None:
            for name, value in (numbers or {}).items():
                self.monitor.log(name, value)
            block, self._block = self._block, None
            block.__exit__(None, None, None)

    def close(self, error: BaseException | None = None) -> None:
        """Training ends. A step under way is left out. Closing twice is fine."""
        monitor, self.monitor, block, self._block = self.monitor, None, self._block, None
        if monitor is None:
            return
        atexit.unregister(self.close_late)
        if block is not None:
            left = error or GeneratorExit()
            try:
                block.__exit__(type(left), left, None)
            except BaseException as same:
                if same is not left:
                    raise
        monitor.__exit__(type(error) if error is not None else None, error, None)

    def close_late(self) -> None:
        """The process ends and nobody has closed the session: by the error that ends it, if one does."""
        error = getattr(sys, "last_value", None)
        self.close(error if isinstance(error, BaseException) else KeyboardInterrupt())


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON holds them; anything else as text."""
    kept: dict[str, Any] = json.loads(json.dumps(dict(settings), default=str))
    return kept
