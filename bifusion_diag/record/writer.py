"""Writing a run: an append-only folder while it lasts, one bounded run.json at its end."""

from __future__ import annotations

import dataclasses
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bifusion_diag.errors import UserError
from bifusion_diag.files import write_text
from bifusion_diag.record.background import Background
from bifusion_diag.record.document import KIND
from bifusion_diag.record.files import HistogramRows, RecordFiles, Rows, event_line
from bifusion_diag.record.reader import HEADER_FILE, RecordReader, read_state
from bifusion_diag.record.reduce import reduce_record
from bifusion_diag.record.scene_files import snapshot_line
from bifusion_diag.record.scenes import Snapshot
from bifusion_diag.record.schema import STATUSES, Event, ModuleInfo, RecordError, RunHeader
from bifusion_diag.record.tensorboard import TensorBoardSink

MAX_WAITING = 64_000_000  # bytes that wait for the disk; a block that is more is not recorded
TOO_SLOW = "the disk was too slow"


class RunWriter:
    """Records a run. A context manager: an exception ends the run as failed, Ctrl-C as interrupted.

    A thread of its own writes, in the order of the calls. No call waits for the disk but :meth:`flush` and
    :meth:`finish`. A disk that fails or is too slow costs rows, never the run: there is one RuntimeWarning, and an
    event says how many rows are not there. Any other error of the thread is raised by the next call.

    Args:
        path: where run.json goes. Rows are appended to files in ``<stem>.record/`` beside it, block by block.
        header: what is known of the run before its first step.
        resume_at: continue the record that is there from this step on, keeping its id and date of creation. What it
            holds of this step and of later ones is void: they will be done again, or never. None: it is replaced.
        tensorboard: gets the same numbers, block by block.
        rank: of this process among those that record the run together. Each has a folder of its own, rank 1
            ``<stem>.rank1.record/``; rank 0 alone writes run.json.
        ranks: how many there are. Folders that an earlier run of this name left of more are removed.

    Raises:
        UserError: the place cannot be written, or there is nothing to resume.
    """

    def __init__(
        self,
        path: Path | str,
        header: RunHeader,
        *,
        resume_at: int | None = None,
        tensorboard: TensorBoardSink | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.path = check_output(path)
        self.rank = rank
        self.folder = record_folder(self.path, rank)
        self._finished = False
        self._dropped: list[int] = []  # steps of blocks that the queue had no room for
        self._told_slow = False
        if resume_at is not None:
            header = self._resumed(header)
        if ranks > 1:
            header = dataclasses.replace(header, environment=header.environment | {"rank": rank, "ranks": ranks})
        self.header = header
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                # Also on resuming: if this process is killed, the folder knows more than it.
                self.path.unlink(missing_ok=True)
                for number, folder in rank_folders(self.path).items():
                    if number >= ranks:
                        shutil.rmtree(folder)
            self._files = RecordFiles(self.folder, header, resume_at, tensorboard)
        except OSError as error:
            raise UserError(
                f"{self.path}: the run cannot be recorded there ({error.strerror or error}). "
                "Choose another output path."
            ) from error
        self._thread = Background("bifusion-diag record", MAX_WAITING)

    def _resumed(self, header: RunHeader) -> RunHeader:
        if not (self.folder / HEADER_FILE).is_file():
            raise UserError(
                f"{self.folder}: no record to resume there. Start a new run, or give the path of the old one."
            )
        old = read_state(self.folder).header
        modules = header.modules or old.modules
        return dataclasses.replace(header, run_id=old.run_id, created=old.created, modules=modules)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            try:
                self.finish("completed")
            except KeyboardInterrupt:  # costs nothing the first time; the second time it ends the wait for the disk
                self.finish("completed")
                raise
            return
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        try:
            self.finish(status, error=None if status == "interrupted" else f"{type(error).__name__}: {error}")
        except Exception as second:  # must not hide the first
            warnings.warn(f"{self.path}: the record could not be finished: {second}", RuntimeWarning, stacklevel=2)

    def append(
        self, steps: ArrayLike, columns: Mapping[str, ArrayLike], missing: Mapping[str, ArrayLike] | None = None
    ) -> None:
        """Append R rows given by column.

        Args:
            steps: (R,) steps. A step that was already recorded is replaced, with its whole row.
            columns: (R,) values of each series. Series not given are missing.
            missing: (R,) bool for series some of whose values are missing.
        """
        names = list(columns)
        rows = np.asarray(steps, dtype=np.int64)
        values = np.empty((len(rows), len(names)), np.float32)
        gone = np.zeros((len(rows), len(names)), bool)
        for i, name in enumerate(names):
            values[:, i] = columns[name]
            gone[:, i] = (missing or {}).get(name, False)
        self.append_block(rows, names, values, gone)

    def append_block(
        self,
        steps: ArrayLike,
        names: Sequence[str],
        values: NDArray[np.float32],
        missing: NDArray[np.bool_] | None = None,
    ) -> None:
        """Append R rows of C values: values (R, C) and which of them are missing (R, C)."""
        rows = np.array(steps, dtype=np.int64)
        gone = np.zeros(values.shape, bool) if missing is None else missing.copy()
        assert values.shape == gone.shape == (len(rows), len(names)), "steps, names and values differ in length"
        self._append(Rows(rows, list(names), np.array(values, np.float32), gone))

    def append_histogram(self, name: str, steps: ArrayLike, counts: ArrayLike, edges: ArrayLike) -> None:
        """Append counts of one step (B,) or of R steps (R, B) over bins with edges (B + 1,), the same at every step."""
        rows = np.atleast_1d(np.array(steps, dtype=np.int64))
        table = np.atleast_2d(np.array(counts, dtype=np.float32))
        limits = np.array(edges, dtype=np.float64)
        assert table.shape == (len(rows), len(limits) - 1), "steps, counts and edges differ in length"
        block = HistogramRows(name, rows, table, limits)
        none = np.zeros((0, 0), np.float32)
        self._append(Rows(rows[:0], (), none, none.astype(bool), [block]))

    def _append(self, rows: Rows) -> None:
        """Append rows that are there: whoever has them can wait where the disk is slow."""
        self._surface()
        size = rows.values.nbytes + sum(histogram.counts.nbytes for histogram in rows.histograms)
        if not self._thread.put(lambda: self._files.rows(rows), size):
            self.flush()
            self._thread.put(lambda: self._files.rows(rows), size)

    def append_later(self, steps: Sequence[int], size: int, build: Callable[[], Rows]) -> None:
        """Append rows that the writing thread makes itself. Never waits: where the disk is too slow, they are dropped.

        Args:
            steps: of the rows, to name those that are not recorded.
            size: bytes that `build` holds.
            build: makes the rows, in the thread.
        """
        self._surface()
        files, dropped = self._files, self._dropped
        if dropped:
            if not self._thread.put(lambda: files.lose(dropped, TOO_SLOW), 0):
                dropped += steps
                return
            self._dropped = []
        if not self._thread.put(lambda: files.rows(build()), size):
            self._dropped = list(steps)
            if not self._told_slow:
                self._told_slow = True
                warnings.warn(
                    f"{self.folder}: {TOO_SLOW}: rows from step {steps[0]} on are not recorded until it has caught up. "
                    "Training goes on.",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def event(self, step: int | None, kind: str, message: str, **data: Any) -> None:
        """Record that something happened."""
        self._surface()
        line = event_line(Event(step, kind, message, data))
        self._thread.put(lambda: self._files.event(line), len(line), small=True)

    def snapshot(self, snapshot: Snapshot) -> None:
        """Record α of a scene at a moment of the run."""
        self._surface()
        line = snapshot_line(snapshot)
        self._thread.put(lambda: self._files.scene(line), len(line), small=True)

    def set_modules(self, modules: Sequence[ModuleInfo]) -> None:
        """Record the modules' execution order, known only after the first forward."""
        self._surface()
        header = self.header = dataclasses.replace(self.header, modules=list(modules))
        self._thread.put(lambda: self._files.state(header), 0, small=True)

    def flush(self) -> None:
        """Return when all that was recorded so far is with the operating system: a killed process loses none of it."""
        self._thread.wait()
        self._surface()

    def finish(self, status: str, error: str | None = None, measures: Mapping[str, Any] | None = None) -> None:
        """Close the record and write run.json. Does nothing the second time.

        Where run.json cannot be written, a warning says so: the folder can be read in its place.

        Args:
            status: "completed", "interrupted" or "failed".
            error: the error's text, where it failed.
            measures: what was measured over the whole run at full resolution.
        """
        assert status in STATUSES[1:], status
        if self._finished:
            return
        self._thread.close()  # Ctrl-C may end it; whoever calls again waits again
        self._finished = True
        if self._dropped:
            self._files.lose(self._dropped, TOO_SLOW)
        broken = self._thread.take_error()
        if broken is not None:
            stopped = f"recording ended at an error: {type(broken).__name__}: {broken}"
            self._files.event(event_line(Event(None, "record", stopped)))
        ours = self._files.close(self.header, status, error, measures or {})
        try:
            if self.rank == 0 and ours:
                _, text = reduce_record(RecordReader(self.folder))
                write_text(self.path, text)
        except UserError as failure:
            self._files.warnings.append(f"{failure} The run can be read from {self.folder}.")
        self._surface()
        if broken is not None:
            raise broken

    def _surface(self) -> None:
        """Say and raise what the thread has met, in the thread that trains: there it is heard."""
        while self._files.warnings:
            warnings.warn(self._files.warnings.popleft(), RuntimeWarning, stacklevel=3)
        error = self._thread.take_error()
        if error is not None:
            raise error


def record_folder(path: Path, rank: int = 0) -> Path:
    """Where a process of a run records: ``run.record`` of rank 0, ``run.rank1.record`` of rank 1."""
    return path.with_name(f"{path.stem}.record" if rank == 0 else f"{path.stem}.rank{rank}.record")


def rank_folders(path: Path) -> dict[int, Path]:
    """The folders beside a run.json that processes other than rank 0 have recorded to, by rank."""
    pattern = re.compile(re.escape(path.stem) + r"\.rank([1-9]\d*)\.record")
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    found = {int(match[1]): folder for folder in beside if (match := pattern.fullmatch(folder.name))}
    return {rank: folder for rank, folder in sorted(found.items()) if _rank_of(folder) == rank}


def _rank_of(folder: Path) -> int | None:
    """The rank that a folder's header names: a run may by chance be called what another's rank is."""
    try:
        rank: int | None = read_state(folder).header.environment.get("rank")
    except RecordError:
        return None
    return rank


#: Folders that stand beside run.json under its stem: a run.json of such a name would be in the way of its own.
FOLDERS_BESIDE = (".record", ".tensorboard", ".checkpoints", ".incidents")


def check_output(path: Path | str) -> Path:
    """The path of a run.json to be, checked before anything is computed for it.

    Raises:
        UserError: it is a folder or named like one of the run's own, a file that is no run record is there, or a file
            stands where its folder should be.
    """
    target = Path(path)
    if not target.name or target.is_dir():
        raise UserError(f"{path}: a run cannot be recorded there, it is a folder. Give a file name such as run.json.")
    if target.suffix in FOLDERS_BESIDE:
        raise UserError(
            f"{path}: a run cannot be recorded there, a run keeps a folder of that name. "
            f"Give a file name such as {target.with_suffix('.json')}."
        )
    if target.is_file() and KIND not in target.read_bytes()[:200].decode("utf-8", "replace"):
        raise UserError(f"{path}: there is a file that is no run record. Choose another output path, or remove it.")
    above = next(parent for parent in target.parents if parent.exists())
    if not above.is_dir():
        raise UserError(f"{path}: a run cannot be recorded there, {above} is a file. Choose another output path.")
    return target
