"""Where a step's loss terms are found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from bifusion_diag.errors import UserError, near_matches

TOLD = "(told)"  # stands for a module where the loop tells its losses itself


class LossTerms(NamedTuple):
    """The loss by term, as a criterion returns it."""

    total: Tensor  # () what is differentiated
    terms: Mapping[str, Tensor]  # () each, before their weights
    weights: Mapping[str, float | Tensor]

    @classmethod
    def of(
        cls, terms: Mapping[str, Tensor], weights: Mapping[str, float | Tensor] | None, total: Tensor | None
    ) -> LossTerms:
        """Check and complete what a loop tells.

        Raises:
            UserError: no term, a term of several elements, or a weight of no term.
        """
        if not terms:
            raise UserError("losses(...): no term was given")
        for name, term in terms.items():
            if term.numel() != 1:
                raise UserError(f"losses(...): term {name!r} has {term.numel()} elements; give its mean or sum")
        known = dict(weights or {})
        for name in known:
            if name not in terms:
                raise UserError(f"losses(...): a weight for {name!r}, which is no term.{near_matches(name, terms)}")
        raw = {name: term.reshape(()) for name, term in terms.items()}
        complete = {name: known.get(name, 1.0) for name in terms}
        if total is None:
            total = torch.stack([complete[name] * term for name, term in raw.items()]).sum()
        return cls(total, raw, complete)
