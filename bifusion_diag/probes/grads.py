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

FROZEN, NO_GRADIENT, ZERO, FINITE, NONFINITE = range(5)  # state codes


class GradsProbe(Probe):
    """L2 norms of gradients, as they are when the step's last backward ends: before clipping.

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
        self._slot = {name: i for i, name in enumerate(dict.fromkeys(outputs))}
        self._param_names = tuple(f"{self.name}/{name}/param_norm" for name in owners)
        self._state_names = tuple(f"{self.name}/{name}/state" for name in owners)
        self._output_names = tuple(f"{self.name}/{name}/output_norm" for name in self._slot)
        self._constants: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self.begin()

    def watches_gradient(self, name: str, module: nn.Module) -> bool:
        return name in self._slot

    def begin(self) -> None:
        self._norms: list[Tensor] = []
        self._slots: list[int] = []
        self._of_step: list[Reading] | None = None
        self._inverse_scale: Tensor | None = None

    def gradient(self, name: str, gradient: Tensor) -> None:
        self._norms.append(l2_norm(gradient))
        self._slots.append(self._slot[name])

    def backward_ended(self) -> None:
        self._inverse_scale = self._subject.inverse_scale()
        self._of_step = list(self._of_parameters())

    def collect(self) -> Iterator[Reading]:
        if self._of_step is None:  # no backward was noticed
            self.backward_ended()
        yield from self._of_step or ()
        yield self._of_outputs()

    def _of_parameters(self) -> Iterator[Reading]:
        if not self._owner_names:
            return
        state = np.full(len(self._owner_names), FROZEN)
        gradients: list[Tensor] = []
        slots: list[int] = []
        for parameter, owner in zip(self._parameters, self._owner, strict=True):
            if parameter.requires_grad:
                state[owner] = max(state[owner], NO_GRADIENT)
                if parameter.grad is not None:
                    state[owner] = ZERO
                    gradients.append(parameter.grad)
                    slots.append(owner)
        norms = self._unscaled(self._summed(l2_norms(gradients), slots, len(state)))
        here = self._constant(tuple(state.tolist()), norms.device)
        finite = torch.where(norms > 0, FINITE, ZERO)
        measured = torch.where(norms.isfinite(), finite, NONFINITE)
        states = torch.where(here == ZERO, measured, here)
        yield Reading(self._param_names, to_float32(norms), missing=state < ZERO)
        yield Reading(self._state_names, states.float())

    def _of_outputs(self) -> Reading:
        missing = np.ones(len(self._slot), bool)
        missing[self._slots] = False
        norms = [norm.to(self._norms[0].device) for norm in self._norms]
        stacked = torch.stack(norms) if norms else torch.zeros(0, dtype=torch.float64)
        summed = self._unscaled(self._summed(stacked, self._slots, len(missing)))
        return Reading(self._output_names, to_float32(summed), missing=missing)

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
