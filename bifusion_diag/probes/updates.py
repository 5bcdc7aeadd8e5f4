"""How far an update moves the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from bifusion_diag.probes.base import Probe, Reading, Schedule, Subject
from bifusion_diag.probes.norms import flat, row_norms, to_float32
from bifusion_diag.probes.outputs import numbers
from bifusion_diag.probes.owners import Slots, owners_of
from bifusion_diag.probes.ranks import Shards, local_part
from bifusion_diag.probes.sampling import RUN, Samples

RUNS = 64  # of 16 elements each: the sample of a parameter
WIDTH = RUNS * RUN
SAMPLE = "of at most 1024 elements of each parameter, in runs of 16 evenly spaced"


class UpdatesProbe(Probe):
    """What the optimisers do to the parameters of their own of each module that has trainable ones. Must be told the
    optimisers, and these must step inside the step block.

    Parameters are sampled, before the first step of their optimiser in a block and after its last; of up to 1024
    elements a parameter is measured whole, of a longer one the sample stands for all. The samples take up to 12 KiB
    of memory for each parameter. Frozen parameters, those of no optimiser, and those that are a slice with gaps of
    another tensor are not measured. Of sharded parameters (FSDP2) every rank samples its part, and the numbers are of
    all these samples. The learning rate of the first group is ``train/lr``, unless the loop logs it itself.

    Args:
        modules: name patterns of the modules that are measured.
    """

    prefix = "updates"
    KEYS: ClassVar[dict[str, str]] = {
        "<module>/ratio": f"‖Δw‖ ÷ ‖w‖, w before the update, {SAMPLE}; 0 where nothing moved, 1 where all was zero "
        "before, infinite where an element is not finite; missing where all was zero and stays so, or did not step",
        "<module>/second_moment_min": f"smallest exp_avg_sq of Adam and its kin {SAMPLE}; missing for other optimisers",
        "<module>/second_moment_max": f"largest exp_avg_sq of Adam and its kin {SAMPLE}; missing for other optimisers",
        "skipped": "1 where no optimiser has stepped in the step block, as after an overflow under GradScaler; else 0",
        "scale": "the GradScaler's scale, with which the step's loss was multiplied; not recorded without one",
    }

    def __init__(
        self, *, modules: Sequence[str] = ("*",), name: str | None = None, every: int | Schedule | None = None
    ) -> None:
        super().__init__(name=name, every=every)
        self.modules = tuple(modules)

    def attach(self, subject: Subject) -> None:
        self._optimizers = subject.optimizers
        self._inverse_scale = subject.inverse_scale
        names, parameters, slots = owners_of(subject.model, self.modules)
        updated = {id(p) for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]}
        ours = [(p, slot) for p, slot in zip(parameters, slots, strict=True) if p.requires_grad or id(p) in updated]
        modules = list(dict.fromkeys(slot for _, slot in ours))
        self._size = len(modules)
        self._slots: dict[int, list[int]] = {}  # by a parameter's id: modules that own it
        for p, slot in ours:
            self._slots.setdefault(id(p), []).append(modules.index(slot))
        self._places = {id(p): place for place, p in enumerate({id(p): p for p, _ in ours}.values())}
        self._shards = Shards(list({id(p): p for p, _ in ours}.values()))
        self.shared = self._shards.any
        self._names = {
            key: tuple(f"{self.name}/{names[slot]}/{key}" for slot in modules)
            for key in ("ratio", "second_moment_min", "second_moment_max")
        }
        self._parts: dict[tuple[int, torch.device], _Part] = {}  # by an optimiser's id and a device
        self._summing = Slots()
        self.begin()

    def begin(self) -> None:
        self._updated: list[_Part] = []
        self._rate: float | Tensor | None = None
        self._skips: list[Tensor | None] = []  # of each step: more than zero where a fused optimiser left it out
        self._inverse: Tensor | None = None  # of the scale that the loss was multiplied with

    def backward_ended(self) -> None:
        self._inverse = self._inverse_scale()

    def before_update(self, optimizer: Optimizer) -> None:
        if self._rate is None:
            self._rate = optimizer.param_groups[0].get("lr")
        skips = getattr(optimizer, "found_inf", None)
        self._skips.append(skips.detach().clone() if isinstance(skips, Tensor) else None)
        for part in self._parts_of(optimizer):
            if part not in self._updated:
                self._updated.append(part)
                part.take_before()

    def after_update(self, optimizer: Optimizer) -> None:
        for part in self._updated:
            if part.optimizer is optimizer:
                part.take_after()

    def _parts_of(self, optimizer: Optimizer) -> list[_Part]:
        """An optimiser's parameters that learn, by device. They are the same at most steps."""
        by_device: dict[torch.device, list[nn.Parameter]] = {}
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad and id(p) in self._places and p.numel():
                    by_device.setdefault(p.device, []).append(p)
        parts: list[_Part] = []
        for device, parameters in by_device.items():
            part = self._parts.get((id(optimizer), device))
            if part is None or list(map(id, parameters)) != part.ids:
                part = self._parts[id(optimizer), device] = _Part(optimizer, device, parameters)
            parts.append(part)
        return parts

    def collect(self) -> Iterator[Reading]:
        if not self._optimizers:
            return
        yield Reading((f"{self.name}/skipped",), self._skipped())
        if self._inverse is not None:
            yield Reading((f"{self.name}/scale",), to_float32(self._inverse.reciprocal().reshape(1)))
        parts = [part for part in self._updated if part.done and part.parameters]
        yield self._ratio(parts)
        yield from self._second_moments(parts)

    def loop_numbers(self) -> dict[str, float | Tensor]:
        return {"train/lr": self._rate} if self._rate is not None else {}

    def _skipped(self) -> Tensor:
        skips = [skip for skip in self._skips if skip is not None]
        if not self._skips or len(skips) < len(self._skips):
            return torch.tensor([0.0 if self._skips else 1.0])
        return torch.stack([skip.reshape(()).to(skips[0].device) > 0 for skip in skips]).all().float()[None]

    def _ratio(self, parts: list[_Part]) -> Reading:
        places = [self._places[id(p)] for part in parts for p in part.parameters]
        both = [part.norms(self._summing) for part in parts] or [torch.zeros(2, 0, dtype=torch.float64)]
        moved, weight = self._shards.whole_norms(torch.cat([x.to(both[0].device) for x in both], 1), places)
        rows, slots = self._owned([p for part in parts for p in part.parameters])
        here = self._summing.constant(rows, moved.device)
        moved, weight = (self._summing.root_sum_squares(x[here], slots, self._size) for x in (moved, weight))
        ratio = moved / torch.where(weight == 0, moved, weight)
        nothing = (moved == 0) & (weight == 0)
        ratio = torch.where(nothing | ratio.isfinite(), ratio, torch.inf)
        ratio[self._summing.constant(self._missing(slots).nonzero()[0].tolist(), ratio.device)] = torch.nan
        return Reading(self._names["ratio"], to_float32(ratio), nan_is_missing=True)

    def _second_moments(self, parts: list[_Part]) -> Iterator[Reading]:
        low, high = self._names["second_moment_min"], self._names["second_moment_max"]
        parameters = [p for part in parts for p in part.with_moments]
        found = [part.second_moments() for part in parts if part.with_moments] or [torch.zeros(2, 0).double()]
        places = [self._places[id(p)] for p in parameters]
        least, most = torch.cat([x.to(found[0].device) for x in found], 1)
        least, most = self._shards.whole_max(torch.stack([-least, most]), places)
        rows, slots = self._owned(parameters)
        missing, here = self._missing(slots), self._summing.constant(rows, least.device)
        least = -self._summing.extreme(least[here], slots, self._size, "amax")
        most = self._summing.extreme(most[here], slots, self._size, "amax")
        yield Reading(low, to_float32(least), missing=missing)
        yield Reading(high, to_float32(most), missing=missing)

    def _owned(self, parameters: Sequence[nn.Parameter]) -> tuple[list[int], list[int]]:
        """Each parameter's number once for each module that owns it, and that module's slot."""
        pairs = [(i, slot) for i, p in enumerate(parameters) for slot in self._slots[id(p)]]
        return [i for i, _ in pairs], [slot for _, slot in pairs]

    def _missing(self, slots: list[int]) -> NDArray[np.bool_]:
        missing = np.ones(self._size, bool)
        missing[slots] = False
        return missing


class _Part:
    """The parameters of one optimiser on one device, and their samples."""

    def __init__(self, optimizer: Optimizer, device: torch.device, parameters: Sequence[nn.Parameter]) -> None:
        self.optimizer = optimizer
        self.device = device
        self.ids = [id(p) for p in parameters]
        dense = [p for p in parameters if flat(_held(p)) is not None]
        self.parameters = sorted(dense, key=lambda p: _held(p).numel() < WIDTH)  # as Samples wants them
        self.done = False  # its optimiser has stepped
        self.with_moments: list[nn.Parameter] = []
        self._sizes = [_held(p).numel() for p in self.parameters]
        wide = any(_held(p).dtype == torch.float64 for p in self.parameters)
        self._dtype = torch.float64 if wide else torch.float32
        self._before = Samples(self._sizes, RUNS, device, self._dtype)
        self._after = Samples(self._sizes, RUNS, device, self._dtype)
        self._moments = Samples([], RUNS, device, self._dtype)

    def take_before(self) -> None:
        self.done = False
        self._before.take([_held(p) for p in self.parameters])

    def take_after(self) -> None:
        self.done = True
        self._after.take([_held(p) for p in self.parameters])
        found = [(p, moment) for p in self.parameters if (moment := self._moment(p)) is not None]
        self.with_moments = [p for p, _ in found]
        sizes = [moment.numel() for _, moment in found]
        if sizes != self._moments.sizes:
            self._moments = Samples(sizes, RUNS, self.device, self._dtype)
        self._moments.take([moment for _, moment in found])

    def _moment(self, parameter: nn.Parameter) -> Tensor | None:
        """Adam's second moment of a parameter; None for another optimiser's, or one kept elsewhere or packed."""
        moment = self.optimizer.state.get(parameter, {}).get("exp_avg_sq")
        moment = None if moment is None else _held(moment)
        if type(moment) is not Tensor or moment.device != self.device or not moment.is_floating_point():
            return None
        alike = moment.numel() == _held(parameter).numel() and (moment.is_contiguous() or flat(moment) is not None)
        return moment if alike else None

    def norms(self, summing: Slots) -> Tensor:
        """Of the movement and of the weights before it, of each parameter: (2, n) float64."""
        before, after = self._before.rows, self._after.rows
        stands_for = [(size / min(max(1, size), WIDTH)) ** 0.5 for size in self._sizes]
        scale = summing.constant(stands_for, self.device, torch.float64)
        return torch.stack([row_norms(after - before), row_norms(before)]) * scale

    def second_moments(self) -> Tensor:
        """Smallest and largest, (2, n) float64."""
        rows, inside = self._moments.rows, self._moments.inside
        low, high = torch.where(inside, rows, torch.inf).amin(1), torch.where(inside, rows, -torch.inf).amax(1)
        return torch.stack([low, high]).double()


def _held(x: Tensor) -> Tensor:
    """The numbers of a parameter or its moment that this process holds."""
    return numbers(local_part(x))
