"""Blocks of rows on disk: append-only Arrow IPC streams that a killed process leaves readable.

A file holds one table; one of its rows is one block of R steps and C columns:

- ``steps`` (list of R int64),
- ``missing`` (binary): R · C bits, series after series, 1 = missing; null where nothing is,
- ``values`` (binary): the float32 values that are not missing, series after series, as four planes: the lowest bytes
  of all of them, then the second, the third and the highest ones. The highest bytes, sign and most of the exponent,
  repeat themselves from step to step; apart from the noise of the lower ones, zstd packs them to a fraction.

The columns' names and their number (``width``) are in the schema's metadata, so another set of columns is another file.
Files of schema version 1 hold a row a step instead: ``step`` and ``values``, a fixed-size list of float32.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bifusion_diag.record.append import AppendFile
from bifusion_diag.record.schema import Ints

_FIELDS = [pa.field("steps", pa.list_(pa.int64())), pa.field("missing", pa.binary()), pa.field("values", pa.binary())]


class Block(NamedTuple):
    """Rows of one batch. R rows, C columns."""

    steps: Ints  # (R,)
    values: NDArray[np.float32]  # (R, C), NaN where missing
    missing: NDArray[np.bool_]  # (R, C)


class BlockStream:
    """Writes one file. Every block is handed to the operating system, whole, before the call returns.

    Raises:
        OSError: the file cannot be begun; there is none then.
    """

    def __init__(self, path: Path, width: int, metadata: Mapping[str, str]) -> None:
        self._schema = pa.schema(_FIELDS, metadata={**metadata, "width": str(width)})
        self._buffer = io.BytesIO()
        # Level 1 packs the planes as well as any. No threads: they would be taken from the training.
        options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1), use_threads=False)
        self._writer = pa.ipc.new_stream(self._buffer, self._schema, options=options)
        head = _head(self._schema)
        self._written = len(head)  # of what is in the buffer: Arrow writes the head with the first batch
        self._file = AppendFile(path)
        assert not self._file.size, f"{path} is there already"
        try:
            self._file.write(head)
        except OSError:
            self._file.close()
            path.unlink(missing_ok=True)
            raise

    def write(self, block: Block) -> None:
        """Append a block.

        Raises:
            OSError: it cannot be written; the file is as it was before.
        """
        columns = [
            pa.array([block.steps], _FIELDS[0].type),
            pa.array([_pack_missing(block.missing)], pa.binary()),
            pa.array([_pack_values(block)], pa.binary()),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._append()

    def close(self) -> None:
        """Write the end mark where there is room for it, and close the file. Closing twice is fine."""
        if not self._buffer.closed:
            self._writer.close()
            with contextlib.suppress(OSError):  # a file without an end mark is read alike
                self._append()
            self._buffer.close()
            self._file.close()

    def _append(self) -> None:
        piece = self._buffer.getvalue()[self._written :]
        self._written = 0
        self._buffer.seek(0)
        self._buffer.truncate()
        self._file.write(piece)


def _head(schema: pa.Schema) -> bytes:
    empty = io.BytesIO()
    pa.ipc.new_stream(empty, schema).close()
    return empty.getvalue().removesuffix(b"\xff\xff\xff\xff\0\0\0\0")  # the end mark


def _pack_missing(missing: NDArray[np.bool_]) -> bytes | None:
    return np.packbits(missing.T).tobytes() if missing.any() else None


def _pack_values(block: Block) -> bytes:
    by_series = block.values.T
    present = by_series[~block.missing.T] if block.missing.any() else np.ascontiguousarray(by_series).reshape(-1)
    return present.astype("<f4", copy=False).view(np.uint8).reshape(-1, 4).T.tobytes()


def _unpack(batch: pa.RecordBatch, width: str | None, columns: Ints | None = None) -> Block:
    """A block, of all columns or of those chosen."""
    if width is None:
        return _unpack_version_1(batch, columns)
    steps = batch.column(0)[0].values.to_numpy()
    bits, raw = (batch.column(i)[0].as_buffer() for i in (1, 2))
    planes = np.frombuffer(raw, np.uint8).reshape(4, -1)
    every = (int(width), len(steps))
    chosen = slice(None) if columns is None else columns
    if bits is None:
        values = _floats(planes.reshape(4, *every)[:, chosen])
        return Block(steps, values.T, np.zeros(values.shape, bool).T)
    gone = np.unpackbits(np.frombuffer(bits, np.uint8), count=every[0] * every[1]).astype(bool).reshape(every)
    missing = gone[chosen]
    place = (np.cumsum(~gone) - 1).reshape(every)[chosen]  # among the values that are there
    values = np.full(missing.shape, np.nan, np.float32)
    values[~missing] = _floats(planes[:, place[~missing]])
    return Block(steps, values.T, missing.T)


def _floats(planes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Four planes (4, ...) as numbers (...)."""
    numbers: NDArray[np.float32] = np.moveaxis(planes, 0, -1).copy().view("<f4")[..., 0].astype(np.float32, copy=False)
    return numbers


def _unpack_version_1(batch: pa.RecordBatch, columns: Ints | None) -> Block:
    flat = batch.column(1).flatten()
    missing = np.asarray(flat.is_null().to_numpy(zero_copy_only=False), dtype=bool).reshape(batch.num_rows, -1)
    values = flat.to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(batch.num_rows, -1)
    chosen = slice(None) if columns is None else columns
    return Block(batch.column(0).to_numpy(), values[:, chosen], missing[:, chosen])


def _metadata(schema: pa.Schema) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}


class BlockFile:
    """Reads one file, up to its end or to a batch that was cut off."""

    def __init__(self, path: Path) -> None:
        self._source = pa.OSFile(str(path), "rb")
        self.truncated = False
        self.metadata: dict[str, str] = {}
        self._reader: pa.ipc.RecordBatchStreamReader | None = None
        try:
            self._reader = pa.ipc.open_stream(self._source)
        except (pa.ArrowException, OSError):  # killed before the file's first bytes were written
            self.truncated = True
        else:
            self.metadata = _metadata(self._reader.schema)

    def __enter__(self) -> BlockFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._source.close()

    def __iter__(self) -> Iterator[Block]:
        return self.blocks()

    def blocks(self, columns: Ints | None = None) -> Iterator[Block]:
        """The blocks, of all columns or of those chosen, in their order: of a few, each is read in a fraction."""
        while self._reader is not None:
            try:
                batch = self._reader.read_next_batch()
                block = _unpack(batch, self.metadata.get("width"), columns)
            except StopIteration:
                return
            except (pa.ArrowException, OSError, ValueError):
                self.truncated = True
                return
            yield block


class BlockTail:
    """Reads a file that another process may still be writing, block by block as they come.

    Attributes:
        metadata: of the schema; empty until the file's head is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self._schema: pa.Schema | None = None
        self._end = 0  # of the last whole message

    def update(self) -> list[int]:
        """Places of the blocks that have become whole since the last call. Their contents are not read.

        Raises:
            OSError: the file cannot be opened.
        """
        places: list[int] = []
        with self.path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            while self._end < size and (length := _message_size(file, self._end)) and self._end + length <= size:
                if self._schema is None:
                    self._schema = pa.ipc.read_schema(pa.BufferReader(_read(file, 0, length)))
                    self.metadata = _metadata(self._schema)
                else:
                    places.append(self._end)
                self._end += length
        return places

    def block(self, place: int) -> Block | None:
        """The block at a place; None where it is damaged, or the file is gone."""
        try:
            with pa.OSFile(str(self.path), "rb") as source:
                source.seek(place)
                batch = pa.ipc.read_record_batch(pa.ipc.read_message(source), self._schema)
            return _unpack(batch, self.metadata.get("width"))
        except (pa.ArrowException, OSError, EOFError, ValueError):
            return None


def _read(file: io.FileIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _message_size(file: io.FileIO, offset: int) -> int:
    """Bytes of the message of an Arrow stream that begins at ``offset``; 0: none does, or its beginning is cut off.

    Arrow's encapsulated message format: four bytes 0xff, the size of the metadata (int32), the metadata, the body. The
    metadata are a flatbuffer whose root table has the size of the body (int64) as its fourth field.
    """
    head = _read(file, offset, 1024)
    if len(head) < 8 or head[:4] != b"\xff\xff\xff\xff":
        return 0
    (length,) = struct.unpack_from("<i", head, 4)
    metadata = head[8 : 8 + length] if 8 + length <= len(head) else _read(file, offset + 8, length)
    if length <= 0 or len(metadata) < length:  # the end mark has none
        return 0
    (table,) = struct.unpack_from("<I", metadata)
    vtable = table - struct.unpack_from("<i", metadata, table)[0]
    fields = (struct.unpack_from("<H", metadata, vtable)[0] - 4) // 2
    place = struct.unpack_from("<H", metadata, vtable + 4 + 2 * 3)[0] if fields > 3 else 0
    body = struct.unpack_from("<q", metadata, table + place)[0] if place else 0
    return 8 + length + int(body)
