"""Rows of numbers on the device, brought to the host and to the writer a block at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bifusion_diag.errors import UserError
from bifusion_diag.probes.base import Reading
from bifusion_diag.record import RunWriter


class Row(NamedTuple):
    """A finished step. Device values come first in the order of readings, then device logs; host logs are apart."""

    step: int
    readings: Sequence[Reading]
    packed: Tensor  # (n,) float32 on the device
    logged: tuple[str, ...]  # names of the loop's own tensors, at the end of `packed`
    host: dict[str, float]  # the loop's own floats


class HostRow(NamedTuple):
    """A row on the host: its scalars."""

    step: int
    names: tuple[str, ...]
    values: NDArray[np.float32]
    missing: NDArray[np.bool_]


def pack(step: int, readings: Sequence[Reading], logs: dict[str, float | Tensor]) -> Row:
    """Put all numbers of a step into one vector on the device. No synchronisation."""
    tensors = {name: value.detach() for name, value in logs.items() if isinstance(value, Tensor)}
    host = {name: value for name, value in logs.items() if not isinstance(value, Tensor)}
    parts = [reading.values for reading in readings] + [tensor.reshape(1).float() for tensor in tensors.values()]
    devices = [part.device for part in parts if part.device.type != "cpu"]
    device = devices[0] if devices else torch.device("cpu")
    packed = torch.cat([part.to(device, non_blocking=True) for part in parts]) if parts else torch.zeros(0)
    return Row(step, readings, packed, tuple(tensors), host)


class RowBlock:
    """Up to `size` rows, then written with one copy from the device.

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
        self._rows: list[Row] = []
        self._latest: Row | None = None
        self._checked: set[tuple[str, ...]] = set()

    def add(self, row: Row) -> None:
        """Add a row; a full or an old block is written."""
        self._latest = row
        if self._writer is not None:
            self._rows.append(row)
            if len(self._rows) >= self._size or time.monotonic() - self._written >= self._seconds:
                self.flush()

    def flush(self) -> None:
        """Write what is there."""
        rows, self._rows = self._rows, []
        self._written = time.monotonic()
        if self._writer is None or not rows:
            return
        flat = _to_host(torch.cat([row.packed for row in rows]))
        hosts: list[HostRow] = []
        histograms: dict[str, tuple[list[int], list[NDArray[np.float32]], tuple[float, ...]]] = {}
        offset = 0
        for row in rows:
            values = flat[offset : offset + len(row.packed)]
            offset += len(row.packed)
            hosts.append(_scalars(row, values))
            for reading, counts in _histograms(row, values):
                steps, table, _ = histograms.setdefault(reading.names[0], ([], [], reading.edges or ()))
                steps.append(row.step)
                table.append(counts)
        start = 0
        for i in range(1, len(hosts) + 1):  # runs of rows that have the same names
            if i == len(hosts) or hosts[i].names != hosts[start].names:
                self._write(hosts[start:i])
                start = i
        for name, (steps, table, edges) in histograms.items():
            self._writer.append_histogram(name, steps, np.stack(table), edges)

    def _write(self, rows: list[HostRow]) -> None:
        assert self._writer is not None
        names = rows[0].names
        if names not in self._checked:
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise UserError(f"recorded twice in one step: {', '.join(twice)}. Use another name.")
            self._checked.add(names)
        values, missing = np.stack([row.values for row in rows]), np.stack([row.missing for row in rows])
        self._writer.append_block([row.step for row in rows], names, values, missing)

    def latest(self) -> dict[str, float | None]:
        """The scalars of the last row; None where missing. Copies them to the host."""
        if self._latest is None:
            return {}
        row = _scalars(self._latest, _to_host(self._latest.packed))
        pairs = zip(row.names, row.values.tolist(), row.missing.tolist(), strict=True)
        return {name: None if gone else value for name, value, gone in pairs}


def _to_host(packed: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = packed.cpu().numpy()
    return array


def _scalars(row: Row, values: NDArray[np.float32]) -> HostRow:
    names: list[str] = []
    parts: list[NDArray[np.float32]] = []
    masks: list[NDArray[np.bool_]] = []
    offset = 0
    for reading in row.readings:
        part = values[offset : offset + len(reading.values)]
        offset += len(part)
        if reading.edges is None:
            names.extend(reading.names)
            parts.append(part)
            mask = np.isnan(part) if reading.nan_is_missing else reading.missing
            masks.append(np.zeros(len(part), bool) if mask is None else mask)
    names.extend([*row.logged, *row.host])
    parts += [values[offset:], np.asarray(list(row.host.values()), dtype=np.float32)]
    masks.append(np.zeros(len(row.logged) + len(row.host), bool))
    return HostRow(row.step, tuple(names), np.concatenate(parts), np.concatenate(masks))


def _histograms(row: Row, values: NDArray[np.float32]) -> list[tuple[Reading, NDArray[np.float32]]]:
    found: list[tuple[Reading, NDArray[np.float32]]] = []
    offset = 0
    for reading in row.readings:
        if reading.edges is not None:
            found.append((reading, values[offset : offset + len(reading.values)]))
        offset += len(reading.values)
    return found
