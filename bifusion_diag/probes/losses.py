"""Every loss term, raw and weighted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bifusion_diag.probes.base import Call, Probe, Reading, Schedule, Subject
from bifusion_diag.probes.loss_terms import ANY, TermFinder
from bifusion_diag.probes.norms import to_float32


class LossesProbe(Probe):
    """Records the loss and its terms, which :class:`~bifusion_diag.probes.loss_terms.TermFinder` finds: told by
    ``monitor.losses``, in the output of a criterion or of the model, or of loss modules inside the model.

    Where a term is seen several times in a step, as with gradient accumulation, the mean is recorded. NaN stays NaN.

    Args:
        modules: name patterns of the modules whose outputs are read, instead of the criterion's and the model's.
        fields: where their outputs keep ``terms``, ``weights`` and ``total``.
    """

    prefix = "loss"
    KEYS: ClassVar[dict[str, str]] = {
        "total": "the loss that is differentiated; where the model returns none, the sum of its terms",
        "<term>/raw": "the term before its weight",
        "<term>/weighted": "the term's share of the total: weight × raw; not recorded where the weight is not known",
    }

    def __init__(
        self,
        *,
        modules: Sequence[str] = ANY,
        fields: Mapping[str, str | int] | None = None,
        name: str | None = None,
        every: int | Schedule | None = None,
    ) -> None:
        super().__init__(name=name, every=every)
        self._finder = TermFinder(modules, fields)
        self._calls: list[tuple[tuple[str, ...], Tensor]] = []  # keys, and their values (K,)
        self._found = False  # a term, in some step

    def attach(self, subject: Subject) -> None:
        self._finder.attach(subject)

    def watches(self, name: str, module: nn.Module) -> bool:
        return self._finder.watches(name, module)

    def reads(self, output: Any) -> bool:
        return self._finder.reads(output)

    def begin(self) -> None:
        self._calls = []

    def seen(self, call: Call) -> None:
        found = self._finder.find(call)
        if found is None:
            return
        self._found = True
        loss, better = found
        if better:
            self._calls = []
        raw = {f"{term}/raw": value.detach() for term, value in loss.terms.items()}
        values = {} if loss.total is None else {"total": loss.total.detach()}
        values |= raw
        for term, weight in loss.weights.items():
            plain = weight.detach() if isinstance(weight, Tensor) else weight
            values[f"{term}/weighted"] = raw[f"{term}/raw"] * plain
        device = next(iter(values.values())).device
        packed = torch.stack([value.to(device).double().reshape(()) for value in values.values()])
        self._calls.append((tuple(values), packed))

    def describe(self) -> str | None:
        """What to do where no loss was found."""
        told = "where the model does not return it, call monitor.losses({'loss': loss}) before backward()"
        return None if self._found else f"{self.name}: no loss was found; {told}"

    def collect(self) -> Iterator[Reading]:
        if not self._calls:
            return
        keys, values = self._calls[0]
        if len(self._calls) > 1:
            keys, values = self._mean()
        if "total" not in keys:
            added = [i for i, key in enumerate(keys) if key.endswith("/weighted")] or range(len(keys))
            total = torch.stack([values[i] for i in added]).sum(0, keepdim=True)
            keys, values = ("total", *keys), torch.cat([total, values])
        yield Reading(tuple(f"{self.name}/{key}" for key in keys), to_float32(values))

    def _mean(self) -> tuple[tuple[str, ...], Tensor]:
        """The mean of every key over the calls that have it."""
        keys = self._calls[0][0]
        if all(other == keys for other, _ in self._calls):
            return keys, torch.stack([values for _, values in self._calls]).mean(0)
        by_key: dict[str, list[Tensor]] = {}
        for names, values in self._calls:
            for name, value in zip(names, values.unbind(), strict=True):
                by_key.setdefault(name, []).append(value.to(self._calls[0][1].device))
        order = {"total": 0, "raw": 1, "weighted": 2}
        means = {key: torch.stack(values).mean() for key, values in by_key.items()}
        keys = tuple(sorted(means, key=lambda key: order[key.rsplit("/", 1)[-1]]))
        return keys, torch.stack([means[key] for key in keys])
