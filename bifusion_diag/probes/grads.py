"""Gradient norms by module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from bifusion_diag.probes.base import ROOT, Probe, Reading, Schedule, Subject, matches
from bifusion_diag.probes.modules import plain_name
from bifusion_diag.probes.norms import l2_norm, l2_norms, to_float32
from bifusion_diag.probes.ranks import Shards, local_part, world_size

FROZEN, NO_GRADIENT, ZERO, FINITE, NONFINITE = range(5)  # state codes


class GradsProbe(Probe):
    """L2 norms of gradients, as they are when the step's last backward ends: before clipping.

    With several processes they are those of the reduced gradient, the same on all ranks; of sharded parameters (FSDP2),
    of the whole. ``local_norm`` is of the gradient of one process, before DistributedDataParallel's all-reduce: the
    rank where it stands out has the bad sample. With gradient accumulation that is all that the process has accumulated
    since the gradients were last reduced (``no_sync``), and what was reduced before.

    Own parameters are those that a module holds itself, not through children; a parameter that two modules share counts
    in both. Outputs are watched of modules that own parameters and of the model's parts (names of at most two
    components); all tensors of an output and all calls of a step are summed in squares. A parameter or input handed
    through as an output is not measured there.

    Args:
        modules: name patterns of the modules that are measured.
    """

    prefix = "grads"
    KEYS: ClassVar[dict[str, str]] = {
        "<module>/param_norm": "gradient of its own parameters; missing if frozen or without gradient",
        "<module>/state": "of its own parameters: 0 frozen, 1 no gradient, 2 zero, 3 finite, 4 non-finite",
        "<module>/output_norm": "gradient of its output; missing if none arrived",
    }
    RANK_KEYS: ClassVar[dict[str, str]] = {  # besides, where several processes train and parameters are not sharded
        "<module>/local_norm": "as param_norm, but of this process alone, before the all-reduce",
    }

    def __init__(
        self, *, modules: Sequence[str] = ("*",), name: str | None = None, every: int | Schedule | None = None
    ) -> None:
        super().__init__(name=name, every=every)
        self.modules = tuple(modules)

    def attach(self, subject: Subject) -> None:
        self._subject = subject
        self._parameters: list[nn.Parameter] = []
        self._owner: list[int] = []  # of each parameter: index among the owners
        owners: list[str] = []
        outputs: list[str] = []
        for path, module in subject.model.named_modules():
            name = plain_name(path)
            own = [p for p in module._parameters.values() if p is not None]
            if not matches(name, self.modules):
                continue
            if own:
                self._parameters.extend(own)
                self._owner.extend([len(owners)] * len(own))
                owners.append(name)
            if name in subject.modules and (own or (name != ROOT and name.count(".") <= 1)):
                outputs.append(name)
        self._owner_names = owners
        self._shards = Shards(self._parameters)
        self._of_process = world_size() > 1 and not self._shards.any
        self._watched = set(map(id, self._parameters)) if self._of_process else set[int]()
        self._slot = {name: i for i, name in enumerate(dict.fromkeys(outputs))}
        self._param_names = tuple(f"{self.name}/{name}/param_norm" for name in owners)
        self._local_names = tuple(f"{self.name}/{name}/local_norm" for name in owners)
        self._state_names = tuple(f"{self.name}/{name}/state" for name in owners)
        self._output_names = tuple(f"{self.name}/{name}/output_norm" for name in self._slot)
        self._constants: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self.begin()

    def watches_gradient(self, name: str, module: nn.Module) -> bool:
        return name in self._slot

    def watches_local_gradient(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._watched

    def begin(self) -> None:
        self._norms: list[Tensor] = []
        self._slots: list[int] = []
        self._local: dict[int, Tensor] = {}  # by the parameter's id
        self._gradients: tuple[Tensor, list[int]] | None = None
        self._inverse_scale: Tensor | None = None

    def gradient(self, name: str, gradient: Tensor) -> None:
        self._norms.append(l2_norm(gradient))
        self._slots.append(self._slot[name])

    def local_gradient(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            self._local[id(parameter)] = l2_norm(parameter.grad)

    def backward_ended(self) -> None:
        self._inverse_scale = self._subject.inverse_scale()
        here = [(i, p.grad) for i, p in enumerate(self._parameters) if p.requires_grad and p.grad is not None]
        self._gradients = l2_norms([local_part(gradient) for _, gradient in here]), [i for i, _ in here]

    def collect(self) -> Iterator[Reading]:
        if self._gradients is None:  # no backward was noticed
            self.backward_ended()
        if self._owner_names:
            yield from self._of_parameters()
        if self._owner_names and self._of_process:
            yield self._of_this_process()
        yield self._of_outputs()

    def _of_parameters(self) -> Iterator[Reading]:
        assert self._gradients is not None
        norms, places = self._gradients
        state = np.full(len(self._owner_names), FROZEN)
        for parameter, owner in zip(self._parameters, self._owner, strict=True):
            if parameter.requires_grad:
                state[owner] = max(state[owner], NO_GRADIENT)
        slots = [self._owner[place] for place in places]
        state[slots] = ZERO
        norms = self._unscaled(self._summed(self._shards.whole_norms(norms, places), slots, len(state)))
        here = self._constant(tuple(state.tolist()), norms.device)
        finite = torch.where(norms > 0, FINITE, ZERO)
        measured = torch.where(norms.isfinite(), finite, NONFINITE)
        states = torch.where(here == ZERO, measured, here)
        yield Reading(self._param_names, to_float32(norms), missing=state < ZERO)
        yield Reading(self._state_names, states.float())

    def _of_this_process(self) -> Reading:
        found = [(owner, self._local.get(id(p))) for p, owner in zip(self._parameters, self._owner, strict=True)]
        here = [(owner, norm) for owner, norm in found if norm is not None]
        return self._by_slot(self._local_names, [norm for _, norm in here], [owner for owner, _ in here])

    def _of_outputs(self) -> Reading:
        return self._by_slot(self._output_names, self._norms, self._slots)

    def _by_slot(self, names: tuple[str, ...], norms: list[Tensor], slots: list[int]) -> Reading:
        """The norms () of each slot put together; missing where a slot has none."""
        missing = np.ones(len(names), bool)
        missing[slots] = False
        stacked = torch.stack([norm.to(norms[0].device) for norm in norms]) if norms else torch.zeros(0).double()
        return Reading(names, to_float32(self._unscaled(self._summed(stacked, slots, len(names)))), missing=missing)

    def _unscaled(self, norms: Tensor) -> Tensor:
        return norms if self._inverse_scale is None else norms * self._inverse_scale.to(norms.device)

    def _summed(self, norms: Tensor, slots: list[int], size: int) -> Tensor:
        """Root of the sum of squares by slot: norms (n,) → (size,) float64."""
        total = torch.zeros(size, dtype=torch.float64, device=norms.device)
        return total.index_add_(0, self._constant(tuple(slots), norms.device), norms.square()).sqrt()

    def _constant(self, values: tuple[int, ...], device: torch.device) -> Tensor:
        """Integers on the device. They are the same at most steps, so that they are seldom copied there."""
        key = (values, device)
        if key not in self._constants:
            if len(self._constants) > 64:
                self._constants.clear()
            self._constants[key] = torch.tensor(values, dtype=torch.int64, device=device)
        return self._constants[key]
