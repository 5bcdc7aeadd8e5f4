"""TensorBoard: a folder's ``events.out.tfevents.*``, of PyTorch's SummaryWriter, of TensorFlow, or of our own runs.

Read record by record with the tensorboard package's messages. Its EventAccumulator gives the same numbers, at a tenth
of the speed, and holds all of them as objects.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary

from bifusion_diag.record.crc32c import crc32c
from bifusion_diag.record.importers.names import is_ours
from bifusion_diag.record.importers.source import Raw, Segment, Smoothing
from bifusion_diag.record.schema import RecordError

FORMAT = "TensorBoard"
MAX_EVENT = 256 << 20  # bytes of one record: images are the largest
_FLOAT, _DOUBLE, _INT32, _INT64, _HALF = 1, 2, 3, 9, 19  # tensorboard.compat.proto.types_pb2.DataType


def read(path: Path, name: str, files: Sequence[Path]) -> Raw:
    """Read the event files of one folder, in the order of their names, which is that of time."""
    raw = Raw(FORMAT, path, name, [], list(files))
    began: float | None = None
    for file in files:
        segment = Segment(file.name)
        for event in events(file, raw):
            began = event.wall_time if began is None else began
            if event.HasField("session_log") and event.session_log.status == SessionLog.START and segment.values:
                raw.segments.append(segment)  # within one file, a process went on
                segment = Segment(f"{file.name} from step {event.step}")
            for value in event.summary.value if event.HasField("summary") else ():
                number = scalar(value)
                if number is not None:
                    segment.add(event.step, {value.tag: number}, training=not value.tag.lower().startswith("val"))
        if segment.values:
            raw.segments.append(segment)
    if began is not None and 0 < began < 1e11:
        raw.created = datetime.fromtimestamp(began, timezone.utc).isoformat(timespec="seconds")
    if is_ours(name for segment in raw.segments for name in segment.columns()):
        raw.smoothing = Smoothing(1, "the values of single steps, as bifusion-diag writes them")
        raw.norm = "before clipping"
    return raw


def events(path: Path, raw: Raw) -> Iterator[Event]:
    """The events of a file, up to its end or to a record that is cut off or damaged, which is counted."""
    try:
        with path.open("rb") as file:
            while head := file.read(12):
                size = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else MAX_EVENT + 1
                if size > MAX_EVENT:
                    raw.skipped += 1
                    return
                data = file.read(size + 4)
                if len(data) < size + 4:
                    raw.skipped += 1
                    return
                try:
                    yield Event.FromString(data[:-4])
                except DecodeError:
                    raw.skipped += 1
                    if _masked(head[:8]) != head[8:]:  # not even its length is right: what follows has no beginning
                        return
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror}).") from error


def scalar(value: Summary.Value) -> float | None:
    """The number of a summary; None of what is none (histograms, images, text)."""
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if not value.HasField("tensor") or len(value.tensor.tensor_shape.dim):
        return None
    tensor = value.tensor
    for numbers in (tensor.float_val, tensor.double_val, tensor.int_val, tensor.int64_val):
        if len(numbers) == 1:
            return float(numbers[0])
    kinds = {_FLOAT: "<f4", _DOUBLE: "<f8", _INT32: "<i4", _INT64: "<i8", _HALF: "<f2"}
    kind = kinds.get(tensor.dtype)
    if kind is not None and len(tensor.tensor_content) == np.dtype(kind).itemsize:
        return float(np.frombuffer(tensor.tensor_content, kind)[0])
    return None


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)
