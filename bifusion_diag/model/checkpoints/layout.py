"""How a project names its weights, and what this project calls them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Rule(NamedTuple):
    """What one kind of tensor is called here."""

    pattern: str  # regular expression for the start of a name
    replacement: str  # of what it matches; may name its groups
    change: Callable[[Tensor], Tensor] | None = None  # from their shape to ours, where these differ


@dataclass(frozen=True)
class Layout:
    """A family of checkpoints.

    Attributes:
        name: of the family, for reports.
        signature: regular expressions, each of which fits the start of some name in every file of this family.
        rules: the first that fits a name holds.
        covers: beginnings of the names in our model that such a file may hold; what else the model has, it keeps.
            None: whatever parts the file has.
        aside: beginnings of names in such files that are no weights of the model.
    """

    name: str
    signature: tuple[str, ...]
    rules: tuple[Rule, ...]
    covers: tuple[str, ...] | None
    aside: tuple[str, ...] = ()

    def fits(self, names: Collection[str]) -> bool:
        """Whether a file of these names is of this family."""
        return all(any(re.match(pattern, name) for name in names) for pattern in self.signature)

    def translate(self, name: str, value: Tensor) -> tuple[str, Tensor] | None:
        """Our name and shape of a tensor, None where this project has no such thing."""
        for rule in self.rules:
            found = re.match(rule.pattern, name)
            if found:
                ours = found.expand(rule.replacement) + name[found.end() :]
                return ours, value if rule.change is None else rule.change(value)
        return None


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to: ``encoder.backbone``, ``decoder``, ..."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "encoder" else first
