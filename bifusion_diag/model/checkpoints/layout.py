"""How a project names its weights, and what this project calls them."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """A family of checkpoints.

    Attributes:
        name: of the family, for reports.
        signature: regular expressions, each of which fits the start of some name in every file of this family.
        rules: pairs of a regular expression, tried in this order at the start of a name, and what replaces its match.
        covers: beginnings of the names in our model that such a file may hold; what else the model has, it keeps.
            None: whatever parts the file has.
        aside: beginnings of names in such files that are no weights of the model.
    """

    name: str
    signature: tuple[str, ...]
    rules: tuple[tuple[str, str], ...]
    covers: tuple[str, ...] | None
    aside: tuple[str, ...] = ()

    def fits(self, names: Collection[str]) -> bool:
        """Whether a file of these names is of this family."""
        return all(any(re.match(pattern, name) for name in names) for pattern in self.signature)

    def translate(self, name: str) -> str | None:
        """Our name of a tensor, None where this project has no such thing."""
        for pattern, replacement in self.rules:
            found = re.match(pattern, name)
            if found:
                return found.expand(replacement) + name[found.end() :]
        return None


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to: ``encoder.backbone``, ``decoder``, ..."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "encoder" else first
