"""What the data probe says of a batch, against numpy, element by element."""

from __future__ import annotations

import math
from collections import UserDict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from probe_toys import Boxed, Sparse
from torch import nn

from bifusion_diag.errors import UserError
from bifusion_diag.probes import Monitor
from bifusion_diag.probes.data import DataProbe

NAN, INF = float("nan"), float("inf")


def measured(batch: Any, **options: Any) -> dict[str, float | None]:
    with Monitor(nn.Linear(1, 1), probes=[DataProbe(**options)]) as monitor:
        with monitor.step(batch):
            pass
        monitor.end_step()
        return {name.removeprefix("data/"): value for name, value in monitor.latest().items()}


def twin(values: list[torch.Tensor], labels: tuple[int, int] | None = None, ignore: int = -1) -> dict[str, float]:
    """One element after another."""
    flat = [value for tensor in values for value in tensor.double().flatten().tolist()]
    low, high, bad, ignored, strange = INF, -INF, 0, 0, 0
    for value in flat:
        bad += not math.isfinite(value)
        low = NAN if math.isnan(value) or math.isnan(low) else min(low, value)
        high = NAN if math.isnan(value) or math.isnan(high) else max(high, value)
        ignored += value == ignore
        strange += labels is not None and value != ignore and not labels[0] <= value <= labels[1]
    found = {"min": low, "max": high, "elements": len(flat)}
    if values[0].is_floating_point():
        found["nonfinite"] = bad
    if labels is not None:
        found |= {"ignored_share": ignored / len(flat), "out_of_range": strange}
    return found


ODD = {
    "plain": torch.randn(5, 3),
    "bf16": torch.randn(7).bfloat16(),
    "half": torch.tensor([1.0, -INF, 2.0]).half(),
    "nan": torch.tensor([[1.0, NAN], [INF, -2.0]]),
    "inf": torch.tensor([1.0, -INF, INF]),
    "strided": torch.randn(6, 8)[::2, 1::3].T,
    "huge": torch.tensor([1e300, -1e300], dtype=torch.float64),
    "int": torch.randint(-5, 200, (4, 4)),
    "byte": torch.randint(0, 256, (2, 3, 4), dtype=torch.uint8),
    "bool": torch.tensor([False, True]),
    "single": torch.tensor(3.5, requires_grad=True),
}


@pytest.mark.parametrize("name", ODD)
def test_numbers_are_the_twins(name: str) -> None:
    expected = twin([ODD[name].detach()])
    row = measured({name: ODD[name]})
    assert row.keys() == {f"{name}/{key}" for key in expected}
    limit = float(np.finfo(np.float32).max)  # what a record holds; finite stays finite
    for key, value in expected.items():
        wanted = value if not math.isfinite(value) else float(np.float32(np.clip(value, -limit, limit)))
        np.testing.assert_equal(row[f"{name}/{key}"], wanted)


class Sample(NamedTuple):
    image: torch.Tensor
    extra: dict[str, Any]


def test_every_container_has_its_names() -> None:
    x = torch.ones(2)
    for batch, names in (
        (x, {"batch"}),
        ((x, x), {"0", "1"}),
        ([x, {"boxes": x}], {"0", "1.boxes"}),
        ({"a": x, "b": {"c": x, "d": None, "e": "text"}}, {"a", "b.c"}),
        (UserDict(input_ids=x, mask=x), {"input_ids", "mask"}),
        (Sample(x, {"depth": [x, x]}), {"image", "extra.depth"}),
        ({"boxed": Boxed(x)}, {"boxed.value"}),
        ({"sparse": Sparse(x)}, {"sparse.feats"}),
        (([x, x], [{"boxes": x, "labels": x}, {"boxes": x, "labels": x}]), {"0", "1.boxes", "1.labels"}),
        ({"counts": (3, 4)}, {"counts"}),
        ({"coo": torch.eye(2).to_sparse()}, {"coo"}),
        (None, set()),
        ("nothing", set()),
    ):
        assert {key.rsplit("/", 1)[0] for key in measured(batch)} == names, batch


def test_lists_are_put_together_and_an_empty_scene_is_seen() -> None:
    scenes = [torch.randn(5, 3), torch.randn(0, 3), torch.randn(2, 3)]
    row = measured({"points": scenes, "counts": (5, 0, 2)})
    for key, value in twin(scenes).items():
        assert row[f"points/{key}"] == pytest.approx(value)
    assert row["points/fewest_rows"] == 0
    assert (row["counts/min"], row["counts/max"], row["counts/elements"]) == (0, 5, 3)


def test_what_is_empty_or_unknown_has_no_extremes() -> None:
    row = measured({"empty": torch.zeros(0, 3), "complex": torch.ones(2, dtype=torch.complex64)})
    assert row == {
        "empty/elements": 0,
        "empty/min": None,
        "empty/max": None,
        "empty/nonfinite": 0,
        "complex/elements": 2,
    }


@pytest.mark.parametrize("ignore", [-1, 255])
def test_labels_are_counted_as_the_twin_does(ignore: int) -> None:
    ids = torch.tensor([0, 3, 4, -1, 255, -7, 2, 255])
    row = measured({"truth": {"ids": ids}}, labels={"truth.ids": (0, 3)}, ignore=ignore)
    assert row == {f"truth.ids/{key}": value for key, value in twin([ids], (0, 3), ignore).items()}
    assert row["truth.ids/out_of_range"] == {-1: 4, 255: 3}[ignore]
    gone = measured({"ids": torch.zeros(0, dtype=torch.int64)}, labels={"ids": (0, 3)})
    assert (gone["ids/ignored_share"], gone["ids/out_of_range"]) == (None, None)


def test_only_the_fields_asked_for() -> None:
    batch = {"a": torch.ones(1), "b": {"c": torch.ones(1), "d": torch.ones(1)}}
    assert {key.split("/")[0] for key in measured(batch, fields=["b.*"])} == {"b.c", "b.d"}


def test_what_cannot_be_is_an_error() -> None:
    with pytest.raises(UserError, match=r"no field 'semntic' for labels\. Did you mean 'semantic'\?"):
        measured({"semantic": torch.zeros(3)}, labels={"semntic": (0, 3)})
    with pytest.raises(UserError, match=r"labels\['semantic'\] = \(3, 0\) holds no id"):
        DataProbe(labels={"semantic": (3, 0)})


def test_a_batch_changes_its_fields(tmp_path: Any) -> None:
    from bifusion_diag.record import load_run

    path = tmp_path / "run.json"
    with Monitor(nn.Linear(1, 1), probes=[DataProbe()], out=path) as monitor:
        for batch in ({"a": torch.ones(2)}, None, {"a": torch.ones(3), "b": torch.ones(1)}):
            with monitor.step(batch):
                pass
    run = load_run(path)
    assert run.all_series["data/a/elements"].value.tolist()[::2] == [2, 3]
    assert run.all_series["data/a/elements"].missing.tolist() == [0, 1, 0]
    assert run.all_series["data/b/elements"].missing.tolist() == [1, 1, 0]
