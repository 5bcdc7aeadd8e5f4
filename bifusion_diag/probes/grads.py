"""Gradient norms by module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bifusion_diag.probes.base import Probe, Reading, Schedule, Subject
from bifusion_diag.probes.norms import Number, as_tensor, l2_norms, norm_of, to_float32
from bifusion_diag.probes.owners import Slots, owners_of, watched_outputs
from bifusion_diag.probes.ranks import Shards, world_size

FROZEN, NO_GRADIENT, ZERO, FINITE, NONFINITE = range(5)  # state codes


class GradsProbe(Probe):
    """L2 norms of gradients, as they are when the step's last backward ends: before clipping. With several optimisers
    (a GAN's), as they are when the last backward before its optimiser's step ends.

    With several processes they are those of the reduced gradient, the same on all ranks; of sharded parameters (FSDP2),
    of the whole. ``local_norm`` is of the gradient of one process, before DistributedDataParallel's all-reduce: the
    rank where it stands out has the bad sample. With gradient accumulation that is all that the process has accumulated
    since the gradients were last reduced (``no_sync``), and what was reduced before.

    Own parameters are those that a module holds itself, not through children; a parameter that two modules share counts
    in both. Outputs are watched of modules that own a matrix (a parameter of two dimensions or more) and of the model's
    parts (names of at most two components); all tensors of an output and all calls of a step are summed in squares. A
    parameter or input handed through as an output is not measured there. Layers that only scale and shift, such as
    normalisations, are left out: the gradient of their shift is the sum of their output's, at no cost. The norm of the
    whole gradient is ``train/grad_norm``, unless the loop logs it itself.

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
        self._owners = owners_of(subject.model, self.modules)
        self._shards = Shards(self._owners.parameters)
        self.shared = self._shards.any
        self._of_process = world_size() > 1 and not self._shards.any
        self._watched = set(map(id, self._owners.parameters)) if self._of_process else set[int]()
        self._slot = {name: i for i, name in enumerate(watched_outputs(subject, self.modules))}
        owners = self._owners.names
        self._param_names = tuple(f"{self.name}/{name}/param_norm" for name in owners)
        self._local_names = tuple(f"{self.name}/{name}/local_norm" for name in owners)
        self._state_names = tuple(f"{self.name}/{name}/state" for name in owners)
        self._output_names = tuple(f"{self.name}/{name}/output_norm" for name in self._slot)
        self._summing = Slots()
        self.begin()

    def watches_gradient(self, name: str, module: nn.Module) -> bool:
        return name in self._slot

    def watches_local_gradient(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._watched

    def begin(self) -> None:
        self.measured: tuple[Tensor, list[nn.Parameter]] | None = (
            None  # norms (n,) in this process, scaled; and of what
        )
        self._norms: list[Number] = []
        self._slots: list[int] = []
        self._local: dict[int, Number] = {}  # by the parameter's id
        self._gradients: tuple[Tensor, list[int]] | None = None
        self._used: dict[int, Tensor] = {}  # of several optimisers: norms () with which one has stepped, by place
        self._inverse_scale: Tensor | None = None
        self._total: Tensor | None = None

    def gradient(self, name: str, gradient: Tensor) -> None:
        self._norms.append(norm_of(gradient))
        self._slots.append(self._slot[name])

    def local_gradient(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            self._local[id(parameter)] = norm_of(parameter.grad)

    def backward_ended(self) -> None:
        self._inverse_scale = self._subject.inverse_scale()
        places: list[int] = []
        gradients: list[Tensor] = []
        for i, parameter in enumerate(self._owners.parameters):
            if parameter.requires_grad and (gradient := parameter.grad) is not None:
                places.append(i)
                gradients.append(gradient)
        self._gradients = l2_norms(gradients), places
        self.measured = self._gradients[0], [self._owners.parameters[place] for place in places]

    def after_update(self, optimizer: Optimizer) -> None:
        if len(self._subject.optimizers) > 1 and self._gradients is not None:
            stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
            pairs = zip(*self._gradients, strict=True)
            self._used |= {place: norm for norm, place in pairs if id(self._owners.parameters[place]) in stepped}

    def collect(self) -> Iterator[Reading]:
        if self._gradients is None:  # no backward was noticed
            self.backward_ended()
        self._put_back_used()
        if self._owners.names:
            yield from self._of_parameters()
            if self._of_process:
                yield self._of_this_process()
        yield self._of_outputs()

    def _put_back_used(self) -> None:
        """Norms with which an optimiser has stepped count, not what the backward of another has made of them."""
        if self._used and self._gradients is not None:
            norms, places = self._gradients
            rest = [row for row, place in enumerate(places) if place not in self._used]
            used = torch.stack(list(self._used.values()))
            norms = norms.to(used.device)[self._summing.constant(rest, used.device)]
            self._gradients = torch.cat([used, norms]), [*self._used, *(places[row] for row in rest)]

    def loop_numbers(self) -> dict[str, Tensor]:
        whole_model = "*" in self.modules
        return {"train/grad_norm": to_float32(self._total)} if whole_model and self._total is not None else {}

    def _of_parameters(self) -> Iterator[Reading]:
        assert self._gradients is not None
        norms, places = self._gradients
        names, parameters, owners = self._owners
        once = {id(parameters[place]): i for i, place in enumerate(places)}  # a shared one is there twice
        state = np.full(len(names), FROZEN)
        state[[owner for parameter, owner in zip(parameters, owners, strict=True) if parameter.requires_grad]] = (
            NO_GRADIENT
        )
        slots = [owners[place] for place in places]
        state[slots] = ZERO
        whole = self._shards.whole_norms(norms, places)
        if places:
            self._total = self._unscaled(whole[self._summing.constant(list(once.values()), whole.device)].norm())
        norms = self._unscaled(self._summing.root_sum_squares(whole, slots, len(state)))
        here = self._summing.constant(state.tolist(), norms.device)
        finite = torch.where(norms > 0, FINITE, ZERO)
        measured = torch.where(norms.isfinite(), finite, NONFINITE)
        states = torch.where(here == ZERO, measured, here)
        yield Reading(self._param_names, to_float32(norms), missing=state < ZERO)
        yield Reading(self._state_names, states.float())

    def _of_this_process(self) -> Reading:
        here = [(self._local[id(p)], owner) for p, owner in zip(*self._owners[1:], strict=True) if id(p) in self._local]
        return self._by_slot(self._local_names, [norm for norm, _ in here], [owner for _, owner in here])

    def _of_outputs(self) -> Reading:
        return self._by_slot(self._output_names, self._norms, self._slots)

    def _by_slot(self, names: tuple[str, ...], norms: list[Number], slots: list[int]) -> Reading:
        """The norms of each slot put together; missing where a slot has none."""
        missing = np.ones(len(names), bool)
        missing[slots] = False
        summed = self._summing.root_sum_squares(as_tensor(norms), slots, len(names))
        return Reading(names, to_float32(self._unscaled(summed)), missing=missing)

    def _unscaled(self, norms: Tensor) -> Tensor:
        return norms if self._inverse_scale is None else norms * self._inverse_scale.to(norms.device)
