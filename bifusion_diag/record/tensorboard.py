"""The same numbers as TensorBoard events, written with the tensorboard package alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from bifusion_diag.record.schema import Floats, Ints

EVERY_STEP = ("loss/", "train/")


class TensorBoardSink:
    """Writes scalars and histograms under the record's own names.

    The losses and the loop's scalars are written at every step, all other series once a block: TensorBoard spends about
    60 bytes on a number, which would soon make its file many times the record.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._writer: EventFileWriter | None = None
        self._resumed = False

    def open(self, *, fresh: bool) -> None:
        """Start a file of events. A fresh run first removes those of the run that lay there before.

        Where a resumed run repeats steps, what was written of them, and after them, before the interruption is void.
        """
        self._resumed = not fresh
        if fresh:
            for old in self.folder.glob("events.out.tfevents.*"):
                old.unlink()
        self._writer = EventFileWriter(str(self.folder))

    def scalars(
        self, steps: Ints, names: Sequence[str], values: NDArray[np.float32], missing: NDArray[np.bool_]
    ) -> None:
        """Write a block: values (R, C), missing (R, C)."""
        every = [i for i, name in enumerate(names) if name.startswith(EVERY_STEP)]
        for row, step in enumerate(steps):
            columns = every if row < len(steps) - 1 else range(len(names))
            summary = Summary()
            for i in columns:
                if not missing[row, i]:
                    summary.value.add(tag=names[i], simple_value=float(values[row, i]))
            self._add(int(step), summary)

    def histogram(self, name: str, steps: Ints, counts: NDArray[np.float32], edges: Floats) -> None:
        """Write the last histogram of a block: counts (R, B), edges (B + 1,)."""
        bins = counts[-1].astype(np.float64)
        middle = (edges[1:] + edges[:-1]) / 2
        filled = np.flatnonzero(bins)
        low, high = (edges[filled[0]], edges[filled[-1] + 1]) if len(filled) else (edges[0], edges[-1])
        histogram = HistogramProto(
            min=low,
            max=high,
            num=bins.sum(),
            sum=float(bins @ middle),
            sum_squares=float(bins @ middle**2),
            bucket_limit=edges[1:].tolist(),
            bucket=bins.tolist(),
        )
        self._add(int(steps[-1]), Summary(value=[Summary.Value(tag=name, histo=histogram)]))

    def _add(self, step: int, summary: Summary) -> None:
        assert self._writer is not None, "the sink is not open"
        if not summary.value:
            return
        if self._resumed:
            self._resumed = False
            self._writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        """Flush and close. Closing twice is fine."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
