"""Which loss term a bad step comes from: every term's own gradient, by module."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bifusion_diag.probes.loss_terms import LossTerms
from bifusion_diag.probes.norms import norms_of
from bifusion_diag.probes.owners import Owners, owners_of
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Training

MAX_TERMS = 12  # are differentiated; of more, those that are largest with their weights
LOSS_KINDS = ("loss-spike", "loss-shift")  # judged by the terms' values
SPIKES = (*LOSS_KINDS, "gradient-spike", "overflowed-norm")  # come from some term, even where none has jumped
JUMP = 2.0  # times the contrast's gradient, from which on a term has jumped
PART = 0.5  # of the strongest term's excess, from which on another is named beside it


@dataclass(frozen=True)
class TermTable:
    """The loss terms of one step and the gradient that each of them alone gives, with its weight.

    Attributes:
        losses: raw terms.
        weights: ∂ total / ∂ term as the step computed its total, of the terms that take part in it.
        norms: term → module → L2 norm of the gradient on the module's own parameters, weight applied. A term that
            was not differentiated, as it has no graph, is missing.
        whole: term → L2 norm on all parameters.
        bad: term → modules where its gradient is NaN or infinite.
    """

    losses: Mapping[str, float]
    weights: Mapping[str, float]
    norms: Mapping[str, Mapping[str, float]]
    whole: Mapping[str, float]
    bad: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """As an incident's tables hold it: one row a term, JSON."""
        return [
            {
                "term": name,
                "loss": loss,
                "weight": self.weights.get(name),
                "gradient": self.whole.get(name),
                "bad_modules": list(self.bad.get(name, ())),
                "modules": dict(self.norms.get(name, {})),
            }
            for name, loss in self.losses.items()
        ]


@dataclass(frozen=True)
class TermShare:
    """One term's part in a bad step.

    Attributes:
        name: of the term.
        why: in words, with the numbers.
        share: 0..1 of what is bad that it explains; 1 for a term that is not finite.
    """

    name: str
    why: str
    share: float


def term_gradients(training: Training, notes: StepNotes, *, only: Collection[str] | None = None) -> TermTable:
    """Run the step's forward once and a backward for each term.

    Args:
        training: what is run, at the weights of now.
        notes: of the step: the bad one's, or as a contrast those of an earlier healthy one.
        only: of these terms alone; None: of all.

    Returns:
        The table. The training is as it was before.
    """
    try:
        return _measure(training, notes, only, again=False)
    except RuntimeError:  # a function of the user's whose backward cannot run twice
        return _measure(training, notes, only, again=True)


def attribute_term(
    table: TermTable,
    kind: str,
    contrast: TermTable | None = None,
    *,
    typical: Mapping[str, float] | None = None,
    module: str | None = None,
) -> list[TermShare]:
    """The guilty terms, the strongest first. All of them where what they share is bad: then no term is to blame
    before another.

    Args:
        table: of the bad step.
        kind: of the incident.
        contrast: of a healthy step at the same weights.
        typical: median of each raw term over the steps before.
        module: where the gradient has jumped; None: anywhere.
    """
    if kind.startswith("nonfinite"):
        return _not_finite(table)
    if kind in LOSS_KINDS:
        usual = typical or {}
        turned = {name: loss for name, loss in table.losses.items() if loss < 0 < usual.get(name, 0.0)}
        if turned:
            return [
                TermShare(name, f"it is {loss:.4g}, and was {usual[name]:.4g}", 1.0) for name, loss in turned.items()
            ]
        now = {name: _weighted(table, name, loss) for name, loss in table.losses.items()}
        before = contrast.losses if contrast is not None else typical or {}
        then = {name: _weighted(table, name, before[name]) for name in now if name in before}
        return _jumped(now, then, "the weighted loss", always=True)
    if kind == "input-outlier":  # a bounded gradient, as of a smooth L1 loss, does not show it
        before = contrast.losses if contrast is not None else typical or {}
        losses = {name: _weighted(table, name, loss) for name, loss in table.losses.items()}
        then = {name: _weighted(table, name, before[name]) for name in losses if name in before}
        if far := _jumped(losses, then, "the weighted loss", always=False):
            return far
    now = {name: _norm(table, name, module) for name in table.whole}
    then = {} if contrast is None else {name: _norm(contrast, name, module) for name in contrast.whole}
    what = "its gradient" if module is None else f"its gradient on {module}"
    return _not_finite(table) or _jumped(now, then, what, always=kind in SPIKES)


def _not_finite(table: TermTable) -> list[TermShare]:
    values = [name for name in table.weights if not math.isfinite(table.losses[name])]
    if values:
        return [TermShare(name, f"its value is {table.losses[name]}", 1.0) for name in values]
    found = [(name, modules) for name, modules in table.bad.items() if modules]
    found.sort(key=lambda entry: -len(entry[1]))
    return [
        TermShare(name, f"its own gradient is not finite in {len(modules)} modules", 1.0) for name, modules in found
    ]


def _jumped(now: Mapping[str, float], then: Mapping[str, float], what: str, *, always: bool) -> list[TermShare]:
    """Terms by how much more of it there is now than in the contrast; the largest, if `always`, where none is more."""
    now = {name: value for name, value in now.items() if value > 0}
    ratio = {name: value / max(then.get(name, 0.0), 1e-12 * value) for name, value in now.items()}
    excess = {name: value - then.get(name, 0.0) for name, value in now.items()}
    if not any(name in then and ratio[name] >= JUMP for name in now):
        if not always:
            return []
        excess = dict(now)  # no term differs from the contrast: the largest are what there is to say
        ratio = dict.fromkeys(now, 1.0)
    whole = sum(max(value, 0.0) for value in excess.values())
    order = sorted(excess, key=lambda name: -excess[name])
    found = []
    for name in order:
        first = order[0]
        alike = ratio[first] > 1 and ratio[name] >= max(JUMP, ratio[first] / 3)
        if excess[name] > 0 and (name == first or alike or excess[name] >= PART * excess[first]):
            beside = f", {then[name]:.3g} in the contrast step" if name in then else ""
            found.append(TermShare(name, f"{what} is {now[name]:.3g}{beside}", excess[name] / whole))
    return found


def _weighted(table: TermTable, name: str, loss: float) -> float:
    return abs(table.weights.get(name, 1.0)) * loss


def _norm(table: TermTable, name: str, module: str | None) -> float:
    norms = table.norms.get(name, {})
    return norms[module] if module is not None and module in norms else table.whole[name]


def _measure(
    training: Training, notes: StepNotes, only: Collection[str] | None, *, follow: bool = False, again: bool = False
) -> TermTable:
    """``follow``: see :class:`_Origins`; ``again``: the graph bears one backward only, so that each gets its own."""
    owners = owners_of(training.model)
    norms: dict[str, dict[str, float]] = {}
    whole: dict[str, float] = {}
    with _forward(training, notes, follow) as loss:
        if not follow and _is_cut(loss):
            return _measure(training, notes, only, follow=True, again=again)
        losses = {name: float(term.detach()) for name, term in loss.terms.items()}
        weights = _weights(loss)
        chosen = _chosen(loss, losses, weights, only)
        for name in chosen if not again else ():
            norms[name], whole[name] = _gradient(training, owners, loss.terms[name], weights[name])
    for name in chosen if again else ():
        with _forward(training, notes, follow) as loss:
            norms[name], whole[name] = _gradient(training, owners, loss.terms[name], weights[name])
    bad = {name: tuple(m for m, norm in found.items() if not math.isfinite(norm)) for name, found in norms.items()}
    told = {name: float(weight.detach()) for name, weight in weights.items()}
    return TermTable(losses, told, norms, whole, bad)


@contextmanager
def _forward(training: Training, notes: StepNotes, follow: bool) -> Iterator[LossTerms]:
    """The step's forward; its graph lives inside."""
    with notes.again() as batch:
        if not follow:
            yield training.loss(batch)
            return
        with _Origins() as origins:
            loss = training.loss(batch)
        yield loss._replace(terms={name: origins.of(term) for name, term in loss.terms.items()})


def _is_cut(loss: LossTerms) -> bool:
    assert loss.total is not None
    return loss.total.requires_grad and not all(term.requires_grad for term in loss.terms.values())


class _Origins(TorchFunctionMode):
    """Remembers what detached scalars were: many loops return their terms detached, for a log, beside the total."""

    FOLLOWED = ("detach", "detach_", "clone", "cpu", "to", "float", "double", "reshape", "view", "squeeze", "__get__")

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[Tensor, Tensor]] = {}  # by id; the results are kept, so that ids stay theirs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (
            isinstance(result, Tensor)
            and not result.requires_grad
            and result.numel() == 1
            and args
            and isinstance(args[0], Tensor)
            and args[0].numel() == 1
            and getattr(func, "__name__", "") in self.FOLLOWED
        ):
            origin = self.of(args[0])
            if origin.requires_grad:
                self._known[id(result)] = (result, origin)
        return result

    def of(self, tensor: Tensor) -> Tensor:
        """What it was before it was cut off; itself where that is not known."""
        return self._known.get(id(tensor), (tensor, tensor))[1]


def _weights(loss: LossTerms) -> dict[str, Tensor]:
    """∂ total / ∂ term, of the terms that take part. One that the total was not computed of, such as a copy, has the
    weight that was told, or takes no part where the others make up the total."""
    assert loss.total is not None
    total = loss.total
    parts = {name: _whole_scalar(term) for name, term in loss.terms.items() if term.requires_grad}
    found: dict[str, Tensor] = {}
    if total.requires_grad and parts:
        derivatives = torch.autograd.grad(total, list(parts.values()), retain_graph=True, allow_unused=True)
        found = {name: d.reshape(()) for name, d in zip(parts, derivatives, strict=True) if d is not None}
    explained = sum(float(weight) * float(loss.terms[name].detach()) for name, weight in found.items())
    complete = bool(found) and math.isclose(explained, float(total.detach()), rel_tol=1e-3, abs_tol=1e-6)
    for name in loss.terms:
        told = float(loss.weights.get(name, 1.0))
        if name not in found and not complete and told != 0:
            found[name] = torch.tensor(told, device=total.device)
    return {name: found[name] for name in loss.terms if name in found}


def _whole_scalar(term: Tensor) -> Tensor:
    """The tensor of one element that the loss function computed: a term is its view as ()."""
    base = term._base
    return base if base is not None and base.numel() == 1 and base.requires_grad else term


def _chosen(
    loss: LossTerms, losses: Mapping[str, float], weights: Mapping[str, Tensor], only: Collection[str] | None
) -> list[str]:
    """The terms to differentiate: those with a graph that take part."""
    names = [name for name in weights if loss.terms[name].requires_grad and (only is None or name in only)]
    size = {name: abs(losses[name] * float(weights[name])) for name in names}
    by_size = sorted(names, key=lambda name: -size[name] if math.isfinite(size[name]) else -math.inf)
    return [name for name in names if name in by_size[:MAX_TERMS]]


def _gradient(training: Training, owners: Owners, term: Tensor, weight: Tensor) -> tuple[dict[str, float], float]:
    """L2 norms of a term's weighted gradient: by module, and of all. Scaled and unscaled as mixed precision does."""
    for parameter in owners.parameters:
        parameter.grad = None
    scaler = training.scaler
    scale = float(scaler._scale) if scaler is not None and scaler.is_enabled() and scaler._scale is not None else 1.0
    term.backward(gradient=(weight * scale).to(term), retain_graph=True)
    held = [(slot, p) for slot, p in zip(owners.slots, owners.parameters, strict=True) if p.grad is not None]
    norms = [float(norm) / scale for norm in norms_of([p.grad for _, p in held if p.grad is not None])]
    squares: dict[int, float] = {}
    shared: dict[int, float] = {}
    for (slot, parameter), norm in zip(held, norms, strict=True):
        squares[slot] = squares.get(slot, 0.0) + norm * norm
        shared[id(parameter)] = norm * norm
    by_module = {owners.names[slot]: math.sqrt(square) for slot, square in squares.items()}
    return by_module, math.sqrt(sum(shared.values()))
