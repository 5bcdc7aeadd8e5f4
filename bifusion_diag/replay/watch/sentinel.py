"""The probe that the flight recorder judges every step by: signs of life, at the price of one look at the gradients."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from bifusion_diag.probes.base import ROOT, Call, Probe, Reading, Subject
from bifusion_diag.probes.data import fields_of
from bifusion_diag.probes.fields import ABSENT, get_field
from bifusion_diag.probes.grads import GradsProbe
from bifusion_diag.probes.loss_terms import LossTerms, TermFinder
from bifusion_diag.probes.modules import plain_name
from bifusion_diag.probes.norms import Number, flat, norm_of, norms_of
from bifusion_diag.probes.outputs import numbers
from bifusion_diag.probes.owners import owners_of
from bifusion_diag.probes.ranks import Shards, local_part, world_size
from bifusion_diag.probes.sampling import RUN, spacing
from bifusion_diag.replay.step import TOTAL, Fingerprint, digest
from bifusion_diag.replay.watch.vitals import (
    FINITE,
    FROZEN,
    NO_GRADIENT,
    NONFINITE,
    ZERO,
    Alpha,
    InputRange,
    Vitals,
)

RUNS = 4  # of 16 neighbours: 64 elements of a parameter, or all that it has
WIDTH = RUNS * RUN
SMALL_BUFFER = 1 << 17  # elements; larger ones, such as masks, do not change
ALIKE = 1e-3  # relative: how exactly a clipped gradient is a multiple of what it was
GONE = 1e-3  # a gradient that shrinks below this share of the others' shrinking was taken away, not clipped
NOISE = 1e-5  # a smaller share of the whole gradient need not move a weight: that of a bias before a normalisation
FINE = 1e-5  # ‖Δw‖ / ‖w‖ below which an update may be lost in the weights' precision
FLOAT32_MAX = float(torch.finfo(torch.float32).max)
OVERFLOW = {True: 1e-30, False: 1e30}  # whether float16 is used: how large a scaled norm may overflow in it


class Sentinel(Probe):
    """Measures what :class:`~bifusion_diag.replay.watch.detect.Detector` judges a step by. It records nothing.

    Loss terms are found as :class:`~bifusion_diag.probes.loss_terms.TermFinder` finds them; where it finds none, the
    loss is what backward() was called on, the term "loss".

    With several optimisers (a GAN's) a step is judged before the first of them steps, by the gradients of what that one
    updates; after the step, all gradients are as their optimiser saw them.

    Args:
        suspicious: asked when a backward has ended: whether the gradients' digests are worth taking.

    Attributes:
        param_norms: L2 norm of the gradient by parameter, of those that have one.
    """

    prefix = "recorder"
    KEYS: ClassVar[dict[str, str]] = {}

    def __init__(self, suspicious: Callable[[Vitals], bool]) -> None:
        super().__init__()
        self._suspicious = suspicious
        self._finder = TermFinder()
        self._model: nn.Module | None = None
        self._is_open = False
        self._undo: Callable[[], None] | None = None

    # --- what it watches -----------------------------------------------------------------------------------------

    def attach(self, subject: Subject) -> None:
        self._subject = subject
        self._model = subject.model
        self._finder.attach(subject)
        self._losses = {name for name, module in subject.modules.items() if self._finder.watches(name, module)}
        owners = owners_of(subject.model)
        self._modules = owners.names
        self._owning = set(owners.names)
        names = {id(p): plain_name(path) for path, p in subject.model.named_parameters()}
        found: dict[str, tuple[nn.Parameter, list[int]]] = {}
        for parameter, slot in zip(owners.parameters, owners.slots, strict=True):
            found.setdefault(names[id(parameter)], (parameter, []))[1].append(slot)
        self._names = tuple(found)
        self._parameters = tuple(parameter for parameter, _ in found.values())
        self._slots = tuple(tuple(dict.fromkeys(slots)) for _, slots in found.values())
        self._place = {id(p): i for i, p in enumerate(self._parameters)}
        self._owners = {
            name: tuple(self._modules[slot] for slot in slots)
            for name, slots in zip(self._names, self._slots, strict=True)
        }
        self._shards = Shards(self._parameters)
        self.shared = self._shards.any
        self._of_process = world_size() > 1 and not self._shards.any
        self._held_sizes: tuple[int, ...] = ()
        self._weights: _Samples | None = None
        self._gradient_samples = _Samples(())
        self._sampled_places: tuple[int, ...] = ()
        self._after: NDArray[np.float64] | None = None  # (P, 64) weights when the last step ended
        self._to_clear = False
        self._used_by_parents: set[str] = set()  # modules whose weights another module uses without calling them
        self._largest: dict[str, float] = {}  # by input: largest absolute value of all batches
        self._buffers_bad: frozenset[str] | None = None
        self._buffer_places = [
            ((f"{plain_name(path)}." if path else "") + key, module._buffers, key)
            for path, module in subject.model.named_modules()
            for key in module._buffers
        ]
        self._usual_norm: float | None = None  # of the last step whose gradients are finite
        self._usual_loss = 0.0
        self._speeds: NDArray[np.float64] | None = None  # (P,) usual ‖Δw‖ / ‖w‖ / lr
        self._grads = next((probe for probe in subject.probes if isinstance(probe, GradsProbe)), None)
        self._last_measured: Any = None
        self._clear()

    def _clear(self) -> None:
        self.param_norms: dict[str, float] = {}
        self._ran: set[str] = set()
        self._calls: list[LossTerms] = []
        self._roots: list[Tensor] = []  # what backward() was called on
        self._inputs: dict[str, InputRange] = {}
        self._alphas: dict[str, list[Tensor]] = {}
        self._local: dict[int, Number] = {}
        self._half = False
        self._vitals: Vitals | None = None
        self._norms: dict[int, float] = {}  # by place, scale taken out
        self._used: dict[int, float] = {}  # with which an optimiser has stepped
        self._states: NDArray[np.int64] | None = None
        self._gradients: dict[str, str] = {}
        self._uncleared: tuple[str, ...] | None = None  # None: no backward has begun
        self._stepping: Optimizer | None = None
        self._stepped = 0
        self._found_inf = False
        self._begun: _Gradients | None = None
        self._before: NDArray[np.float64] | None = None
        self._scale: float | None = None

    def watches(self, name: str, module: nn.Module) -> bool:
        return name in self._owning or name in self._losses or name == ROOT

    def reads(self, output: Any) -> bool:
        return self._finder.reads(output) or get_field(output, "alpha", ABSENT) is not ABSENT

    def watches_local_gradient(self, parameter: nn.Parameter) -> bool:
        return self._of_process

    # --- a step's events -----------------------------------------------------------------------------------------

    def begin(self) -> None:
        # Of several optimisers one's backward leaves gradients to parameters of another, which clears them later.
        self._to_clear = self._stepped > 0 and not self._found_inf and len(self._subject.optimizers) == 1
        self._clear()
        self._is_open = True
        if self._buffers_bad is None:
            self._buffers_bad = frozenset(self._bad_buffers())
        self._listen()

    def batch(self, batch: Any) -> None:
        fields = fields_of(batch)
        scenes = get_field(batch, "scene_index")
        firsts = Counter(len(x) for field in fields.values() if not field.listed for x in field.tensors if x.dim())
        size = firsts.most_common(1)[0][0] if firsts else None
        rows = scenes if isinstance(scenes, Tensor) and scenes.dim() == 1 else None
        for name, field in fields.items():
            floating = [(i, x) for i, x in enumerate(field.tensors) if x.is_floating_point() and x.numel()]
            if floating:
                before = self._largest.get(name, 0.0)
                found = _range(floating, field.listed, size, rows, before)
                self._inputs[name] = found
                self._largest[name] = max(before, found.absmax)

    def seen(self, call: Call) -> None:
        name, output = call.name, call.output
        self._ran.add(name)
        plain = type(output) is Tensor
        if plain and output.dtype is torch.float16:
            self._half = True
        if plain and name not in self._losses:
            return
        found = self._finder.find(call)
        if found is not None:
            terms, better = found
            if better:
                self._calls = []
            kept = {term: value.detach().clone() for term, value in terms.terms.items()}
            total = None if terms.total is None else terms.total.detach().clone()
            self._calls.append(LossTerms(total, kept, terms.weights))
        alpha = None if plain else get_field(output, "alpha")
        if isinstance(alpha, Tensor) and alpha.is_floating_point() and alpha.numel():
            self._alphas.setdefault(name, []).append(_alpha(alpha))

    def local_gradient(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            self._local[id(parameter)] = norm_of(parameter.grad)

    def backward_ended(self) -> None:
        inverse = self._subject.inverse_scale()
        self._scale = None if inverse is None else float(inverse)
        self._measure_gradients()
        vitals = self._up_to_backward()
        # What was there before is not noted: run again, the step begins without it.
        self._gradients = self._digests() if self._suspicious(vitals) and not vitals.uncleared else {}
        self._vitals = vitals

    def before_update(self, optimizer: Optimizer) -> None:
        if self._stepping is None:
            self._stepping = optimizer
        found = getattr(optimizer, "found_inf", None)  # a fused optimiser leaves the step out by itself
        self._found_inf = self._found_inf or (isinstance(found, Tensor) and bool(found.sum() > 0))

    def after_update(self, optimizer: Optimizer) -> None:
        self._stepped += 1
        if len(self._subject.optimizers) > 1:
            held = {self._place.get(id(p)) for group in optimizer.param_groups for p in group["params"]}
            self._used |= {place: norm for place, norm in self._norms.items() if place in held}

    def collect(self) -> Iterator[Reading]:
        yield from ()

    # --- asked by the recorder -----------------------------------------------------------------------------------

    def measure(self, number: int) -> Vitals:
        """The step's signs of life up to its update. Waits for the device."""
        self._stop_listening()
        if not self._is_open:  # something in it has raised, and the Monitor has switched it off
            return Vitals(number)
        self._is_open = False
        vitals = self._vitals if self._vitals is not None else self._up_to_backward()
        if len(self._subject.optimizers) > 1 and self._stepping is not None:
            vitals = self._only_of(self._stepping, vitals)
        scaled_out = self._scaled_out(vitals)
        altered = () if scaled_out or self._stepping is None else self._altered()
        self._before = self._sampled()
        if vitals.grad_norm is not None and math.isfinite(vitals.grad_norm):
            self._usual_norm = vitals.grad_norm
        return dataclasses.replace(
            vitals,
            step=number,
            rates=self._rates(),  # as the update will use them: a loop may set them after the backward
            altered=altered,
            spoilt=self._spoilt(altered),
            scaled_out=scaled_out,
            bad_buffers=self._new_bad_buffers(),
            outside=self._outside(),
        )

    def updated(self, vitals: Vitals) -> Vitals:
        """What :meth:`measure` returned, and what is known when the step has ended."""
        if self._used:  # several optimisers: each by the gradients with which it has stepped
            self._norms |= self._used
            later = self._with_gradients(vitals)
            vitals = dataclasses.replace(later, altered=vitals.altered)
        before, self._before = self._before, None
        after = self._sampled()
        self._after = after
        if before is None or after is None or not self._stepped or self._found_inf:
            return vitals
        change = _norm(after - before)  # (P,)
        size = _norm(before)
        finite = np.isfinite(before).all(1)
        bad = tuple(self._names[i] for i in np.flatnonzero(finite & ~np.isfinite(after).all(1)))
        did_move = (after != before).any(1)
        stuck = self._stuck(vitals, did_move, change / np.maximum(size, 1e-30))
        moved, ratio = self._by_module(did_move, change, size, self._norms)
        return dataclasses.replace(vitals, moved=moved, update_ratio=ratio, bad_weights=bad, stuck=stuck)

    def _stuck(self, vitals: Vitals, did_move: NDArray[np.bool_], ratio: NDArray[np.float64]) -> tuple[str, ...]:
        """Names of parameters with a gradient that should have moved, by what they did before, and have not."""
        rate = max(vitals.rates.values(), default=1.0)
        usual = self._speeds if self._speeds is not None else np.zeros(len(ratio))
        expected = usual * rate
        found: list[str] = []
        least = NOISE * (vitals.grad_norm or 0.0)
        for place, norm in self._norms.items():
            if not self._sampled_at[place] or did_move[place] or norm == 0:
                continue
            should = norm > least and (usual[place] == 0 or expected[place] > FINE)
            if should or place not in self._held_places:
                found.append(self._names[place])
        if rate > 0:
            now = np.where(did_move & np.isfinite(ratio), ratio / rate, usual)
            self._speeds = np.where(usual == 0, now, 0.9 * usual + 0.1 * now)
        return tuple(found)

    def weights_changed(self) -> None:
        """The weights were changed on purpose, as by going back to a kept state."""
        self._after = self._before = None

    def weights_digest(self) -> str:
        """Digest of a sample of all weights, equal on all ranks that hold the same; "" where each holds a part."""
        if self._model is None or self._shards.any:
            return ""
        sampled = self._sampled()
        return "" if sampled is None else hashlib.blake2b(sampled.tobytes(), digest_size=16).hexdigest()

    def module_digests(self) -> dict[str, str]:
        """:meth:`weights_digest` by module."""
        sampled = None if self._model is None or self._shards.any else self._sampled()
        if sampled is None:
            return {}
        digests: dict[str, str] = {}
        for name, row in zip(self._names, sampled, strict=True):
            for module in self._owners[name]:
                told = digests.get(module, "").encode() + row.tobytes()
                digests[module] = hashlib.blake2b(told, digest_size=16).hexdigest()
        return digests

    @property
    def fingerprint(self) -> Fingerprint | None:
        """Digests of the step's losses, and of its gradients where they were suspicious; None without either."""
        if self._model is None:
            return None
        losses: dict[str, str] = {}
        if len(self._calls) == 1:
            found = self._calls[0]
            losses = {name: digest(value) for name, value in found.terms.items()}
            if found.total is not None:
                losses["(total)"] = digest(found.total)
        elif not self._calls and len(self._roots) == 1 and self._scale is None:
            losses = {"(total)": digest(self._roots[0])}
        return Fingerprint(losses, self._gradients) if losses or self._gradients else None

    # --- losses --------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Hear of the tensor that backward() is called on, which PyTorch tells in no other way. From the step's begin
        until it is measured."""
        self._stop_listening()
        original = torch.autograd.backward
        me = weakref.ref(self)

        @functools.wraps(original)
        def backward(tensors: Any, *arguments: Any, **keywords: Any) -> Any:
            sentinel = me()
            if sentinel is not None and sentinel._is_open and torch._C._current_graph_task_id() == -1:
                sentinel._backward_begins()
                for root in (tensors,) if isinstance(tensors, Tensor) else tuple(tensors):
                    if isinstance(root, Tensor) and root.numel() == 1:
                        sentinel._roots.append(root.detach().reshape(()).clone())
            return original(tensors, *arguments, **keywords)

        def undo() -> None:
            if torch.autograd.backward is backward:
                torch.autograd.backward = original

        torch.autograd.backward = backward
        self._undo = undo

    def _stop_listening(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None

    def _backward_begins(self) -> None:
        if self._uncleared is not None:
            return  # what an accumulating step's first backward has left
        self._uncleared = ()
        self._held()
        held = [] if not self._to_clear or self._shards.any else self._parameters
        places = [i for i, p in enumerate(held) if p.grad is not None and i in self._held_places]
        gradients = [x for i in places if (x := self._parameters[i].grad) is not None]
        if gradients:  # of zeros, if the loop sets them to zero in place
            left = _Samples(gradients).take(gradients)
            self._uncleared = tuple(self._names[i] for i, row in zip(places, left, strict=True) if row.any())

    def _losses_of_step(self) -> tuple[dict[str, float], dict[str, float], float | None]:
        """Terms, weights and total: of several calls the mean."""
        terms: dict[str, list[Tensor]] = {}
        weights: dict[str, float] = {}
        totals: list[Tensor] = []
        for call in self._calls:
            for name, value in call.terms.items():
                terms.setdefault(name, []).append(value)
            weights |= {name: float(weight) for name, weight in call.weights.items()}
            totals += [] if call.total is None else [call.total]
        names = list(terms)
        values = _mean_each([*terms.values(), totals, self._roots])
        raw, total, root = dict(zip(names, values, strict=False)), values[-2], values[-1]
        if root is not None:
            root = self._true_loss(root)
        if total is None:
            total = root
        if not raw and total is not None:
            raw = {TOTAL: total}
        return {name: value for name, value in raw.items() if value is not None}, weights, total

    def _true_loss(self, root: float) -> float | None:
        """The sum of what backward() was called on, scale taken out; None where only the scale made it infinite."""
        if self._scale is not None and math.isinf(root):
            most = torch.finfo(self._roots[0].dtype).max
            if max(1.0, abs(self._usual_loss)) / self._scale > 1e-8 * most:
                return None
        true = root * len(self._roots) * (self._scale or 1.0)
        self._usual_loss = true if math.isfinite(true) else self._usual_loss
        return true

    # --- gradients -----------------------------------------------------------------------------------------------

    def _measure_gradients(self) -> None:
        states = np.full(len(self._parameters), NO_GRADIENT)
        places: list[int] = []
        gradients: list[Tensor] = []
        for i, parameter in enumerate(self._parameters):
            gradient = parameter.grad
            if not parameter.requires_grad:
                states[i] = FROZEN
            elif gradient is not None:
                places.append(i)
                gradients.append(gradient)
        found = self._shared_norms(places) or norms_of(gradients)
        if self._shards.any or any(isinstance(norm, Tensor) for norm in found):
            device = next((x.device for x in found if isinstance(x, Tensor)), torch.device("cpu"))
            stacked = torch.stack([torch.as_tensor(x, dtype=torch.float64).to(device) for x in found])
            values = self._shards.whole_norms(stacked, places).tolist() if found else []
        else:
            values = [float(norm) for norm in found]
        scale = self._scale or 1.0
        self._norms = {place: value * scale for place, value in zip(places, values, strict=True)}
        for place, value in zip(places, values, strict=True):
            states[place] = ZERO if value == 0 else FINITE if math.isfinite(value) else NONFINITE
        self._states = states
        key = tuple(places)
        if key != self._sampled_places:
            self._sampled_places, self._gradient_samples = key, _Samples(gradients)
        self._begun = _Gradients(places, gradients, self._gradient_samples)

    def _shared_norms(self, places: Sequence[int]) -> list[Number] | None:
        """What a probe of gradients has just measured of the same ones."""
        measured = self._grads.measured if self._grads is not None else None
        if measured is None or measured is self._last_measured:
            return None  # not at this step
        self._last_measured = measured
        norms, parameters = measured
        by_parameter = dict(zip(map(id, parameters), norms.tolist(), strict=True))
        found = [by_parameter.get(id(self._parameters[place])) for place in places]
        return None if any(norm is None for norm in found) else [norm for norm in found if norm is not None]

    def _up_to_backward(self) -> Vitals:
        terms, weights, total = self._losses_of_step()
        vitals = Vitals(
            0,
            terms=terms,
            weights=weights,
            total=total,
            inputs=self._inputs,
            alphas={name: _joined(calls) for name, calls in self._alphas.items()},
            uncleared=self._uncleared or (),
            rates=self._rates(),
            held=self._held(),
            loose=self._loose,
            owners=self._owners,
        )
        vitals = self._with_gradients(vitals) if self._states is not None else vitals
        return dataclasses.replace(vitals, ran=frozenset(self._all_that_ran()))

    def _with_gradients(self, vitals: Vitals) -> Vitals:
        assert self._states is not None
        states = self._states
        by_parameter = states.tolist()
        sums = [0.0] * len(self._modules)
        worst = [FROZEN] * len(self._modules)
        for place, slots in enumerate(self._slots):
            norm = self._norms.get(place, 0.0)
            for slot in slots:
                worst[slot] = max(worst[slot], by_parameter[place])
                sums[slot] = math.hypot(sums[slot], norm) if sums[slot] else norm
        bad = tuple(self._names[i] for i in np.flatnonzero(states == NONFINITE))
        norms = [self._norms[place] for place in self._norms]
        total = math.hypot(*norms) if norms else None
        self.param_norms = {self._names[place]: norm for place, norm in self._norms.items()}
        local = [float(norm) for norm in self._local.values()]
        return dataclasses.replace(
            vitals,
            grad_norm=total,
            grad_norm32=None if total is None else _as_float32(norms, total),
            norms=dict(zip(self._modules, sums, strict=True)),
            states=dict(zip(self._modules, worst, strict=True)),
            bad_parameters=bad,
            parameters=dict(zip(self._names, by_parameter, strict=True)),
            local_norm=math.hypot(*local) * (self._scale or 1.0) if local else None,
        )

    def _only_of(self, optimizer: Optimizer, vitals: Vitals) -> Vitals:
        """Of several optimisers the one that is about to step: the gradients of others are not ready."""
        if self._states is None:
            return vitals
        held = {self._place.get(id(p)) for group in optimizer.param_groups for p in group["params"]}
        kept, self._norms = self._norms, {place: norm for place, norm in self._norms.items() if place in held}
        found = self._with_gradients(vitals)
        self._norms = kept
        mine = {self._names[place] for place in held if place is not None}
        owners = {module for name in mine for module in self._owners[name]}
        return dataclasses.replace(
            found,
            bad_parameters=tuple(name for name in found.bad_parameters if name in mine),
            norms={name: norm for name, norm in found.norms.items() if name in owners},
            states={name: state for name, state in found.states.items() if name in owners},
            parameters={name: state for name, state in found.parameters.items() if name in mine},
        )

    def _all_that_ran(self) -> Iterator[str]:
        yield from self._ran
        for module in self._modules:
            if module in self._ran:
                continue
            if module not in self._used_by_parents and self._states is not None:
                got = (self._states[p] >= ZERO for p, slots in enumerate(self._slots) if self._slot(module) in slots)
                if any(got):
                    self._used_by_parents.add(module)
            if module in self._used_by_parents:
                above = module
                while above != ROOT and above not in self._ran:
                    above = above.rpartition(".")[0] or ROOT
                if above in self._ran:
                    yield module

    def _slot(self, module: str) -> int:
        return self._slot_of[module]

    @functools.cached_property
    def _slot_of(self) -> dict[str, int]:
        return {name: slot for slot, name in enumerate(self._modules)}

    def _digests(self) -> dict[str, str]:
        """Of every gradient, as :meth:`~bifusion_diag.replay.step.Training.backward` leaves it."""
        inverse = self._subject.inverse_scale()
        found: dict[str, str] = {}
        for path, parameter in self._subject.model.named_parameters():
            gradient = parameter.grad
            if gradient is not None:
                found[plain_name(path)] = digest(
                    gradient if inverse is None else gradient * inverse.to(gradient.device, torch.float32)
                )
        return found

    def _altered(self) -> tuple[str, ...]:
        if self._begun is None:
            return ()
        held = {self._place.get(id(p)) for o in self._of_step() for group in o.param_groups for p in group["params"]}
        places = self._begun.altered([p.grad for p in self._parameters], self._norms, self._scale)
        return tuple(self._names[place] for place in places if place in held)

    def _spoilt(self, altered: tuple[str, ...]) -> tuple[str, ...]:
        """Those that were made NaN or infinite; all, where the whole step's gradient has become zero."""
        if not altered:
            return ()
        there = {self._names[place]: p.grad for place, p in enumerate(self._parameters) if p.grad is not None}
        norms = dict(zip(there, map(float, norms_of(list(there.values()))), strict=True))
        if not any(norms.values()):
            return altered
        return tuple(name for name in altered if not math.isfinite(norms.get(name, 0.0)))

    def _of_step(self) -> tuple[Optimizer, ...]:
        assert self._stepping is not None
        return (self._stepping,)

    def _scaled_out(self, vitals: Vitals) -> bool:
        """Whether a GradScaler has found an overflow that its scale can explain."""
        if self._scale is None or not vitals.bad_parameters:
            return False
        if not all(math.isfinite(value) for value in vitals.terms.values()):
            return False
        if self._stepping is not None and not self._found_inf:
            return False  # the optimiser steps all the same
        largest = max([1.0, self._usual_norm or 1.0, *map(abs, vitals.terms.values())])
        return largest / self._scale > OVERFLOW[self._half]

    # --- optimisers and weights ----------------------------------------------------------------------------------

    def _rates(self) -> dict[str, float]:
        rates: dict[str, float] = {}
        for number, optimizer in enumerate(self._subject.optimizers):
            for index, group in enumerate(optimizer.param_groups):
                if "lr" in group:
                    name = str(group.get("name", index))
                    name = f"{number}:{name}" if number else name
                    rates[name if name not in rates else f"{name} {index}"] = float(group["lr"])
        return rates

    def _held(self) -> frozenset[str]:
        groups = [group["params"] for optimizer in self._subject.optimizers for group in optimizer.param_groups]
        sizes = tuple(map(len, groups))
        if sizes != self._held_sizes or not sizes:
            self._held_sizes = sizes
            held = {self._place.get(id(p)) for group in groups for p in group} - {None}
            self._held_places = frozenset(place for place in held if place is not None)
            self._held_modules = frozenset(
                self._modules[slot] for place in self._held_places for slot in self._slots[place]
            )
            self._not_held = [i for i in range(len(self._parameters)) if i not in self._held_places]
        return self._held_modules

    @property
    def _loose(self) -> frozenset[str]:
        if not self._subject.optimizers:
            return frozenset()
        self._held()
        return frozenset(self._names[i] for i in self._not_held if self._parameters[i].requires_grad)

    def _sampled(self) -> NDArray[np.float64] | None:
        """A sample of every parameter, (P, 64); None while some have no shape yet."""
        if any(map(is_lazy, self._parameters)):
            return None
        if self._weights is None:
            self._weights = _Samples(self._parameters)
            self._sampled_at = self._weights.measured
        return self._weights.take(self._parameters)

    def _outside(self) -> dict[str, float]:
        before, now = self._after, self._before
        if before is None or now is None or before.shape != now.shape:
            return {}
        did_move = (before != now).any(1) & ~(np.isnan(before) & np.isnan(now)).any(1)
        did_move &= np.isin(np.arange(len(did_move)), list(self._held_places))
        if not did_move.any():
            return {}
        here = np.flatnonzero(did_move).tolist()
        _, ratio = self._by_module(did_move, _norm(now - before), _norm(before), here)
        return ratio

    def _by_module(
        self, did_move: NDArray[np.bool_], change: NDArray[np.float64], size: NDArray[np.float64], places: Any
    ) -> tuple[dict[str, bool], dict[str, float]]:
        """Whether the weights of a module moved, and how far, of the parameters at some places."""
        moved: dict[str, bool] = {}
        sums: dict[str, tuple[float, float]] = {}
        for place in places:
            if not self._sampled_at[place]:
                continue
            for slot in self._slots[place]:
                name = self._modules[slot]
                moved[name] = moved.get(name, False) or bool(did_move[place])
                far, long = sums.get(name, (0.0, 0.0))
                sums[name] = math.hypot(far, change[place]), math.hypot(long, size[place])
        ratio = {name: far / long if long else float(far > 0) for name, (far, long) in sums.items()}
        return moved, {name: math.inf if math.isnan(value) else value for name, value in ratio.items()}

    # --- buffers -------------------------------------------------------------------------------------------------

    def _bad_buffers(self) -> list[str]:
        """Names of the small ones that hold NaN or infinite values."""
        names: list[str] = []
        buffers: list[Tensor] = []
        for name, held, key in self._buffer_places:
            buffer = held.get(key)
            if type(buffer) is Tensor and buffer.is_floating_point() and 0 < buffer.numel() <= SMALL_BUFFER:
                names.append(name)
                buffers.append(buffer.detach())
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for buffer in buffers:
            if buffer.layout == torch.strided and buffer.element_size() > 1:
                by_kind.setdefault((buffer.device, buffer.dtype), []).append(buffer.reshape(-1))
        if all(bool(torch.cat(alike).sum(dtype=torch.float64).isfinite()) for alike in by_kind.values()):
            return []  # the sum of finite numbers, in float64, is finite
        return [name for name, x in zip(names, buffers, strict=True) if not bool(x.isfinite().all())]

    def _new_bad_buffers(self) -> tuple[str, ...]:
        known = self._buffers_bad or frozenset()
        bad = self._bad_buffers()
        self._buffers_bad = frozenset(bad)
        return tuple(name for name in bad if name not in known)


@dataclass
class _Gradients:
    """A sample of every gradient when the backward has ended.

    Attributes:
        places: of the parameters that have one.
        gradients: the tensors, to be compared with what the optimiser sees.
        samples: what samples them.
    """

    places: list[int]
    gradients: Sequence[Tensor]
    samples: _Samples

    def __post_init__(self) -> None:
        self.versions = [gradient._version for gradient in self.gradients]
        self.before = self.samples.take(self.gradients)

    def altered(self, gradients: Sequence[Tensor | None], norms: Mapping[int, float], scale: float | None) -> list[int]:
        """Places of those that are not what they were times a factor that all have in common, or clipped."""
        now = [gradients[place] for place in self.places]
        gone = [i for i, gradient in enumerate(now) if gradient is None]
        if gone:
            return [self.places[i] for i in gone if norms[self.places[i]] > 0]
        there = [gradient for gradient in now if gradient is not None]
        alike = [
            a is b or (a.shape == b.shape and a.device == b.device and a.layout == b.layout)
            for a, b in zip(self.gradients, there, strict=True)
        ]
        if not all(alike):
            return [place for place, same in zip(self.places, alike, strict=True) if not same]
        after = self.samples.take(there)
        return self._compare(after, there, norms, scale)

    def _compare(
        self, after: NDArray[np.float64], there: Sequence[Tensor], norms: Mapping[int, float], scale: float | None
    ) -> list[int]:
        before = self.before
        with np.errstate(all="ignore"):
            size = (before * before).sum(1)
            factor = (before * after).sum(1) / size
            rest = _norm(after - factor[:, None] * before) / np.maximum(_norm(after), 1e-300)
        judged = self.samples.measured & (size > 0) & np.isfinite(before).all(1)
        if not judged.any():
            return []
        usual = float(np.median(factor[judged & np.isfinite(factor)])) if np.isfinite(factor[judged]).any() else 1.0
        known = max(1.0, scale or 1.0) if usual > 1 else min(1.0, scale or 1.0) if scale is not None else 1.0
        shrunk = (np.abs(after) <= np.abs(before) * max(known, usual) * (1 + ALIKE)) & (after * before >= 0)
        clipped = (usual != 0) & shrunk.all(1) & (_norm(after) >= GONE * abs(usual) * np.sqrt(size))
        same = (rest < ALIKE) & (np.abs(factor - usual) <= ALIKE * abs(usual)) & (usual != 0)
        odd = judged & ~same & ~clipped
        odd |= judged & ~np.isfinite(after).all(1)
        if odd.sum() > max(1, len(odd) // 2):  # clipping has spread it: to blame is what was written to once more
            writes = np.array([now._version - then for now, then in zip(there, self.versions, strict=True)])
            more = odd & (writes > np.median(writes))
            odd = more if 0 < more.sum() <= len(odd) // 2 else odd
        elsewhere = self._elsewhere(there, odd, usual, norms, scale)
        return [self.places[i] for i in sorted({*np.flatnonzero(odd).tolist(), *elsewhere})]

    def _elsewhere(
        self, there: Sequence[Tensor], odd: NDArray[np.bool_], usual: float, norms: Mapping[int, float], scale: Any
    ) -> list[int]:
        """Those written to more or less often than most, and whose norm shows it though their sample does not."""
        writes = [now._version - then for now, then in zip(there, self.versions, strict=True)]
        most = Counter(writes).most_common(1)[0][0]
        few = [i for i, count in enumerate(writes) if count != most and not odd[i]]
        found: list[int] = []
        for i in few if len(few) <= max(1, len(writes) // 10) else []:
            expected = norms[self.places[i]] / (scale or 1.0) * abs(usual)
            norm = float(norm_of(there[i]))
            if not norm <= expected * (1 + ALIKE):
                found.append(i)
        return found


class _Samples:
    """Samples of tensors that come again and again, in the same sizes, on the host: of each 64 elements in four runs of
    neighbours, or all that it has.

    One pass over many small views: Python's part of it is the dearest, and is kept where the memory is the same.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._size = len(tensors)
        self.measured = np.zeros(len(tensors), bool)
        self._groups: list[_Group] = []
        by_device: dict[tuple[torch.device, torch.dtype], dict[int, int]] = {}
        for i, x in enumerate(tensors):
            line = _line(x)
            if line is not None:
                by_device.setdefault((line.device, line.dtype), {})[i] = line.numel()
                self.measured[i] = True
        for sizes in by_device.values():
            self._groups.append(_Group({i: n for i, n in sizes.items() if n >= WIDTH}, long=True))
            self._groups.append(_Group({i: n for i, n in sizes.items() if n < WIDTH}, long=False))

    def take(self, tensors: Sequence[Tensor]) -> NDArray[np.float64]:
        """(n, 64): zeros where a tensor has fewer elements or is not measured."""
        found = np.zeros((self._size, WIDTH))
        for group in self._groups:
            group.take(tensors, found)
        return found


class _Group:
    """Tensors of one device and type; all long, or all short."""

    def __init__(self, sizes: Mapping[int, int], long: bool) -> None:
        self.places = list(sizes)
        self._long = long
        self._steps = [spacing(n, RUNS) for n in sizes.values()] if long else []
        rows = np.repeat(np.arange(len(sizes)), list(sizes.values())) if not long else np.zeros(0, int)
        columns = np.concatenate([np.arange(n) for n in sizes.values()]) if sizes and not long else np.zeros(0, int)
        self._targets = np.asarray(self.places, int)[rows] if not long and sizes else rows, columns
        self._pointers: list[int] = []
        self._views: list[Tensor] = []

    def take(self, tensors: Sequence[Tensor], found: NDArray[np.float64]) -> None:
        if not self.places:
            return
        held = [tensors[i] for i in self.places]
        pointers = [local_part(x).data_ptr() for x in held]
        if pointers != self._pointers:
            lines = [_line(x) for x in held]
            if any(line is None for line in lines):
                return  # memory that has gaps now
            whole = [line for line in lines if line is not None]
            if self._long:
                self._views = [x.as_strided((RUNS, RUN), (n, 1)) for x, n in zip(whole, self._steps, strict=True)]
            else:
                self._views = [x.reshape(-1) for x in whole]
            self._pointers = pointers
        values = torch.cat(self._views).to("cpu", torch.float64).numpy()
        if self._long:
            found[self.places] = values.reshape(len(self.places), WIDTH)
        else:
            found[self._targets] = values


def _line(x: Tensor) -> Tensor | None:
    """The elements that this process holds, as they lie in memory; None where there are none, or gaps."""
    kind = type(x)
    if (kind is Tensor or kind is nn.Parameter) and x.layout == torch.strided and not x.is_complex():
        if x.numel() == 0 or (x.element_size() == 1 and x.is_floating_point()):
            return None
        return x.detach() if x.is_contiguous() else flat(x.detach())
    if x.layout != torch.strided:
        return None
    held = numbers(local_part(x.detach()))
    return flat(held) if held.numel() else None


def _range(
    tensors: Sequence[tuple[int, Tensor]], listed: bool, size: int | None, rows: Tensor | None, before: float
) -> InputRange:
    """The range of an input. Which sample it is of is looked for where it is larger than ever before."""
    largest, bad, sample = 0.0, 0, None
    for place, tensor in tensors:
        x = tensor.detach()
        low, high = (float(value) for value in torch.aminmax(x))
        here, count = max(abs(low), abs(high)), 0
        if not math.isfinite(here):
            wrong = ~x.isfinite()
            count = int(wrong.sum())
            here = float(x.masked_fill(wrong, 0).abs().max())
        if (count and not bad) or (not bad and here > max(before, largest)):
            row = place if listed else _row(x, count > 0, size, rows)
            sample = row if row is not None else sample
        bad += count
        largest = max(largest, here)
    return InputRange(largest, bad, sample)


def _row(x: Tensor, bad: bool, size: int | None, rows: Tensor | None) -> int | None:
    if not x.dim() or (rows is None and len(x) != size):
        return None
    marks = (~x.isfinite()).float() if bad else x.abs()
    row = int(marks.flatten(1).amax(1).argmax()) if x.dim() > 1 else int(marks.argmax())
    if rows is None:
        return row
    return int(rows[row]) if len(x) == len(rows) else row if len(x) == int(rows.max()) + 1 else None


def _alpha(alpha: Tensor) -> Tensor:
    """Finite values, their sum, how many are low, high and not finite: (5,) float64."""
    x = alpha.detach().float()
    finite = x.isfinite()
    x = torch.where(finite, x, 0.5)
    parts = (finite.sum(), (x * finite).sum(), (x < 0.05).sum(), (x > 0.95).sum(), (~finite).sum())
    return torch.stack([part.double() for part in parts])


def _joined(calls: Sequence[Tensor]) -> Alpha:
    count, total, low, high, bad = torch.stack(list(calls)).sum(0).tolist()
    return Alpha(total / max(count, 1), low / max(count, 1), high / max(count, 1), int(bad))


def _mean_each(lists: Sequence[Sequence[Tensor]]) -> list[float | None]:
    """The mean of each list, None of an empty one; one copy from the device."""
    every = [value for values in lists for value in values]
    if not every:
        return [None] * len(lists)
    device = every[0].device
    numbers_ = iter(torch.stack([value.detach().to(device, torch.float64).reshape(()) for value in every]).tolist())
    found = [[next(numbers_) for _ in values] for values in lists]
    return [sum(values) / len(values) if values else None for values in found]


def _as_float32(norms: Sequence[float], total: float) -> float:
    """The norm as float32 code computes it, which squares first."""
    squares = [norm**2 if norm < 1e150 else math.inf for norm in norms]
    if math.isnan(total) or any(math.isnan(square) for square in squares):
        return math.nan
    over = any(square > FLOAT32_MAX for square in squares) or sum(squares) > FLOAT32_MAX
    return math.inf if over else total


def _norm(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """L2 norm of each row; NaN where an element is."""
    with np.errstate(all="ignore"):
        return np.sqrt((rows * rows).sum(1))
