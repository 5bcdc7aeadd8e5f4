"""The search against brute force, on random tests: monotone, not monotone, and with sets that cannot be told."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable

import pytest

from bifusion_diag.experiments.bisect.search import Outcome, Test, ddmin, isolate, minimal_failing, search

Sets = frozenset[frozenset[str]]


def subsets(items: Iterable[str]) -> list[frozenset[str]]:
    known = list(items)
    return [frozenset(c) for size in range(len(known) + 1) for c in itertools.combinations(known, size)]


def counting(test: Test) -> tuple[Test, set[frozenset[str]]]:
    asked: set[frozenset[str]] = set()

    def ask(chosen: frozenset[str]) -> Outcome:
        asked.add(chosen)
        return test(chosen)

    return ask, asked


def fails_with(*causes: Iterable[str]) -> Test:
    wanted = [frozenset(cause) for cause in causes]
    return lambda chosen: "bad" if any(cause <= chosen for cause in wanted) else "stable"


def brute_force(items: str, test: Test) -> tuple[Sets, int]:
    """All minimal failing sets, and the size of the smallest cure."""
    bad = [chosen for chosen in subsets(items) if test(chosen) == "bad"]
    minimal = frozenset(one for one in bad if not any(other < one for other in bad))
    cures = [len(back) for back in subsets(items) if test(frozenset(items) - back) == "stable"]
    return minimal, min(cures)


def is_1_minimal(found: Iterable[str], test: Test) -> bool:
    kept = frozenset(found)
    return test(kept) == "bad" and all(test(kept - {item}) != "bad" for item in kept)


@pytest.mark.parametrize("seed", range(200))
def test_of_a_monotone_test_cause_and_cure_are_those_of_brute_force(seed: int) -> None:
    draw = random.Random(seed)
    items = "abcdefgh"[: draw.randint(2, 8)]
    causes = [draw.sample(items, draw.randint(1, min(3, len(items)))) for _ in range(draw.randint(1, 3))]
    test = fails_with(*causes)
    found = search(items, test, {})
    minimal, smallest = brute_force(items, test)
    assert frozenset(found.causes[0]) in minimal
    assert all(is_1_minimal(cause, test) for cause in found.causes)
    assert found.cure is not None
    everything = frozenset(items)
    assert test(everything.difference(found.cure)) == "stable"
    assert all(test(everything.difference(found.cure) | {item}) == "bad" for item in found.cure)
    if found.smallest:
        assert len(found.cure) == smallest
    if len(minimal) == 1:
        assert (len(found.cure), found.smallest) == (1, True)


def random_test(seed: int, items: str, *, unresolved: float) -> Test:
    """Any outcome for any set, but for the two ends."""
    draw = random.Random(seed)
    outcomes: dict[frozenset[str], Outcome] = {}
    for chosen in subsets(items):
        outcomes[chosen] = "unresolved" if draw.random() < unresolved else draw.choice(("bad", "stable"))
    outcomes[frozenset()], outcomes[frozenset(items)] = "stable", "bad"
    return outcomes.__getitem__


@pytest.mark.parametrize("unresolved", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("seed", range(60))
def test_of_any_test_the_cause_is_1_minimal_and_the_cure_cures(seed: int, unresolved: float) -> None:
    items = "abcdefg"
    test = random_test(seed, items, unresolved=unresolved)
    found = search(items, test, {})
    assert all(is_1_minimal(cause, test) for cause in found.causes)
    for way in (ddmin, minimal_failing):
        assert is_1_minimal(way(items, test), test)
    if found.cure is not None:
        everything = frozenset(items)
        assert test(everything.difference(found.cure)) == "stable"
        if len(found.cure) > 1:
            assert all(test(everything.difference(found.cure) | {item}) != "stable" for item in found.cure)


@pytest.mark.parametrize("size", [8, 30, 100])
def test_one_cause_takes_a_logarithm_of_tests(size: int) -> None:
    items = [f"{i:03d}" for i in range(size)]
    for culprit in items[:: size // 8]:
        test, asked = counting(fails_with([culprit]))
        assert isolate(items, test) == (culprit,)
        assert len(asked) <= math.ceil(math.log2(size)) + 3


def test_two_that_fail_together_take_fewer_tests_than_ddmin() -> None:
    items = [f"{i:02d}" for i in range(40)]
    taken = {}
    for way in (minimal_failing, ddmin):
        counts = []
        for pair in itertools.islice(itertools.combinations(items, 2), 0, None, 37):
            test, asked = counting(fails_with(pair))
            assert way(items, test) == pair
            counts.append(len(asked))
        taken[way] = sum(counts) / len(counts)
    assert taken[minimal_failing] < 0.6 * taken[ddmin]


def test_what_is_only_valid_with_another_is_set_back_with_it() -> None:
    needs = {"kind": frozenset({"fusion"})}

    def test(chosen: frozenset[str]) -> Outcome:
        if "kind" in chosen and "fusion" not in chosen:
            return "unresolved"
        return "bad" if "fusion" in chosen else "stable"

    found = search(["a", "fusion", "kind", "z"], test, needs)
    assert found.causes == (("fusion",),)
    assert found.cure == ("fusion", "kind")


def test_all_outcomes_unresolved_but_the_ends() -> None:
    def test(chosen: frozenset[str]) -> Outcome:
        return "bad" if len(chosen) == 4 else "unresolved" if chosen else "stable"

    found = search("abcd", test, {})
    assert found.causes == (("a", "b", "c", "d"),)
    assert found.cure == ("a", "b", "c", "d")
