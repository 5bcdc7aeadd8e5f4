"""What the loader hands out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bifusion_diag.errors import UserError, near_matches
from bifusion_diag.probes.base import Probe, Reading, Schedule, matches
from bifusion_diag.probes.norms import to_float32
from bifusion_diag.probes.outputs import SPARSE_FIELDS

COUNTED = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
MEASURED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # torch.aminmax knows no others


class Field(NamedTuple):
    """The tensors of one name in a batch."""

    tensors: list[Tensor]
    listed: bool  # they come from a list, an entry a scene or an image


class DataProbe(Probe):
    """Reads the batch that ``monitor.step(batch)`` is given: a tensor, or any nesting of mappings, dataclasses, tuples
    and lists of tensors and of numbers.

    A field is named by its path: ``image``, ``targets.boxes``. The entries of the batch itself, where it is a plain
    tuple or list, are named by their place; entries of a list further inside are one a scene, and put together.

    Args:
        fields: name patterns of the fields that are measured.
        labels: of fields that hold class ids, the smallest and the largest id: {"semantic": (0, 199)}.
        ignore: the id of what has no label.

    Raises:
        UserError: at the first batch, which has no field of a name in `labels`; an empty range.
    """

    prefix = "data"
    KEYS: ClassVar[dict[str, str]] = {
        "<field>/min": "smallest value, NaN where one is; missing where there is none",
        "<field>/max": "largest value, likewise",
        "<field>/nonfinite": "number of NaN and infinite values; of floating-point fields",
        "<field>/elements": "number of values",
        "<field>/fewest_rows": "rows of the shortest tensor of a list: 0 is an empty scene",
        "<field>/ignored_share": "of labels: share that is the ignored id; missing where there is no label",
        "<field>/out_of_range": "of labels: number of ids that are neither in their range nor the ignored one",
    }

    def __init__(
        self,
        *,
        fields: Sequence[str] = ("*",),
        labels: Mapping[str, tuple[int, int]] | None = None,
        ignore: int = -1,
        name: str | None = None,
        every: int | Schedule | None = None,
    ) -> None:
        super().__init__(name=name, every=every)
        self.fields = tuple(fields)
        self.labels = dict(labels or {})
        self.ignore = ignore
        for field, (low, high) in self.labels.items():
            if low > high:
                raise UserError(
                    f"data: labels[{field!r}] = ({low}, {high}) holds no id; give the smallest, the largest"
                )
        self._labels_found = not self.labels

    def begin(self) -> None:
        self._on_host: dict[str, float | None] = {}  # None: missing
        self._on_device: dict[str, Tensor] = {}  # () each

    def batch(self, batch: Any) -> None:
        found = fields_of(batch)
        if not self._labels_found:
            for name in self.labels:
                if name not in found:
                    raise UserError(f"data: the batch has no field {name!r} for labels.{near_matches(name, found)}")
            self._labels_found = True
        for name, field in found.items():
            if matches(name, self.fields):
                self._measure(name, field)

    def collect(self) -> Iterator[Reading]:
        for kept in (self._on_host, self._on_device):
            names = tuple(f"{self.name}/{key}" for key in kept)
            if kept is self._on_host and kept:
                values = torch.tensor([value or 0.0 for value in self._on_host.values()], dtype=torch.float64)
                gone = np.asarray([value is None for value in self._on_host.values()])
                yield Reading(names, to_float32(values), missing=gone)
            elif kept:
                scalars = list(self._on_device.values())
                yield Reading(names, to_float32(torch.stack([s.to(scalars[0].device).double() for s in scalars])))

    def _measure(self, name: str, field: Field) -> None:
        elements = sum(tensor.numel() for tensor in field.tensors)
        self._on_host[f"{name}/elements"] = float(elements)
        if field.listed:
            rows = [len(tensor) for tensor in field.tensors if tensor.ndim]
            self._on_host[f"{name}/fewest_rows"] = float(min(rows)) if rows else None
        known = [tensor.detach() for tensor in field.tensors if tensor.dtype in (*COUNTED, *MEASURED)]
        full = [tensor for tensor in known if tensor.numel()]
        if known:
            self._extremes(name, full, floating=known[0].is_floating_point())
        if name in self.labels:
            low, high = self.labels[name]
            ignored = [(tensor == self.ignore).sum() for tensor in full]
            strange = [(((t < low) | (t > high)) & (t != self.ignore)).sum() for t in full]
            self._keep(f"{name}/ignored_share", torch.stack(ignored).sum() / elements if full else None)
            self._keep(f"{name}/out_of_range", torch.stack(strange).sum() if full else None)

    def _extremes(self, name: str, tensors: list[Tensor], *, floating: bool) -> None:
        pairs = [torch.aminmax(tensor) for tensor in tensors]
        lows, highs = [pair.min for pair in pairs], [pair.max for pair in pairs]
        self._keep(f"{name}/min", torch.stack(lows).amin() if lows else None)
        self._keep(f"{name}/max", torch.stack(highs).amax() if highs else None)
        if floating:
            # Counting costs many times the extremes; on a CPU these tell for free whether there is anything to count.
            counts = [
                (~tensor.isfinite()).sum()
                for tensor, pair in zip(tensors, pairs, strict=True)
                if tensor.device.type != "cpu" or not (pair.min.isfinite() and pair.max.isfinite())
            ]
            self._keep(f"{name}/nonfinite", torch.stack(counts).sum() if counts else torch.zeros(()))

    def _keep(self, key: str, value: Tensor | None) -> None:
        if value is None:
            self._on_host[key] = None
        elif value.device.type == "cpu":
            self._on_host[key] = float(value)
        else:
            self._on_device[key] = value


def fields_of(batch: Any) -> dict[str, Field]:
    """The tensors in a batch by name; lists of plain numbers count as tensors on the host."""
    found: dict[str, Field] = {}

    def walk(item: Any, name: str, listed: bool, depth: int) -> None:
        if isinstance(item, (list, tuple)) and item and all(type(entry) in (int, float) for entry in item):
            item = torch.tensor(item)
        if isinstance(item, Tensor):
            field = found.setdefault(name or "batch", Field([], listed))
            field.tensors.append(item.coalesce().values() if item.layout == torch.sparse_coo else item)
        elif depth and (parts := _named_parts(item)) is not None:
            for key, part in parts:
                walk(part, f"{name}.{key}" if name else key, listed, depth - 1)
        elif depth and isinstance(item, (list, tuple)):
            for place, part in enumerate(item):
                walk(part, name or str(place), listed or bool(name), depth - 1)

    walk(batch, "", False, 6)
    return found


def _named_parts(item: Any) -> list[tuple[str, Any]] | None:
    """The parts of what has names for them."""
    if isinstance(item, Mapping):
        return [(str(key), part) for key, part in item.items()]
    if isinstance(item, tuple) and hasattr(item, "_asdict"):
        return list(item._asdict().items())
    if field := next((name for name in SPARSE_FIELDS if isinstance(getattr(item, name, None), Tensor)), None):
        return [(field, getattr(item, field))]
    if dataclasses.is_dataclass(item):
        return [(field.name, getattr(item, field.name)) for field in dataclasses.fields(item)]
    return None
