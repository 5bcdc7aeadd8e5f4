"""Ranges of every module's output."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bifusion_diag.probes.base import Call, Probe, Reading, Schedule, Subject
from bifusion_diag.probes.norms import Number, as_tensor, count_nonfinite, flat, row_norms, to_float32
from bifusion_diag.probes.outputs import numbers, raw_tensors
from bifusion_diag.probes.owners import Slots, watched_outputs
from bifusion_diag.probes.ranks import local_part
from bifusion_diag.probes.sampling import SampleRows

RUNS = 128  # of 16 elements each: the sample of an output
SAMPLE = "of at most 2048 elements of each tensor, in runs of 16 evenly spaced"
MARGIN = 0.01  # of the range: an output so near to a limit is saturated
CHUNK = 1 << 16  # elements that stay in a core's cache between the search for the smallest and that for the largest
TURNS = 4  # steps in which all of a large tensor is read
LARGE = TURNS * CHUNK  # elements from which it is large
PART = f"; of a tensor of {LARGE} elements and more on a CPU, every 4th run of {CHUNK}, the next ones at the next step"

KINDS = ("min", "max", "nonfinite", "rms", "zeros")

#: Activations with two limits.
LIMITS: dict[type[nn.Module], tuple[float, float]] = {
    nn.Sigmoid: (0.0, 1.0),
    nn.Hardsigmoid: (0.0, 1.0),
    nn.Softmax: (0.0, 1.0),
    nn.Softmax2d: (0.0, 1.0),
    nn.Softmin: (0.0, 1.0),
    nn.Tanh: (-1.0, 1.0),
    nn.Softsign: (-1.0, 1.0),
}


class ActivationsProbe(Probe):
    """The outputs of all modules without children, of those that own parameters, and of the model's parts (names of at
    most two components). All tensors of an output and all calls of a step are put together; integers and empty tensors
    do not count, of a sparse tensor only what it stores does. A tensor that several modules hand through is measured
    once. What activation checkpointing runs again is not counted again.

    Reading large outputs whole would be most of what all probes may cost on a CPU: every fourth run of elements is
    read, and at the next step those behind them. What is not finite seldom stays in one run, as convolutions,
    normalisations and sums spread it, and the loss and the gradients show it in any case. Half precision, and tensors
    whose memory has gaps, are read whole.

    Limits are those of Sigmoid, Hardsigmoid, Softmax, Softmax2d, Softmin (0, 1), Tanh, Softsign (-1, 1), Hardtanh and
    ReLU6 (their own); other modules have no ``saturated``.

    Args:
        modules: name patterns of the modules that are measured.
        whole: read large outputs whole.
    """

    prefix = "activations"
    KEYS: ClassVar[dict[str, str]] = {
        "<module>/min": f"smallest element; NaN where one is{PART}",
        "<module>/max": f"largest element; NaN where one is{PART}",
        "<module>/nonfinite": "number of NaN and infinite elements; of a large tensor, if min and max meet one",
        "<module>/rms": f"root mean square {SAMPLE}",
        "<module>/zeros": f"share of exact zeros {SAMPLE}",
        "<module>/saturated": f"share within 1 % of the range of a limit {SAMPLE}; only of activations with two limits",
    }

    def __init__(
        self,
        *,
        modules: Sequence[str] = ("*",),
        whole: bool = False,
        name: str | None = None,
        every: int | Schedule | None = None,
    ) -> None:
        super().__init__(name=name, every=every)
        self.modules = tuple(modules)
        self.whole = whole

    def attach(self, subject: Subject) -> None:
        names = watched_outputs(subject, self.modules, leaves=True)
        self._slot = {name: i for i, name in enumerate(names)}
        self._limits = {i: found for i, name in enumerate(names) if (found := limits_of(subject.modules[name]))}
        self._names = tuple(f"{self.name}/{name}/{key}" for key in KINDS for name in names)
        self._saturated_names = tuple(f"{self.name}/{names[i]}/saturated" for i in self._limits)
        self._summing = Slots()
        self._constant = self._summing.constant
        # A tensor without values has no range; in a model of such, it stands for one on an accelerator.
        self._meta = any(p.is_meta for p in subject.model.parameters())
        self._samples: dict[torch.device, SampleRows] = {}
        self.begin()

    def watches(self, name: str, module: nn.Module) -> bool:
        return name in self._slot

    def begin(self) -> None:
        # Of each tensor that was measured:
        self._ranges: list[tuple[Number, Number, Number]] = []
        self._sizes: list[int] = []
        self._rows: list[tuple[SampleRows, int]] = []
        # Of each tensor of each call: its module's slot, and which of the measured tensors it is.
        self._slots: list[int] = []
        self._tensors: list[int] = []
        self._known: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}  # by id: a tensor, its version, and which
        for rows in self._samples.values():
            rows.clear()

    def seen(self, call: Call) -> None:
        slot, output = self._slot[call.name], call.output
        known = self._of_relu(call) if type(call.module) is nn.ReLU else None
        for tensor in (output,) if type(output) is Tensor else raw_tensors(output):
            which = self._which(tensor, known)
            if which is not None:
                self._slots.append(slot)
                self._tensors.append(which)

    def _of_relu(self, call: Call) -> tuple[Number, Number, Number] | None:
        """The range of a plain ReLU's output, from that of its input, if this was measured just so and is finite."""
        module: Any = call.module
        if len(call.inputs) != 1 or len(module._forward_hooks) != 1 or "forward" in vars(module):
            return None  # somebody else may have changed the output
        x = call.inputs[0]
        known = self._known.get(id(x))
        if known is None or (tensor := known[0]()) is None or tensor is not x:
            return None
        if known[1] < 0 or tensor._version != known[1] + module.inplace:
            return None
        low, high, nonfinite = self._ranges[known[2]]
        if isinstance(low, Tensor) or isinstance(high, Tensor) or nonfinite:
            return None  # on an accelerator, an infinity that was cut off would have to be asked for
        return max(low, 0.0), max(high, 0.0), 0.0

    def _which(self, tensor: Tensor, ranges: tuple[Number, Number, Number] | None) -> int | None:
        """Measure a tensor, unless that was done and it has not been changed since. Its range may be known."""
        version = -1 if tensor.is_inference() else tensor._version
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == version >= 0:
            return known[2]
        x = numbers(local_part(tensor)).detach()
        if not x.is_floating_point() or not x.numel() or (x.is_meta and not self._meta):
            return None
        which = len(self._ranges)
        self._ranges.append(ranges or range_of(x, None if self.whole else self.turn % TURNS))
        self._sizes.append(x.numel())
        rows = self._samples.get(x.device) or self._samples.setdefault(x.device, SampleRows(RUNS, x.device))
        self._rows.append((rows, rows.add(x)))
        self._known[id(tensor)] = weakref.ref(tensor), version, which
        return which

    def collect(self) -> Iterator[Reading]:
        size = len(self._slot)
        missing = np.ones(size, bool)
        missing[self._slots] = False
        values = self._values(size) if self._slots else torch.zeros(len(KINDS), size)
        yield Reading(self._names, values.flatten(), missing=np.tile(missing, len(KINDS)))
        if self._limits:
            gone = missing[list(self._limits)]
            shares = torch.zeros(len(gone)) if gone.all() else self._saturated()
            yield Reading(self._saturated_names, shares, missing=gone)

    def _values(self, size: int) -> Tensor:
        """What is recorded of each module, (KINDS, size) float32."""
        low, high, nonfinite = (as_tensor(column) for column in zip(*self._ranges, strict=True))
        device, first = low.device, dict[int, int]()
        norms: list[Tensor] = []
        zeros: list[Tensor] = []
        for samples in self._samples.values():
            first[id(samples)] = sum(map(len, norms))
            norm, zero = _of_rows(samples.rows, self._constant(samples.lengths, samples.device, torch.float64))
            norms.append(norm.to(device))
            zeros.append(zero.to(device))
        which = self._constant(self._tensors, device)
        rows = self._constant([first[id(samples)] + row for samples, row in self._rows], device)[which]
        share = self._shares(self._slots, self._tensors, size)
        weight = self._constant(share.tolist(), device, torch.float64)
        slots, summing = self._slots, self._summing
        combined = [
            summing.extreme(low[which], slots, size, "amin"),
            summing.extreme(high[which], slots, size, "amax"),
            summing.sum(nonfinite[which], slots, size),
            summing.root_sum_squares(torch.cat(norms)[rows] * weight.sqrt(), slots, size),
            summing.sum(torch.cat(zeros)[rows] * weight, slots, size),
        ]
        return to_float32(torch.stack(combined))

    def _saturated(self) -> Tensor:
        """The share of each module that has limits, float32."""
        position = {slot: i for i, slot in enumerate(self._limits)}
        calls = [(s, t) for s, t in zip(self._slots, self._tensors, strict=True) if s in position]
        share = self._shares([s for s, _ in calls], [t for _, t in calls], len(self._slot))
        total: Tensor | None = None
        for samples in self._samples.values():
            device = samples.device
            here = [i for i, (_, tensor) in enumerate(calls) if self._rows[tensor][0] is samples]
            rows = self._constant([self._rows[calls[i][1]][1] for i in here], device)
            lengths = self._constant(samples.lengths, device)[rows]
            ends = [self._limits[calls[i][0]] for i in here]
            low = self._constant([low + MARGIN * (high - low) for low, high in ends], device, torch.float32)
            high = self._constant([high - MARGIN * (high - low) for low, high in ends], device, torch.float32)
            weight = self._constant([share[i] for i in here], device, torch.float64)
            x = samples.rows[rows]
            near = ((x <= low[:, None]) | (x >= high[:, None])) & samples.inside(lengths)
            slots = [position[calls[i][0]] for i in here]
            part = self._summing.sum(near.float().sum(1) / lengths * weight, slots, len(position))
            total = part if total is None else total + part.to(total.device)
        assert total is not None
        return total.float()

    def _shares(self, slots: Sequence[int], tensors: Sequence[int], size: int) -> NDArray[np.float64]:
        """Of each tensor of each call: its elements' share in all that the module returned."""
        sizes = np.array(self._sizes, dtype=float)[list(tensors)]
        share: NDArray[np.float64] = sizes / np.bincount(slots, sizes, size)[list(slots)]
        return share


def limits_of(module: nn.Module) -> tuple[float, float] | None:
    """Between what an activation's outputs lie; None where it is no such activation."""
    if isinstance(module, nn.Hardtanh):
        return float(module.min_val), float(module.max_val)
    return next((limits for kind, limits in LIMITS.items() if isinstance(module, kind)), None)


def range_of(x: Tensor, turn: int | None = None) -> tuple[Number, Number, Number]:
    """Smallest and largest element, and the number of those that are not finite. On the CPU they are counted only if
    one is met, and of large tensors every fourth run of elements is read, beginning with that of the turn (0..3); all
    where the turn is None."""
    line = flat(x)
    if x.device.type != "cpu":
        low, high = (x.amin(), x.amax()) if line is None else torch.aminmax(line)
        return low, high, count_nonfinite(x)
    if line is None:
        least, most = float(x.amin()), float(x.amax())
    elif x.dtype in (torch.float32, torch.float64):
        least, most = _numpy_range(line.numpy(force=True), turn)
    else:
        low, high = torch.aminmax(line)
        least, most = float(low), float(high)
    return least, most, 0.0 if math.isfinite(least) and math.isfinite(most) else count_nonfinite(x).item()


def _numpy_range(x: NDArray[Any], turn: int | None) -> tuple[float, float]:
    """Two searches, of which the second finds the elements in the cache, take two thirds of the time of aminmax."""
    lows, highs = [], []
    first, step = (0, CHUNK) if turn is None or x.size < LARGE else (turn * CHUNK, TURNS * CHUNK)
    for start in range(first, x.size, step):
        chunk = x[start : start + CHUNK]
        lows.append(np.minimum.reduce(chunk))
        highs.append(np.maximum.reduce(chunk))
    return float(np.minimum.reduce(lows)), float(np.maximum.reduce(highs))


def _of_rows(rows: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean square and share of zeros of rows (R, C), of which the first lengths (R,) elements count."""
    zeros = (rows == 0).float().sum(1) - (rows.shape[1] - lengths)
    return row_norms(rows) / lengths.sqrt(), zeros / lengths
