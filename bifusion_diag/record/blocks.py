"""Blocks of rows on disk: append-only Arrow IPC streams that a killed process leaves readable.

A file holds one table: ``step`` (int64) and ``values`` (a float32 vector; null = missing). One row is one step. The
names of the vector's entries are in the schema's metadata, so another set of columns is another file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bifusion_diag.record.schema import Ints


class Block(NamedTuple):
    """Rows of one batch. R rows, C columns."""

    steps: Ints  # (R,)
    values: NDArray[np.float32]  # (R, C), NaN where missing
    missing: NDArray[np.bool_]  # (R, C)


class BlockStream:
    """Writes one file. Every block is flushed to the operating system before the call returns."""

    def __init__(self, path: Path, width: int, metadata: Mapping[str, str]) -> None:
        self._schema = pa.schema(
            [pa.field("step", pa.int64()), pa.field("values", pa.list_(pa.float32(), width))], metadata=dict(metadata)
        )
        self._file = path.open("xb")
        # Compression: entries that stay the same from row to row (states, frozen parts) then cost next to nothing.
        self._writer = pa.ipc.new_stream(self._file, self._schema, options=pa.ipc.IpcWriteOptions(compression="lz4"))
        self._file.flush()

    def write(self, block: Block) -> None:
        """Append a block."""
        flat = pa.array(block.values.reshape(-1), mask=block.missing.reshape(-1) if block.missing.any() else None)
        values = pa.FixedSizeListArray.from_arrays(flat, type=self._schema.field("values").type)
        batch = pa.record_batch([pa.array(block.steps, pa.int64()), values], schema=self._schema)
        self._writer.write_batch(batch)
        self._file.flush()

    def close(self) -> None:
        """Write the end mark and close the file."""
        self._writer.close()
        self._file.close()


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
            raw = self._reader.schema.metadata or {}
            self.metadata = {key.decode(): value.decode() for key, value in raw.items()}

    def __enter__(self) -> BlockFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._source.close()

    def __iter__(self) -> Iterator[Block]:
        while self._reader is not None:
            try:
                batch = self._reader.read_next_batch()
            except StopIteration:
                return
            except (pa.ArrowException, OSError):
                self.truncated = True
                return
            rows = batch.num_rows
            flat = batch.column(1).flatten()
            missing = np.asarray(flat.is_null().to_numpy(zero_copy_only=False), dtype=bool).reshape(rows, -1)
            values = flat.to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(rows, -1)
            yield Block(batch.column(0).to_numpy(), values, missing)
