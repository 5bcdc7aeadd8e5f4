"""Every loss term, raw and weighted."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from bifusion_diag.probes.base import Call
from bifusion_diag.probes.fields import FieldProbe, Key


class LossesProbe(FieldProbe):
    """Reads ``terms`` (name → raw loss), ``weights`` (name → weight) and ``total`` of the criterion's output.

    Where the criterion is called several times in a step, the mean of the calls is recorded. NaN stays NaN.
    """

    prefix = "loss"
    TABLE: ClassVar[dict[str, Key]] = {
        "total": Key("mean", "the loss that is differentiated"),
        "<term>/raw": Key("mean", "the term before its weight"),
        "<term>/weighted": Key("mean", "the term's share of the total: weight × raw"),
    }
    FIELDS = ("terms", "weights", "total")

    NAN_IS_MISSING = False

    def over_calls(self, key: str) -> str:
        return "mean"

    def reads(self, output: Any) -> bool:
        return self.has(output, self.FIELDS)

    def seen(self, call: Call) -> None:
        fields = self.fields_of(call, self.FIELDS)
        if fields is None:
            return
        terms, weights, total = fields
        raw = [term.detach() for term in terms.values()]
        weighted = [term * _plain(weights[key]) for key, term in zip(terms, raw, strict=True)]
        keys = tuple(f"{term}/{kind}" for kind in ("raw", "weighted") for term in terms)
        self.record(("total", *keys), [total.detach(), *raw, *weighted])


def _plain(weight: float | Tensor) -> float | Tensor:
    return weight.detach() if isinstance(weight, Tensor) else weight
