"""Matched queries, counted one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from probe_toys import Give, Loss
from torch import Tensor, nn

from bifusion_diag.probes import MatchingProbe, Monitor

#: Pairs (query, object) of three scenes with 4, 2 and 0 objects: a query twice, an object twice, none, none.
PAIRS = [[(5, 0), (5, 2), (1, 2), (7, 0)], [], []]
OBJECTS = [4, 2, 0]
EXPECTED = {"queries_mean": 1.0, "queries_min": 0, "empty": 1, "objects": 6, "unmatched": 4}


def tensors(pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    both = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def measured(model: nn.Module, *calls: Callable[[], Any], probe: MatchingProbe | str = "matching") -> dict[str, Any]:
    with Monitor(model, probes=[probe]) as monitor:
        with monitor.step():
            for call in calls:
                call()
        monitor.end_step()
        return {name.split("/", 1)[1]: value for name, value in monitor.latest().items()}


def twin(scenes: list[list[tuple[int, int]]], objects: list[int]) -> dict[str, float]:
    queries = [len({q for q, _ in pairs}) for pairs in scenes]
    return {
        "queries_mean": sum(queries) / len(queries),
        "queries_min": min(queries),
        "empty": sum(not q and n > 0 for q, n in zip(queries, objects, strict=True)),
        "objects": sum(objects),
        "unmatched": sum(n - len({o for _, o in pairs}) for n, pairs in zip(objects, scenes, strict=True)),
    }


def test_the_criterions_output() -> None:
    model = Give()
    output = Loss(torch.zeros(()), {}, {}, [tensors(pairs) for pairs in PAIRS], OBJECTS)
    assert measured(model, lambda: model(output)) == EXPECTED == twin(PAIRS, OBJECTS)
    assert measured(model, lambda: model(Loss(torch.zeros(()), {}, {}))) == {}  # no instance term


def test_random_scenes_of_several_calls() -> None:
    rng, model, outputs, rows = np.random.default_rng(0), Give(), [], []
    for _ in range(3):
        objects = rng.integers(1, 6, 4).tolist()
        scenes = [[(int(rng.integers(9)), int(rng.integers(n))) for _ in range(rng.integers(8))] for n in objects]
        outputs.append(Loss(torch.zeros(()), {}, {}, [tensors(pairs) for pairs in scenes], objects))
        rows.append(twin(scenes, objects))
    row = measured(model, *(lambda output=output: model(output) for output in outputs))
    how = {"queries_mean": np.mean, "queries_min": min, "empty": sum, "objects": sum, "unmatched": sum}
    assert row == pytest.approx({key: rule([r[key] for r in rows]) for key, rule in how.items()})


class HungarianMatcher(nn.Module):
    """Has DETR's arguments and result; told what to find."""

    def __init__(self, pairs: list[list[tuple[int, int]]]) -> None:
        super().__init__()
        self.pairs = pairs

    def forward(self, outputs: dict[str, Tensor], targets: Any = None, mask_labels: Any = None) -> Any:
        return [tensors(pairs) for pairs in self.pairs]


def test_a_matcher_is_read_directly() -> None:
    model = nn.ModuleDict({"matcher": HungarianMatcher(PAIRS)})
    targets = [{"labels": torch.zeros(n)} for n in OBJECTS]
    assert measured(model, lambda: model["matcher"]({}, targets)) == EXPECTED
    assert measured(model, lambda: model["matcher"](outputs={}, targets=targets)) == EXPECTED
    probe = MatchingProbe(objects="mask_labels")  # as Transformers' matchers
    labels = [torch.zeros(n, 5) for n in OBJECTS]
    assert measured(model, lambda: model["matcher"]({}, mask_labels=labels), probe=probe) == EXPECTED
    unknown = {"queries_mean": 1.0, "queries_min": 0, "empty": 2}
    assert measured(model, lambda: model["matcher"]({})) == unknown
    assert measured(model, lambda: model["matcher"]({}, [{"boxes": 1}] * 3)) == unknown
    twice = measured(model, *[lambda: model["matcher"]({}, targets)] * 2)  # two decoder layers
    assert twice == EXPECTED | {"empty": 2, "objects": 12, "unmatched": 8}


class Instances(NamedTuple):
    labels: Tensor


class SparseMatcher(nn.Module):
    """Matches one scene, as OneFormer3D's and ESAM's."""

    def forward(self, predicted: Any, instances: Instances, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        return tensors(pairs)


def test_a_matcher_of_one_scene() -> None:
    model = SparseMatcher()
    calls = [
        lambda pairs=pairs, n=n: model(None, Instances(torch.zeros(n)), pairs)
        for pairs, n in zip(PAIRS, OBJECTS, strict=True)
    ]
    assert measured(model, *calls) == EXPECTED


@pytest.mark.parametrize(
    ("matches", "known"),
    [
        ([torch.tensor([5, 5, 1, 7]), torch.tensor([], dtype=torch.long), torch.zeros(0)], 4),
        ([3, 0, 0], 4),
        (torch.tensor([3, 0, 0]), 4),
        (tuple(tensors(pairs) for pairs in PAIRS), 5),
        ([(np.array([5, 5, 1, 7]), np.array([0, 2, 2, 0])), (np.array([]), np.array([])), ([], [])], 5),
    ],
)
@pytest.mark.parametrize("objects", [OBJECTS, torch.tensor(OBJECTS), [torch.zeros(n) for n in OBJECTS], None, [1]])
def test_told_fields(matches: Any, known: int, objects: Any) -> None:
    model = Give()
    probe = MatchingProbe(modules=["*"], fields={"matches": "aux.found", "objects": "aux.labels"}, name="told")
    row = measured(model, lambda: model({"aux": {"found": matches, "labels": objects}}), probe=probe)
    if objects is None or len(objects) == 1:
        assert row == {"queries_mean": 1.0, "queries_min": 0, "empty": 2}
    else:
        assert row == {key: EXPECTED[key] for key in list(EXPECTED)[:known]}


def test_nothing_to_count() -> None:
    model = Give()
    for matches in ([], torch.zeros(2, 3), "text", None):
        assert measured(model, lambda matches=matches: model({"matches": matches})) == {}
