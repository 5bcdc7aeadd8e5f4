"""Which losses fight: the gradient of every loss term on the same weights."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bifusion_diag.errors import UserError, near_matches
from bifusion_diag.probes.base import Call, Probe, Reading, Schedule, Subject, matches
from bifusion_diag.probes.loss_terms import ANY, TOLD, LossTerms, TermFinder
from bifusion_diag.probes.modules import is_compiled, plain_name
from bifusion_diag.probes.norms import l2_norm, to_float32
from bifusion_diag.probes.ranks import world_size

SHARDED = {"FSDPModule", "FullyShardedDataParallel"}
#: Parts of the names of autograd nodes whose backward talks to other processes.
COLLECTIVES = ("SyncBatchNorm", "AllGather", "AllReduce", "AlltoAll", "Reduce_Scatter")


class LossGradientsProbe(Probe):
    """Compares the gradients of the loss terms, each times its weight, on weights that they share.

    It costs, at each measured step, one extra backward pass from every term down to the chosen modules and no further;
    gradients, weights and random streams stay as they are. By default the module is chosen once, where two or more
    terms are seen, those among them whose weight is still 0: of the modules with a weight matrix that the most terms
    reach, the one that runs last (GradNorm's "last shared layer", Chen et al. 2018), so that the extra passes are
    short. It is chosen again when it freezes.
    :meth:`describe` says what was chosen.

    Terms are found as by `losses`; where a term's weight is not known it is taken as 1. A term that is not measured at
    a step is missing there, not zero: its weight is the number 0 now, it is a constant, or it reaches none of the
    chosen parameters. Of several calls in a step, as with gradient accumulation, gradients are added. With one term
    only, nothing is recorded.

    It is switched off, with a warning, where extra passes are impossible: sharded parameters (FSDP), re-entrant
    checkpointing, compiled modules that donate their buffers (``torch._functorch.config.donated_buffer``), and, with
    several processes, a layer between the terms and the chosen modules whose backward waits for the others. Tensor and
    module hooks of the model's own run in the extra passes too.

    Args:
        modules: name patterns of the modules on whose parameters, with all below them, the terms are compared. None:
            chosen as above.
        losses: name patterns of the modules that return the terms, as `modules` of `losses`.
        fields: where their outputs keep them, as `fields` of `losses`.
    """

    prefix = "loss_gradients"
    period = 50
    KEYS: ClassVar[dict[str, str]] = {
        "<term>/norm": "L2 norm of the gradient of weight × term on the chosen modules' parameters",
        "<term>/share": "its norm ÷ the sum of all terms' norms; missing if that is 0 or not finite",
        "cosine/<term>/<term>": "cosine between two terms' gradients; missing if one is 0 or not finite",
        "conflict": "the smallest of the cosines: below 0, two terms pull in opposite directions",
    }

    def __init__(
        self,
        *,
        modules: Sequence[str] | None = None,
        losses: Sequence[str] = ANY,
        fields: Mapping[str, str | int] | None = None,
        name: str | None = None,
        every: int | Schedule | None = None,
    ) -> None:
        super().__init__(name=name, every=every)
        self.modules = None if modules is None else tuple(modules)
        self._finder = TermFinder(losses, fields)
        self._chosen: tuple[str, ...] = ()  # modules
        self._parameters: list[nn.Parameter] = []  # of these
        self._warned = False
        self._forget()

    def attach(self, subject: Subject) -> None:
        self._finder.attach(subject)
        self._subject = subject
        modules = {plain_name(path): module for path, module in subject.model.named_modules()}
        kinds = {kind.__name__ for module in modules.values() for kind in type(module).__mro__}
        is_dtensor = [hasattr(parameter, "_local_tensor") for parameter in subject.model.parameters()]
        self._sharded = bool(kinds & SHARDED) or any(is_dtensor)
        self._owner: dict[int, str] = {}  # id of a parameter → module
        for name, module in modules.items():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self._owner.setdefault(id(parameter), name)
        if self.modules is not None:
            self._chosen = tuple(name for name in modules if matches(name, self.modules))
            if not self._chosen:
                known = near_matches(self.modules[0], modules) if self.modules else ""
                raise UserError(f"{self.name}: modules={list(self.modules)} names no module of the model.{known}")
            self._parameters = list({id(p): p for name in self._chosen for p in modules[name].parameters()}.values())

    def describe(self) -> str | None:
        """Where the terms are compared, None before that is known."""
        return f"{self.name}: measured on {', '.join(self._chosen)}" if self._chosen else None

    def watches(self, name: str, module: nn.Module) -> bool:
        return self._finder.watches(name, module)

    def reads(self, output: Any) -> bool:
        return self._finder.reads(output)

    def begin(self) -> None:
        self._forget()
        if self.modules is None and not any(parameter.requires_grad for parameter in self._parameters):
            self._chosen, self._parameters = (), []

    def _forget(self) -> None:
        self._gradients: dict[str, Tensor | None] = {}  # term → flat (P,), None: not measured
        self._paths: dict[str, Paths] = {}  # term → what its gradient passes

    def seen(self, call: Call) -> None:
        found = self._finder.find(call)
        if found is None:
            return
        if self._sharded:
            raise RuntimeError("the model's parameters are sharded, which allows no extra backward pass")
        loss, better = found
        if better:
            self._forget()
        with_graph = {name: term for name, term in loss.terms.items() if term.grad_fn is not None}
        for name in loss.terms:
            self._gradients.setdefault(name, None)
        if not self._parameters or call.name == TOLD or world_size() > 1:
            self._paths |= {name: paths_from(term) for name, term in with_graph.items()}
            if any(path.first_of_static_graph for path in self._paths.values()):
                return  # DistributedDataParallel takes the first backward for the step's own
            if len(with_graph) > 1 or self._parameters:
                self._choose()
        live = {name: term for name, term in with_graph.items() if not _is_off(loss.weights.get(name))}
        if live:
            self._measure(loss, live)

    def _choose(self) -> None:
        """Choose the module, unless it is; then look for what may be in the way to it."""
        uses = [path.uses for path in self._paths.values()]
        if not self._parameters and len(uses) > 1:
            parameters = {id(p): p for p in self._subject.model.parameters() if p.requires_grad}
            last: dict[int, tuple[bool, int, int]] = {}  # → (is a matrix, number of terms, when it was last used)
            for key in {key for use in uses for key in use} & parameters.keys() & self._owner.keys():
                when = [use[key] for use in uses if key in use]
                if len(when) > 1:
                    last[key] = (parameters[key].dim() > 1, len(when), max(w.last for w in when))
            if last:
                self._chosen = (self._owner[max(last, key=lambda key: last[key])],)
                self._parameters = [p for key, p in parameters.items() if self._owner[key] in self._chosen]
            elif not self._warned:
                self._warned = True
                warnings.warn(f"{self.name}: no two loss terms share a weight; nothing is measured", stacklevel=2)
        if world_size() > 1:
            chosen = {id(parameter) for parameter in self._parameters}
            for path in self._paths.values():
                first = min((use.first for key, use in path.uses.items() if key in chosen), default=path.collective)
                if path.collective > first:
                    where = ", ".join(self._chosen)
                    raise RuntimeError(
                        f"the backward of a layer between the loss terms and {where} waits for the other processes; "
                        "choose later modules by modules=[...]"
                    )

    def _measure(self, loss: LossTerms, live: Mapping[str, Tensor]) -> None:
        parameters = [parameter for parameter in self._parameters if parameter.requires_grad]
        if not parameters:
            return
        inverse = self._subject.inverse_scale()
        with _aside(self._subject, parameters[0].device):
            for name, term in live.items():
                weight = torch.ones_like(term) * loss.weights.get(name, 1.0)
                if inverse is not None:  # gradients in float16 need the scale on their way
                    weight = weight / inverse
                weight = weight.reshape(()).to(term.dtype)
                gradients = torch.autograd.grad(term, parameters, weight, retain_graph=True, allow_unused=True)
                if any(gradient is not None for gradient in gradients):
                    flat = _flat(gradients, parameters)
                    if inverse is not None:
                        flat = flat * inverse.to(flat)
                    before = self._gradients[name]
                    self._gradients[name] = flat if before is None else before + flat

    def collect(self) -> Iterator[Reading]:
        if not self._parameters:
            self._choose()  # of loss modules, which are seen one at a time: measured from the next time on
        terms = list(self._gradients)
        measured = {name: flat for name, flat in self._gradients.items() if flat is not None}
        self._forget()
        if len(terms) < 2 or not measured:
            return
        device = next(iter(measured.values())).device
        nothing = torch.full((), torch.nan, dtype=torch.float64, device=device)
        norm = {name: l2_norm(flat) for name, flat in measured.items()}
        total = torch.stack(list(norm.values())).sum()
        total = torch.where(total.isfinite(), total, torch.nan)  # a share of infinity is none
        unit = {name: flat.double() / norm[name] for name, flat in measured.items()}
        cosines = []
        for a, b in itertools.combinations(terms, 2):
            both = a in unit and b in unit
            cosines.append(torch.dot(unit[a], unit[b]).clamp(-1, 1) if both else nothing)
        cosine = torch.stack(cosines)
        least = cosine.nan_to_num(nan=torch.inf).amin()
        conflict = torch.where(least.isfinite(), least, torch.nan)
        norms = torch.stack([norm.get(name, nothing) for name in terms])
        gone = np.array([name not in norm for name in terms])
        pairs = tuple(f"{self.name}/cosine/{a}/{b}" for a, b in itertools.combinations(terms, 2))
        yield Reading(tuple(f"{self.name}/{name}/norm" for name in terms), to_float32(norms), missing=gone)
        names = (*(f"{self.name}/{name}/share" for name in terms), *pairs, f"{self.name}/conflict")
        values = torch.cat([norms / total, cosine, conflict[None]])
        yield Reading(names, to_float32(values), nan_is_missing=True)


class Use(NamedTuple):
    """When a parameter was used in the forward, as numbers of autograd nodes."""

    first: int
    last: int


class Paths(NamedTuple):
    """What the gradient of a term passes."""

    uses: dict[int, Use]  # by the id of the parameter
    collective: int  # when the last collective ran, -1: none
    first_of_static_graph: bool


def paths_from(term: Tensor) -> Paths:
    """Walk the graph of a term. Nodes count upwards in the order of the forward."""
    uses: dict[int, Use] = {}
    collective, static = -1, False
    start = term.grad_fn
    stack, seen = [start], {start}
    while stack:
        node = stack.pop()
        when = node._sequence_nr()  # type: ignore[union-attr]
        kind = node.name()  # type: ignore[union-attr]
        if any(word in kind for word in COLLECTIVES):
            collective = max(collective, when)
        if kind == "_DDPSinkBackward":
            ddp = node.ddp_weakref()  # type: ignore[union-attr]
            static |= ddp is not None and ddp.static_graph and not ddp._static_graph_delay_allreduce_enqueued
        for following, _ in node.next_functions:  # type: ignore[union-attr]
            if following is None or following in seen:
                continue
            if type(following).__name__ == "AccumulateGrad":
                key = id(following.variable)  # type: ignore[union-attr]
                use = uses.get(key, Use(when, when))
                uses[key] = Use(min(use.first, when), max(use.last, when))
            else:
                seen.add(following)
                stack.append(following)
    return Paths(uses, collective, static)


def _is_off(weight: float | Tensor | None) -> bool:
    """Whether a weight is the number 0. That of a tensor is not looked at: it may be on the device."""
    return not isinstance(weight, Tensor) and weight == 0


def _flat(gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]) -> Tensor:
    """All gradients as one vector (P,) on the first's device; where there is none, zeros."""
    parts = []
    for gradient, parameter in zip(gradients, parameters, strict=True):
        full = torch.zeros_like(parameter) if gradient is None else gradient
        dense = full.detach() if full.layout == torch.strided else full.detach().to_dense()
        real = torch.view_as_real(dense) if dense.is_complex() else dense
        parts.append(real.reshape(-1).to(parameters[0].device))
    flat = torch.cat(parts)
    return flat if flat.dtype == torch.float64 else flat.float()


@contextmanager
def _aside(subject: Subject, device: torch.device) -> Iterator[None]:
    """Backward passes inside leave no trace: checkpointed blocks that they run again draw random numbers and move
    the averages of BatchNorm, which is undone."""
    saved: dict[Tensor, Tensor] = {}

    def keep(module: nn.Module, inputs: Any) -> None:
        for buffer in module.buffers(recurse=is_compiled(module)):
            if buffer not in saved:
                saved[buffer] = buffer.detach().clone()

    with ExitStack() as stack:
        stack.enter_context(subject.paused())
        stack.enter_context(torch._C._EnableTorchFunction())  # as in a backward of the loop
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        for module in subject.modules.values():
            if is_compiled(module) or module._buffers:
                handle = module.register_forward_pre_hook(keep)
                stack.callback(handle.remove)
        try:
            yield
        finally:
            for buffer, value in saved.items():
                buffer.data.copy_(value)  # without a new version: the graph may hold the buffer
