"""Rows of numbers on the device, brought to the host and to the writer a block at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bifusion_diag.errors import UserError
from bifusion_diag.probes.base import Reading
from bifusion_diag.record import HistogramRows, Rows, RunWriter

MAX_LAYOUTS = 16  # that are remembered: probes with schedules of their own take turns


class Row(NamedTuple):
    """A finished step. Device values come first in the order of readings, then device logs; host logs are apart."""

    step: int
    readings: Sequence[Reading]
    packed: Tensor  # (n,) float32 on the device
    logged: tuple[str, ...]  # names of the loop's own tensors, at the end of `packed`
    host: dict[str, float]  # the loop's own floats


def pack(step: int, readings: Sequence[Reading], logs: dict[str, float | Tensor]) -> Row:
    """Put all numbers of a step into one vector on the device. No synchronisation."""
    tensors = {name: value.detach() for name, value in logs.items() if isinstance(value, Tensor)}
    host = {name: value for name, value in logs.items() if not isinstance(value, Tensor)}
    parts = [reading.values for reading in readings] + [tensor.reshape(1).float() for tensor in tensors.values()]
    devices = [part.device for part in parts if part.device.type != "cpu"]
    device = devices[0] if devices else torch.device("cpu")
    packed = torch.cat([part.to(device, non_blocking=True) for part in parts]) if parts else torch.zeros(0)
    return Row(step, readings, packed, tuple(tensors), host)


class Layout:
    """Which number of a row is what. Rows of the same readings have the same one, so that names are looked at once.

    Attributes:
        names: of the C scalars: of readings, then the loop's tensors, then its floats.

    Raises:
        UserError: a name occurs twice.
    """

    def __init__(self, row: Row) -> None:
        self._key = _key(row)
        self.histograms: list[tuple[str, slice, tuple[float, ...]]] = []
        self._nan_is_missing: list[slice] = []  # columns
        self._columns: list[slice | None] = []  # of each reading; None: a histogram
        names: list[str] = []
        places: list[NDArray[np.int64]] = []  # in the packed vector, of each column
        offset = 0
        for reading in row.readings:
            here = slice(offset, offset := offset + len(reading.values))
            if reading.edges is not None:
                self.histograms.append((reading.names[0], here, reading.edges))
                self._columns.append(None)
                continue
            columns = slice(len(names), len(names) + len(reading.names))
            self._columns.append(columns)
            if reading.nan_is_missing:
                self._nan_is_missing.append(columns)
            names.extend(reading.names)
            places.append(np.arange(here.start, here.stop))
        places.append(np.arange(offset, len(row.packed)))
        self._places = np.concatenate(places) if self.histograms else None
        self.names = [*names, *row.logged, *row.host]
        if len(set(self.names)) < len(self.names):
            twice = sorted({name for name in self.names if self.names.count(name) > 1})
            raise UserError(f"recorded twice in one step: {', '.join(twice)}. Use another name.")

    def fits(self, row: Row) -> bool:
        """Whether the row's numbers are these."""
        return self._key == _key(row)

    def masks(self, row: Row) -> list[tuple[slice, NDArray[np.bool_]]]:
        """What the host knows to be missing: columns, and which of them."""
        pairs = zip(self._columns, row.readings, strict=True)
        return [(columns, r.missing) for columns, r in pairs if columns is not None and r.missing is not None]

    def scalars(
        self, packed: NDArray[np.float32], rows: Sequence[_Kept]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Values (R, C) and which are missing (R, C), of packed rows (R, n)."""
        device = packed if self._places is None else packed[:, self._places]
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite in the record
            host = np.asarray([row.host for row in rows], np.float32).reshape(len(rows), -1)
        values = np.concatenate([device, host], axis=1)
        missing = np.zeros(values.shape, bool)
        for i, row in enumerate(rows):
            for columns, mask in row.masks:
                missing[i, columns] = mask
        for columns in self._nan_is_missing:
            missing[:, columns] |= np.isnan(values[:, columns])
        return values, missing


def _key(row: Row) -> tuple[object, ...]:
    # Names of a reading are mostly the very same tuple at every step: then they are compared in no time.
    readings = [(reading.names, len(reading.values), reading.nan_is_missing, reading.edges) for reading in row.readings]
    return readings, row.logged, tuple(row.host)


class _Kept(NamedTuple):
    """A row without its readings, which would hold their tensors."""

    step: int
    layout: Layout
    packed: Tensor
    masks: list[tuple[slice, NDArray[np.bool_]]]
    host: tuple[float, ...]


class RowBlock:
    """Up to `size` rows, then handed to the writer with one copy from the device. The writer's thread does the rest.

    Args:
        writer: None: rows are only kept as the latest.
        size: rows a block.
        seconds: a block is written after so long even if it is not full: of slow steps, a killed process must not lose
            all of them.
    """

    def __init__(self, writer: RunWriter | None, size: int, seconds: float = 10.0) -> None:
        assert size >= 1
        self._writer = writer
        self._size = size
        self._seconds = seconds
        self._written = time.monotonic()
        self._rows: list[_Kept] = []
        self._latest: Row | None = None
        self._layouts: list[Layout] = []

    def add(self, row: Row) -> None:
        """Add a row; a full or an old block is handed over. Never waits for the device or the disk.

        Raises:
            UserError: a name occurs twice in the row.
        """
        kept = self._keep(row)
        self._latest = row
        if self._writer is not None:
            self._rows.append(kept)
            if len(self._rows) >= self._size or time.monotonic() - self._written >= self._seconds:
                self._hand_over()

    def _keep(self, row: Row) -> _Kept:
        layout = next((layout for layout in self._layouts if layout.fits(row)), None)
        if layout is None:
            layout = Layout(row)
            self._layouts = [layout, *self._layouts[: MAX_LAYOUTS - 1]]
        return _Kept(row.step, layout, row.packed, layout.masks(row), tuple(row.host.values()))

    def flush(self) -> None:
        """Write what is there, and return when it is with the operating system."""
        if self._writer is None:
            return
        self._writer.flush()  # a queue that is full would refuse these rows, and whoever flushes can wait
        self._hand_over()
        self._writer.flush()

    def _hand_over(self) -> None:
        rows, self._rows = self._rows, []
        self._written = time.monotonic()
        if self._writer is None or not rows:
            return
        arrive = _to_host([row.packed for row in rows])
        size = 4 * sum(len(row.packed) for row in rows)
        self._writer.append_later([row.step for row in rows], size, lambda: _together(rows, arrive()))

    def latest(self) -> dict[str, float | None]:
        """The scalars of the last row; None where missing. Copies them to the host."""
        if self._latest is None:
            return {}
        kept = self._keep(self._latest)
        values, missing = kept.layout.scalars(kept.packed.cpu().numpy()[None], [kept])
        pairs = zip(kept.layout.names, values[0].tolist(), missing[0].tolist(), strict=True)
        return {name: None if gone else value for name, value, gone in pairs}


def _to_host(packed: Sequence[Tensor]) -> Callable[[], list[NDArray[np.float32]]]:
    """Begin the copy of some vectors to the host; the function returned waits for its end."""
    device = next((part.device for part in packed if part.device.type != "cpu"), None)
    if device is None:
        return lambda: [part.numpy() for part in packed]
    flat = torch.cat([part.to(device, non_blocking=True) for part in packed])
    ends = np.cumsum([len(part) for part in packed])[:-1]
    if device.type != "cuda":
        array = flat.cpu().numpy()
        return lambda: np.split(array, ends)
    host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
    host.copy_(flat, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(device))

    def arrive() -> list[NDArray[np.float32]]:
        copied.synchronize()
        return np.split(host.numpy(), ends)

    return arrive


def _together(rows: Sequence[_Kept], packed: Sequence[NDArray[np.float32]]) -> Rows:
    """The rows of a block as one table. Series that a row does not have are missing there."""
    steps = np.asarray([row.step for row in rows], np.int64)
    layouts = list(dict.fromkeys(row.layout for row in rows))
    names = layouts[0].names if len(layouts) == 1 else list(dict.fromkeys(n for one in layouts for n in one.names))
    place = {name: i for i, name in enumerate(names)} if len(layouts) > 1 else {}
    values = np.full((len(rows), len(names)), np.nan, np.float32)
    missing = np.ones(values.shape, bool)
    histograms: dict[str, tuple[list[NDArray[np.int64]], list[NDArray[np.float32]], tuple[float, ...]]] = {}
    for layout in layouts:
        chosen = np.asarray([i for i, row in enumerate(rows) if row.layout is layout])
        table = np.stack([packed[i] for i in chosen])
        found, gone = layout.scalars(table, [rows[i] for i in chosen])
        if len(layouts) == 1:
            values, missing = found, gone
        else:
            into = np.asarray([place[name] for name in layout.names], np.int64)
            values[chosen[:, None], into] = found
            missing[chosen[:, None], into] = gone
        for name, here, edges in layout.histograms:
            at, counts, _ = histograms.setdefault(name, ([], [], edges))
            at.append(steps[chosen])
            counts.append(table[:, here])
    return Rows(
        steps,
        names,
        values,
        missing,
        [
            _in_order(name, np.concatenate(at), np.concatenate(counts), edges)
            for name, (at, counts, edges) in histograms.items()
        ],
    )


def _in_order(
    name: str, steps: NDArray[np.int64], counts: NDArray[np.float32], edges: tuple[float, ...]
) -> HistogramRows:
    order = np.argsort(steps, kind="stable")
    return HistogramRows(name, steps[order], counts[order], np.asarray(edges, np.float64))
