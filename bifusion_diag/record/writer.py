"""Writing a run: an append-only folder while it lasts, one bounded run.json at its end."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bifusion_diag.errors import UserError
from bifusion_diag.files import write_text
from bifusion_diag.record import codec
from bifusion_diag.record.blocks import Block, BlockStream
from bifusion_diag.record.document import KIND, event_to, header_to
from bifusion_diag.record.reader import EVENTS_FILE, HEADER_FILE, RESUME, RecordReader, file_number, read_state
from bifusion_diag.record.reduce import reduce_record
from bifusion_diag.record.schema import SCHEMA_VERSION, STATUSES, Event, ModuleInfo, RunHeader
from bifusion_diag.record.tensorboard import TensorBoardSink


class RunWriter:
    """Records a run. A context manager: an exception ends the run as failed, Ctrl-C as interrupted.

    Args:
        path: where run.json goes. Rows are appended to files in ``<stem>.record/`` beside it, flushed block by block.
        header: what is known of the run before its first step.
        resume_at: continue the record that is there from this step on, keeping its id and date of creation. What it
            holds of this step and of later ones is void: they will be done again, or never. None: it is replaced.
        tensorboard: gets the same numbers, block by block.

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
    ) -> None:
        self.path = check_output(path)
        self.folder = self.path.with_name(self.path.stem + ".record")
        self._tensorboard = tensorboard
        self._names: list[str] = []
        self._stream: BlockStream | None = None
        self._histograms: dict[str, BlockStream] = {}
        self._finished = False
        if resume_at is not None:
            header = self._resumed(header)
        self.header = header
        try:
            self._prepare(resume_at)
        except OSError as error:
            raise UserError(
                f"{self.path}: the run cannot be recorded there ({error.strerror or error}). "
                "Choose another output path."
            ) from error

    def _resumed(self, header: RunHeader) -> RunHeader:
        if not (self.folder / HEADER_FILE).is_file():
            raise UserError(
                f"{self.folder}: no record to resume there. Start a new run, or give the path of the old one."
            )
        old = read_state(self.folder).header
        modules = header.modules or old.modules
        return dataclasses.replace(header, run_id=old.run_id, created=old.created, modules=modules)

    def _prepare(self, resume_at: int | None) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_at is None and self.folder.exists():
            shutil.rmtree(self.folder)
        self.path.unlink(missing_ok=True)  # also on resuming: if this process is killed, the folder knows more than it
        self.folder.mkdir(exist_ok=True)
        self._save_state("running", None, {})
        self._events = (self.folder / EVENTS_FILE).open("a", encoding="utf-8")
        self._events.write("\n" if self._events.tell() else "")  # ends a line that a killed run may have cut off
        if self._tensorboard is not None:
            self._tensorboard.open(fresh=resume_at is None)
        if resume_at is not None:
            self.event(resume_at, RESUME, f"resumed at step {resume_at}", files=self._next_file())

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish("completed")
            return
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        try:
            self.finish(status, error=None if status == "interrupted" else f"{type(error).__name__}: {error}")
        except (OSError, UserError) as second:  # must not hide the first
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
        rows = np.asarray(steps, dtype=np.int64)
        gone = np.zeros(values.shape, bool) if missing is None else missing
        assert values.shape == gone.shape == (len(rows), len(names)), "steps, names and values differ in length"
        if not len(rows):
            return
        if self._tensorboard is not None:
            self._tensorboard.scalars(rows, names, values, gone)
        if self._stream is None or self._names != list(names):
            values, gone = self._widen(names, values, gone)
        assert self._stream is not None
        self._stream.write(Block(rows, values, gone))

    def _widen(
        self, names: Sequence[str], values: NDArray[np.float32], missing: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Fit rows to the columns of the open stream; a name never seen before starts a new stream that has it too."""
        union = list(dict.fromkeys([*self._names, *names]))
        if self._stream is None or len(union) > len(self._names):
            if self._stream is not None:
                self._stream.close()
            self._names = union
            self._stream = self._open("series", len(union), {"names": json.dumps(union)})
        into = [self._names.index(name) for name in names]
        wide = np.full((len(values), len(self._names)), np.nan, np.float32)
        gone = np.ones(wide.shape, bool)
        wide[:, into] = values
        gone[:, into] = missing
        return wide, gone

    def _open(self, kind: str, width: int, metadata: Mapping[str, str]) -> BlockStream:
        return BlockStream(self.folder / f"{self._next_file():06d}-{kind}.arrow", width, metadata)

    def _next_file(self) -> int:
        return max(map(file_number, self.folder.glob("*.arrow")), default=-1) + 1

    def append_histogram(self, name: str, steps: ArrayLike, counts: ArrayLike, edges: ArrayLike) -> None:
        """Append counts of one step (B,) or of R steps (R, B) over bins with edges (B + 1,), the same at every step."""
        rows = np.atleast_1d(np.asarray(steps, dtype=np.int64))
        table = np.atleast_2d(np.asarray(counts, dtype=np.float32))
        limits = np.asarray(edges, dtype=np.float64)
        assert table.shape == (len(rows), len(limits) - 1), "steps, counts and edges differ in length"
        if name not in self._histograms:
            metadata = {"histogram": name, "edges": json.dumps(limits.tolist())}
            self._histograms[name] = self._open("histogram", table.shape[1], metadata)
        self._histograms[name].write(Block(rows, table, np.zeros(table.shape, bool)))
        if self._tensorboard is not None:
            self._tensorboard.histogram(name, rows, table, limits)

    def event(self, step: int | None, kind: str, message: str, **data: Any) -> None:
        """Record that something happened."""
        self._events.write(codec.dumps(event_to(Event(step, kind, message, data))) + "\n")
        self._events.flush()

    def set_modules(self, modules: Sequence[ModuleInfo]) -> None:
        """Record the modules' execution order, known only after the first forward."""
        self.header = dataclasses.replace(self.header, modules=list(modules))
        self._save_state("running", None, {})

    def finish(self, status: str, error: str | None = None, measures: Mapping[str, Any] | None = None) -> None:
        """Close the record and write run.json. Does nothing the second time.

        Args:
            status: "completed", "interrupted" or "failed".
            error: the error's text, where it failed.
            measures: what was measured over the whole run at full resolution.
        """
        assert status in STATUSES[1:], status
        if self._finished:
            return
        self._finished = True
        self._events.close()
        for stream in [self._stream, *self._histograms.values()]:
            if stream is not None:
                stream.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._save_state(status, error, measures or {})
        _, text = reduce_record(RecordReader(self.folder))
        write_text(self.path, text)

    def _save_state(self, status: str, error: str | None, measures: Mapping[str, Any]) -> None:
        document = {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "status": status,
            "error": error,
            "measures": codec.encode(measures),
            "header": header_to(self.header),
        }
        write_text(self.folder / HEADER_FILE, codec.dumps(document))


#: Folders that stand beside run.json under its stem: a run.json of such a name would be in the way of its own.
FOLDERS_BESIDE = (".record", ".tensorboard", ".checkpoints")


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
