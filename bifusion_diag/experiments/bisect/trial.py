"""One short training run, ended as soon as it is certain what it is."""

from __future__ import annotations

import gc
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bifusion_diag.config import Settings
from bifusion_diag.experiments.bisect.oracle import Judged, Watch
from bifusion_diag.record import Run, incident_folder, record_folder
from bifusion_diag.replay.recorder import FlightRecorder
from bifusion_diag.training import Trainer
from bifusion_diag.training.progress import ProgressDisplay

LENGTH = 300  # characters of an error that are kept


@dataclass(frozen=True)
class Trial:
    """What came of a run.

    Attributes:
        judged: what it is; of a run that broke off before that was certain, "unresolved".
        steps: done.
        seconds: of wall time, building the model included.
        step_seconds: of a usual step: the median after the first two.
        crash: the type of the error with which it broke off; None: it did not.
        refused: the error that kept it from starting; None: it started.
    """

    judged: Judged
    steps: int
    seconds: float
    step_seconds: float | None
    crash: str | None = None
    refused: Exception | None = None


class _ShortRun(Trainer):
    """A run that is watched and may end early. It writes no checkpoint, and takes bad steps apart only where asked."""

    def __init__(self, settings: Settings, out: Path, probes: Sequence[str], watch: Watch, examine: bool) -> None:
        self._watch = watch
        self._examine = examine
        self.certain: str | None = None  # why it is bad
        self.done = 0
        super().__init__(settings, out, probes, ("bisect",), Console(quiet=True))

    def _make_recorder(self) -> FlightRecorder:
        again = (lambda batch: self.model(batch).loss) if self._examine else None
        return FlightRecorder(again, capsules=0)

    def _save(self, done: int, *, begun: bool = False) -> None:
        """Nothing goes on from here."""

    def _step(self, step: int, display: ProgressDisplay) -> None:
        super()._step(step, display)
        self.monitor.end_step()
        self.done = step + 1
        self.certain = self._watch.step(step, self.monitor.latest())
        if self.certain is not None:
            self.end = step + 1


def run_trial(
    settings: Settings, out: Path, watch: Watch, *, probes: Sequence[str] = (), examine: bool = False
) -> Trial:
    """Train until the watch is certain, or for all steps.

    Args:
        settings: of the run.
        out: its run.json, the only file that is left of it.
        watch: a fresh one.
        probes: that measure; the losses are always measured.
        examine: take bad steps apart, to learn where they begin.

    Raises:
        KeyboardInterrupt: a signal has ended it.
    """
    began = time.perf_counter()
    trainer: _ShortRun | None = None
    gc.freeze()  # what was there before this run is none of it: looking through all of it takes longer than a short run
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of bad steps, which are what is looked for
            trainer = _ShortRun(settings, out, probes, watch, examine)
            run = trainer.run()
        if trainer.stop.received:
            raise KeyboardInterrupt
        judged = watch.end(run) if trainer.certain is None else Judged("bad", trainer.certain)
        return Trial(judged, trainer.done, time.perf_counter() - began, _step_seconds(run))
    except OSError:
        raise  # of the disk, not of the settings
    except Exception as error:
        said = (str(error).splitlines() or [""])[0][:LENGTH]
        seconds = time.perf_counter() - began
        if trainer is None:
            judged = Judged("unresolved", f"it could not start: {said}")
            return Trial(judged, 0, seconds, None, refused=error)
        judged = Judged("unresolved", f"it broke off after {trainer.done} steps: {type(error).__name__}: {said}")
        return Trial(judged, trainer.done, seconds, None, crash=type(error).__name__)
    finally:
        _tidy(out)
        trainer = None
        gc.collect()  # the model and its hooks refer to each other
        gc.unfreeze()


def _step_seconds(run: Run) -> float | None:
    series = run.series("train/step_seconds"), run.series("train/data_seconds")
    values = [sorted(one.value[2:].tolist() or one.value.tolist()) for one in series if one is not None]
    return sum(one[len(one) // 2] for one in values if one) if values else None


def _tidy(out: Path) -> None:
    """Of a short run, the run.json holds every number: the rest goes."""
    folders = [out.with_name(f"{out.stem}.tensorboard"), incident_folder(out)]
    if out.is_file():
        folders.append(record_folder(out))
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
