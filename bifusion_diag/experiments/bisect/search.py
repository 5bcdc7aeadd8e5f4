"""Which of many differences make something fail: delta debugging, on sets of names. Knows no training.

The search is Zeller and Hildebrandt's delta debugging ("Simplifying and isolating failure-inducing input", IEEE TSE 28,
2002) for a test that is dear and mostly has a few causes: instead of cutting the set into ever finer parts, each cause
is isolated between a set that does not fail and one more difference with which it does, by halving (k causes of n
differences: about k · log2 n tests, where ddmin takes up to n²). ddmin itself then runs on what was found: on a test
that is not monotone the halving may have kept too much. What comes out is 1-minimal on any test: it fails, and does not
without any one of its differences.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

#: "unresolved": it could not be told, as such a set is no valid configuration or its run broke off.
Outcome = Literal["bad", "stable", "unresolved"]
Items = tuple[str, ...]
Test = Callable[[frozenset[str]], Outcome]


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
        causes: each a 1-minimal failing set; the first one of all differences, the others of those that are left
            where what is to be set back is gone.
        cure: 1-minimal set of differences without which the rest is stable; None: none was found.
        smallest: no smaller set cures, if more differences never make a failing set stable.
    """

    causes: tuple[Items, ...]
    cure: Items | None
    smallest: bool


def search(items: Sequence[str], test: Test, needs: Mapping[str, frozenset[str]]) -> Found:
    """Find what fails and what cures.

    Args:
        items: all differences; each after those that it needs. Together they fail, and none of them does not.
        test: the outcome of a set of differences. Asked for the same set again and again: keep the answers.
        needs: of a difference, the others without which it is not valid.
    """
    everything = frozenset(items)
    back: list[str] = []  # set back so far
    causes: list[Items] = []
    while test(everything - frozenset(back)) == "bad":
        left = [item for item in items if item not in back]
        causes.append(minimal_failing(left, test))
        back += _set_back(causes[-1], everything, back, test, needs)
    if test(everything - frozenset(back)) != "stable":
        return Found(tuple(causes), None, False)
    cure = _without_idle(back, everything, test)
    apart = len(frozenset().union(*causes)) == sum(map(len, causes))
    return Found(tuple(causes), tuple(i for i in items if i in cure), apart and len(cure) == len(causes))


def minimal_failing(items: Sequence[str], test: Test) -> Items:
    """A 1-minimal failing set among items that fail together."""
    return ddmin(isolate(items, test), test)


def isolate(items: Sequence[str], test: Test) -> Items:
    """A failing set among items that fail together, in their order; minimal if the test is monotone.

    Each round finds, between the first items that do not fail and those that do, the one item that makes the
    difference beside what was found before.
    """
    found: frozenset[str] = frozenset()
    rest = list(items)
    while test(found) != "bad":
        low, high = 0, len(rest)  # with so many of the rest it does not fail; it does
        while high - low > 1:
            middle = (low + high) // 2
            if test(found.union(rest[:middle])) == "bad":
                high = middle
            else:
                low = middle
        found |= {rest[high - 1]}
        rest = rest[: high - 1]
    return tuple(item for item in items if item in found)


def ddmin(items: Sequence[str], test: Test) -> Items:
    """A 1-minimal failing set among items that fail together."""
    kept, parts = list(items), 2
    while len(kept) > 1:
        chunks = _parts_of(kept, parts)
        rests = [[item for item in kept if item not in chunk] for chunk in chunks]
        smaller = next((chunk for chunk in chunks if test(frozenset(chunk)) == "bad"), None)
        if smaller is not None:
            kept, parts = smaller, 2
            continue
        smaller = next((rest for rest in rests if test(frozenset(rest)) == "bad"), None)
        if smaller is not None:
            kept, parts = smaller, max(parts - 1, 2)
        elif parts < len(kept):
            parts = min(2 * parts, len(kept))
        else:
            break
    return tuple(kept)


def _parts_of(items: list[str], parts: int) -> list[list[str]]:
    """In order, of nearly equal size, none empty."""
    edges = [len(items) * i // parts for i in range(parts + 1)]
    return [items[a:b] for a, b in itertools.pairwise(edges) if b > a]


def _set_back(
    cause: Items, everything: frozenset[str], back: Sequence[str], test: Test, needs: Mapping[str, frozenset[str]]
) -> list[str]:
    """What to set back so that this cause is gone: one of its differences, with what is not valid without it. One that
    cures wins over one that leaves another cause, and that over one after which nothing can be told."""
    options = [[item, *(other for other in sorted(everything) if item in needs.get(other, ()))] for item in cause]
    options = [[item for item in option if item not in back] for option in options]
    outcomes: list[Outcome] = []
    for option in options:
        outcomes.append(test(everything.difference(back, option)))
        if outcomes[-1] == "stable":
            return option
    if "bad" in outcomes:
        return options[outcomes.index("bad")]
    return list(dict.fromkeys(item for option in options for item in option))


def _without_idle(back: Sequence[str], everything: frozenset[str], test: Test) -> frozenset[str]:
    """The cure without what does not have to be set back."""
    cure = frozenset(back)
    while len(cure) > 1:
        idle = next((i for i in sorted(cure) if test(everything - (cure - {i})) == "stable"), None)
        if idle is None:
            break
        cure -= {idle}
    return cure
