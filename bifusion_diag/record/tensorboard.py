"""The same numbers as TensorBoard events, written with the tensorboard package alone."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

from bifusion_diag.record.append import AppendFile
from bifusion_diag.record.crc32c import crc32c
from bifusion_diag.record.schema import Floats, Ints

EVERY_STEP = ("loss/", "train/")


class TensorBoardSink:
    """Writes scalars and histograms under the record's own names.

    The losses and the loop's scalars are written at every step, of all other series the last value of a block:
    TensorBoard spends about 60 bytes on a number, which would soon make its file many times the record.

    Every method raises OSError where the file cannot be written.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._file: AppendFile | None = None
        self._resumed = False

    def open(self, *, fresh: bool) -> None:
        """Start a file of events. A fresh run first removes those of the run that lay there before.

        Where a resumed run repeats steps, what was written of them, and after them, before the interruption is void.
        """
        self._resumed = not fresh
        if fresh:
            for old in self.folder.glob("events.out.tfevents.*"):
                old.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        number = len(list(self.folder.glob("events.out.tfevents.*")))
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{number}"
        self._file = AppendFile(self.folder / name)
        self._write([Event(wall_time=time.time(), file_version="brain.Event:2")])

    def scalars(
        self, steps: Ints, names: Sequence[str], values: NDArray[np.float32], missing: NDArray[np.bool_]
    ) -> None:
        """Write a block: values (R, C), missing (R, C)."""
        shown = np.zeros(missing.shape, bool)
        last = len(steps) - 1 - np.argmax(~missing[::-1], axis=0)
        shown[last, np.arange(len(names))] = True
        shown[:, [i for i, name in enumerate(names) if name.startswith(EVERY_STEP)]] = True
        shown &= ~missing
        events: list[Event] = []
        for row, step in enumerate(steps.tolist()):
            columns = np.flatnonzero(shown[row])
            pairs = zip(columns.tolist(), values[row, columns].tolist(), strict=True)
            summary = Summary(value=[Summary.Value(tag=names[i], simple_value=value) for i, value in pairs])
            events += self._events(step, summary)
        self._write(events)

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
        self._write(self._events(int(steps[-1]), Summary(value=[Summary.Value(tag=name, histo=histogram)])))

    def _events(self, step: int, summary: Summary) -> list[Event]:
        if not summary.value:
            return []
        events = [Event(wall_time=time.time(), step=step, summary=summary)]
        if self._resumed:
            self._resumed = False
            events.insert(0, Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        return events

    def _write(self, events: Sequence[Event]) -> None:
        assert self._file is not None, "the sink is not open"
        self._file.write(b"".join(_framed(event.SerializeToString()) for event in events))

    def close(self) -> None:
        """Close. Closing twice is fine."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _framed(data: bytes) -> bytes:
    """A record of TensorFlow's format: length, its checksum, the data, their checksum."""
    length = struct.pack("<Q", len(data))
    return length + _checksum(length) + data + _checksum(data)


def _checksum(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)
