"""How much of an alignment loss's gradient is let through to each of its two sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bifusion_diag.probes.base import Call, Schedule, Subject, matches
from bifusion_diag.probes.fields import FieldProbe, Key, get_field

#: Of our criterion's arguments (predictions, batch): the two sides of each of its targets.
SIDES = (("0.encoder.global2d", "0.encoder.fused"), ("0.encoder.f2d", "0.encoder.f3d"))
CHUNK = 1 << 14  # rows that are compared at a time: 32 MiB an intermediate at 256 wide
_PARALLEL = 1e-4  # of 1 − cos²: below, the direction in which the cosine grows is lost in float32


class FlowProbe(FieldProbe):
    """Compares the gradients that one term, a function of cosines, sends to its two sides.

    Each cosine depends on both of its vectors alike: from the gradient at the second side follows the slope of the term
    with respect to each cosine, and from the slopes the gradient that the first side would get if nothing held it back.
    What arrives there, divided by that, is the share that is let through: r for ``f·r + f.detach()·(1 − r)``.

    It costs, at each measured step, one extra backward pass from the term to its two sides and no further. The sides
    are arguments of the module that returns the term. A side that requires no gradient gets a share of 0.

    Args:
        term: where the module's output keeps the term; "" for the output itself.
        sides: where its arguments keep the two sides, (R, C) each; of several pairs, the first that the term reaches.
        index: where they keep the row (R,) of the first side that each row of the second is compared with, if the first
            has fewer rows.
        valid: where they keep which rows (R,) bool are compared, if the first has as many. Where that is not there, the
            rows with a gradient are counted: `gain` is then too small where the loss is saturated for some pairs.
        modules: name patterns of the module; "*" is any whose output has the term.
    """

    prefix = "flow"
    period = 10
    TABLE: ClassVar[dict[str, Key]] = {
        "share": Key(
            "mean", "share of the term's gradient that is let through to the first side (2D); missing if none"
        ),
        "gain": Key(
            "max", "pairs × the steepest slope of the term with respect to a pair's cosine; 1/τ bounds −log σ(cos/τ)"
        ),
        "norm_2d": Key("mean", "L2 norm of the unweighted term's gradient at the first side (2D)"),
        "norm_3d": Key("mean", "L2 norm of its gradient at the second side (3D)"),
    }

    def __init__(
        self,
        *,
        term: str = "terms.clip_align",
        sides: Sequence[tuple[str, str]] = SIDES,
        index: str = "1.scene_index",
        valid: str = "0.encoder.valid",
        modules: Sequence[str] = ("*",),
        name: str | None = None,
        every: int | Schedule | None = None,
    ) -> None:
        super().__init__(modules=modules, name=name, every=every)
        self.term, self.sides, self.index, self.valid = term, tuple(sides), index, valid

    def attach(self, subject: Subject) -> None:
        self._subject = subject

    def watches(self, name: str, module: nn.Module) -> bool:
        return self.modules != ("*",) and matches(name, self.modules)

    def reads(self, output: Any) -> bool:
        return bool(self.term) and isinstance(get_field(output, self.term), Tensor)

    def seen(self, call: Call) -> None:
        term = get_field(call.output, self.term)
        if not isinstance(term, Tensor) or not term.requires_grad or not matches(call.name, self.modules):
            return
        for places in self.sides:
            first, second = (_argument(call, place) for place in places)
            if not isinstance(first, Tensor) or not isinstance(second, Tensor) or not second.requires_grad:
                continue
            asked = [second, first] if first.requires_grad else [second]
            with self._subject.paused():
                arrived = torch.autograd.grad(term, asked, torch.ones_like(term), retain_graph=True, allow_unused=True)
            if arrived[0] is None:
                continue  # the term depends on another pair
            at_first = arrived[1] if len(arrived) > 1 and arrived[1] is not None else torch.zeros_like(first)
            rows = None if len(first) == len(second) else _argument(call, self.index)
            valid = _argument(call, self.valid) if rows is None else torch.ones_like(rows, dtype=torch.bool)
            valid = valid if isinstance(valid, Tensor) and valid.shape == (len(second),) else None
            values = compare(first.detach(), second.detach(), at_first, arrived[0], rows, valid)
            self.record(tuple(self.TABLE), values)
            return


def compare(
    first: Tensor,
    second: Tensor,
    at_first: Tensor,
    at_second: Tensor,
    rows: Tensor | None,
    valid: Tensor | None = None,
) -> list[Tensor]:
    """The numbers of :class:`FlowProbe`, in the order of its table.

    Args:
        first: (P, C).
        second: (R, C).
        at_first: (P, C), the gradient there.
        at_second: (R, C), the gradient there.
        rows: (R,) int64, which row of the first each row of the second is compared with; None where P = R, its own.
        valid: (R,) bool, the rows that are compared; None where that is not known: those with a gradient.

    Returns:
        () float64 tensors.
    """
    free = torch.zeros(first.shape, dtype=torch.float64, device=first.device) if rows is not None else None
    zero = torch.zeros((), dtype=torch.float64, device=first.device)
    dot, square, steepest, pairs = zero, zero, zero, zero
    for begin in range(0, len(second), CHUNK):
        part = slice(begin, begin + CHUNK)
        ours = first[part] if rows is None else first.index_select(0, rows[part])
        gradient = at_second[part].double()
        slope, direction = _slopes(ours.double(), second[part].double(), gradient)
        pairs = pairs + (gradient != 0).any(1).sum()
        steepest = torch.maximum(steepest, slope.abs().amax())
        would_be = slope[:, None] * direction
        if free is None:
            dot = dot + (at_first[part].double() * would_be).sum()
            square = square + would_be.square().sum()
        else:
            assert rows is not None
            free.index_add_(0, rows[part], would_be)
    if free is not None:
        dot, square = (at_first.double() * free).sum(), free.square().sum()
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in (at_first, at_second)]
    pairs = pairs if valid is None else valid.sum()
    gain = torch.where(pairs > 0, pairs * steepest, torch.nan)
    return [dot / square, gain, *norms]


def _slopes(first: Tensor, second: Tensor, at_second: Tensor) -> tuple[Tensor, Tensor]:
    """Slope (R,) of the term with respect to each cosine, told by the gradient at the second side, and the derivative
    (R, C) of the cosine with respect to the first. Both 0 where the two vectors are parallel or one is zero."""
    lengths = [torch.linalg.vector_norm(side, dim=1, keepdim=True) for side in (first, second)]
    there = (lengths[0] > 0) & (lengths[1] > 0)
    one, other = (torch.where(there, side / length, 0.0) for side, length in zip((first, second), lengths, strict=True))
    cosine = (one * other).sum(1, keepdim=True)
    square = 1 - cosine.square()  # of the length of both derivatives, times the vectors' own
    there = there & (square > _PARALLEL)
    slope = (at_second * (one - cosine * other)).sum(1, keepdim=True) * lengths[1] / square
    direction = (other - cosine * one) / lengths[0]
    return torch.where(there, slope, 0.0)[:, 0], torch.where(there, direction, 0.0)


def _argument(call: Call, place: str) -> Any:
    """A part of an argument, by position or name."""
    first, _, rest = place.partition(".")
    given = get_field(call.inputs, int(first)) if first.isdigit() else call.keywords.get(first)
    return get_field(given, rest) if rest else given
