"""Where a step's loss terms are found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from bifusion_diag.errors import UserError, near_matches
from bifusion_diag.probes.base import ROOT, Call, Subject, matches
from bifusion_diag.probes.fields import ABSENT, get_field

TOLD = "(told)"  # stands for a module where the loop tells its losses itself
FIELDS = ("terms", "weights", "total")
WHOLE = ("loss", "total_loss", "loss_total")  # keys of the sum, where an output has it beside its terms
ANY = ("*",)
BY_LOOP, BY_FIELDS, BY_KEYS, BY_LOSS_MODULE, BY_ROOT, NOT_YET = range(6)  # sources, the most explicit first


class LossTerms(NamedTuple):
    """The loss by term, as a criterion returns it."""

    total: Tensor | None  # () what is differentiated; None: the sum of the weighted terms
    terms: Mapping[str, Tensor]  # () each, before their weights
    weights: Mapping[str, float | Tensor]  # of all terms whose weight is known

    @classmethod
    def of(
        cls, terms: Mapping[str, Tensor], weights: Mapping[str, float | Tensor] | None, total: Tensor | None
    ) -> LossTerms:
        """Check and complete what a loop tells.

        Raises:
            UserError: no term; a term or a total that is no tensor of one element; a weight of several, or of no term.
        """
        if not terms:
            raise UserError("losses(...): no term was given")
        told = {f"term {name!r}": term for name, term in terms.items()} | ({} if total is None else {"total": total})
        for what, value in told.items():
            if not isinstance(value, Tensor):
                raise UserError(f"losses(...): {what} is a {type(value).__name__}; give a tensor of one element")
            if value.numel() != 1:
                raise UserError(f"losses(...): {what} has {value.numel()} elements; give its mean or sum")
        known = dict(weights or {})
        for name, weight in known.items():
            if name not in terms:
                raise UserError(f"losses(...): a weight for {name!r}, which is no term.{near_matches(name, terms)}")
            if isinstance(weight, Tensor) and weight.numel() != 1:
                raise UserError(f"losses(...): the weight of {name!r} has {weight.numel()} elements; give one")
        raw = {name: _scalar(term) for name, term in terms.items()}
        return cls(None if total is None else _scalar(total), raw, {name: known.get(name, 1.0) for name in raw})


class TermFinder:
    """Finds the loss terms of a step in what modules return. One source counts, the most explicit that was ever seen:

    1. what the loop tells: ``monitor.losses(terms, weights, total)``
    2. an output with ``terms`` (name → raw loss), ``weights`` (name → weight) and ``total``, of any module
    3. an output of the model that names its losses: scalars, or lists of scalars, which are summed, under keys that
       contain "loss" (torchvision's detectors, OpenMMLab), or under any keys where the output holds nothing but scalars
       that require a gradient (torchvision's RetinaNet), or an object with a scalar ``.loss`` (Transformers), its
       other fields with "loss" in their names, and its ``loss_dict``. The total is ``loss`` or ``total_loss`` where
       the others are parts of it, and then their weights are the total's derivatives; else it is the sum of all
    4. loss modules inside the model (``torch.nn.CrossEntropyLoss`` and all of its kind; of nested ones the outer) that
       return a scalar that requires a gradient. The term has the module's name, its weight is not known. The total
       is the scalar that the model returns, or else the sum of the terms
    5. the model returns one scalar that requires a gradient: the term "(root)"

    Of sources 2 and 3, the first module that is seen is the one from then on.

    Args:
        modules: name patterns of the modules whose outputs are read as in 2 and 3, instead of any and of the model.
        fields: where outputs as in 2 keep their fields, see :class:`~bifusion_diag.probes.FieldProbe`.

    Raises:
        UserError: `fields` names none of the three.
    """

    def __init__(self, modules: Sequence[str] = ANY, fields: Mapping[str, str | int] | None = None) -> None:
        self.modules = tuple(modules)
        self.places: dict[str, str | int] = {**{field: field for field in FIELDS}, **(fields or {})}
        for field in self.places:
            if field not in FIELDS:
                raise UserError(f"losses are read from no field {field!r}.{near_matches(field, FIELDS)}")
        self._rank = NOT_YET
        self._source = ""

    def attach(self, subject: Subject) -> None:
        """Learn which of the modules are losses."""
        self._subject = subject
        losses = [name for name, module in subject.modules.items() if isinstance(module, _Loss) and name != ROOT]
        self._loss_modules = {name for name in losses if not any(name.startswith(f"{other}.") for other in losses)}

    def watches(self, name: str, module: nn.Module) -> bool:
        """Whether :meth:`find` needs every call of this module."""
        return self._is_named(name) or name == ROOT or name in self._loss_modules

    def reads(self, output: Any) -> bool:
        """Whether an output, of any module, has terms, weights and total."""
        if isinstance(output, LossTerms):
            return True
        return all(get_field(output, place, ABSENT) is not ABSENT for place in self.places.values())

    def find(self, call: Call) -> tuple[LossTerms, bool] | None:
        """The terms in an output, and whether all that was found before in this step is to be forgotten, because this
        source is more explicit."""
        rank, found = self._look(call)
        if found is None or rank > self._rank:
            return None
        better = rank < self._rank
        if not better and rank in (BY_FIELDS, BY_KEYS) and call.name != self._source:
            return None
        self._rank, self._source = rank, call.name
        return found, better

    def _is_named(self, name: str) -> bool:
        return self.modules != ANY and matches(name, self.modules)

    def _look(self, call: Call) -> tuple[int, LossTerms | None]:
        output = call.output
        if call.name == TOLD:
            return BY_LOOP, output
        if matches(call.name, self.modules):
            terms, weights, total = (get_field(output, self.places[field]) for field in FIELDS)
            if isinstance(terms, Mapping) and isinstance(weights, Mapping) and isinstance(total, Tensor):
                return BY_FIELDS, LossTerms(total, terms, weights)
        if self._is_named(call.name) or (call.name == ROOT and self.modules == ANY):
            named = self._by_keys(output)
            if named is not None:
                return BY_KEYS, named
        if not _is_scalar(output) or not output.requires_grad:
            return NOT_YET, None
        if call.name in self._loss_modules:
            return BY_LOSS_MODULE, LossTerms(None, {call.name: _scalar(output)}, {})
        if call.name == ROOT and self._rank == BY_LOSS_MODULE:
            return BY_LOSS_MODULE, LossTerms(_scalar(output), {}, {})
        if call.name == ROOT:
            return BY_ROOT, LossTerms(None, {ROOT: _scalar(output)}, {ROOT: 1.0})
        return NOT_YET, None

    def _by_keys(self, output: Any) -> LossTerms | None:
        has_whole = not isinstance(output, Tensor) and _is_scalar(getattr(output, "loss", None))
        if isinstance(output, Mapping):
            fields: Mapping[Any, Any] = output
        elif has_whole:
            own = output._asdict() if hasattr(output, "_asdict") else getattr(output, "__dict__", {})
            fields = {"loss": output.loss, **own}
        else:
            return None
        terms: dict[str, Tensor] = {}
        origins: dict[str, Tensor] = {}  # what a total was computed of: of a list, its first entry
        only_losses = all(_is_scalar(value) and value.requires_grad for value in fields.values())
        for key, value in fields.items():
            inside = value.items() if key == "loss_dict" and isinstance(value, Mapping) else ((key, value),)
            for name, entry in inside:
                if isinstance(name, str) and (only_losses or "loss" in name) and (term := _summed(entry)) is not None:
                    terms[name], origins[name] = term, entry if isinstance(entry, Tensor) else entry[0]
        whole = next((name for name in WHOLE if name in terms), None)
        if whole is not None and len(terms) > 1:
            total, parts = terms[whole], {name: term for name, term in terms.items() if name != whole}
            weights = self._derivatives(total, {name: origins[name] for name in parts})
            if weights or has_whole or not total.requires_grad:
                return LossTerms(total, parts, weights)
        return LossTerms(None, terms, dict.fromkeys(terms, 1.0)) if terms else None

    def _derivatives(self, total: Tensor, parts: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        """Weights of the parts that the total was computed of."""
        asked = {name: part for name, part in parts.items() if part.requires_grad}
        if not asked or not total.requires_grad:
            return {}
        with self._subject.paused():
            found = torch.autograd.grad(total, list(asked.values()), retain_graph=True, allow_unused=True)
        return {name: _scalar(weight) for name, weight in zip(asked, found, strict=True) if weight is not None}


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and math.prod(value.shape) == 1


def _scalar(value: Tensor) -> Tensor:
    """A tensor of one element as (), in its graph. Hooks run without one."""
    with torch.enable_grad():
        return value.reshape(()) if value.dim() else value


def _summed(value: Any) -> Tensor | None:
    """A scalar, or the sum of a list of them."""
    if _is_scalar(value):
        return _scalar(value)
    if isinstance(value, (list, tuple)) and value and all(_is_scalar(entry) for entry in value):
        with torch.enable_grad():
            return torch.stack([_scalar(entry) for entry in value]).sum()
    return None
