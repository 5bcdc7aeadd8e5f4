"""Measures over many series, against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bifusion_diag.diagnosis import NotMeasured, Quantity, definition_of, measure, measure_record, measures_to_dict
from bifusion_diag.diagnosis.instruments import FAMILIES, SUMMARIES, instrument_measures
from bifusion_diag.record import ModuleInfo, RecordReader, RunHeader, RunWriter, load_run
from bifusion_diag.record.schema import Run

RunMaker = Callable[..., Run]
NAN, INF = float("nan"), float("inf")

SERIES = {
    "updates/a/ratio": [0.1, 0.3, 0.2],
    "updates/a.b/ratio": [0.01, NAN, 0.03],
    "updates/a/norm": [9.0, 9, 9],
    "loss_gradients/x/share": [0.5, 0.9, 0.7],
    "loss_gradients/x/norm": [5.0, 5, 5],
    "loss_gradients/cosine/x/y": [-0.5, 0.25, -0.25],
    "loss_gradients/conflict": [-0.5, -1.0, -0.25],
    "activations/a/nonfinite": [0, 0, 2],
    "activations/a.b/nonfinite": [1, 1, 1],
    "activations/c/nonfinite": [0, 0, 0],
    "weights/a/norm": [1.0, NAN, INF],
    "weights/c/norm": [1.0, 1, 1],
    "updates/skipped": [0, 1, 1],
    "attention/a/masked_rows": [2, 0, 5],
    "attention/a.b/masked_rows": [0, 0, 1],
    "attention/a/max_logit": [3, 90, 1],
    "matching/empty": [0, 1, 1],
    "matching/unmatched": [3, 0, 1],
    "matching/queries_min": [3, 2, 9],
    "normalize/a/smallest": [0.1, 1e-9, 0.2],
    "data/pose/nonfinite": [0, 12, 0],
    "data/points.xyz/nonfinite": [1, 0, 3],
    "data/semantic/out_of_range": [0, 2, 0],
    "data/semantic/ignored_share": [0.5, 0.0, 0.25],
    "data/scenes/fewest_rows": [7, 0, 3],
    "throughput/step_seconds": [1.0, 3.0, 2.0],
    "throughput/data_seconds": [NAN, 0.5, 0.25],
    "throughput/peak_resident_mib": [100, 200, 300],
    "throughput/resident_mib": [50, 200, 60],
}
MISSING = {"throughput/data_seconds": [True, False, False]}
EXPECTED = {
    "update_ratio/p50": (0.2 + 0.02) / 2,
    "update_ratio/max": 0.3,
    "gradient_share/x": 0.7,
    "gradient_cosine/x/y": -0.25,
    "gradient_conflict": -0.5,
    "activations/nonfinite": 2,
    "weights/nonfinite": 1,
    "updates/skipped": 2,
    "attention/masked_rows": 8,
    "attention/max_logit": 90,
    "normalize/smallest": 1e-9,
    "matching/empty": 2,
    "matching/unmatched": 4,
    "matching/queries_min": 2,
    "data/nonfinite": 16,
    "data/out_of_range": 2,
    "data/ignored_share": 0.25,
    "data/fewest_rows": 0,
    "throughput/step_seconds": 2,
    "throughput/data_seconds": 0.375,
    "throughput/peak_resident_mib": 300,
}


def test_numbers(make_run: RunMaker) -> None:
    readings = instrument_measures(make_run(SERIES, missing=MISSING))
    assert readings.keys() == EXPECTED.keys()
    for key, value in EXPECTED.items():
        reading = readings[key]
        assert isinstance(reading, Quantity)
        assert reading.value == pytest.approx(value, rel=1e-6), key  # a record has float32 precision


def test_every_one_has_a_definition_and_a_place(make_run: RunMaker) -> None:
    for key in [*(summary.key for summary in SUMMARIES), *(f"{family}/*" for family, _, _ in FAMILIES)]:
        assert definition_of(key).text
    keys = list(measure(make_run(SERIES | {"loss/total": [1, 1, 1]}, missing=MISSING)).readings)
    assert keys.index("update_ratio/p50") < keys.index("gradient_share/x") < keys.index("gradient_cosine/x/y")
    assert keys.index("gradient_conflict") < keys.index("gate/mean") < keys.index("data/nonfinite")


def test_what_was_not_recorded_is_said_where_the_documents_ask_for_it(make_run: RunMaker) -> None:
    readings = instrument_measures(make_run({"loss/total": [1.0]}))
    assert {key for key, reading in readings.items() if isinstance(reading, NotMeasured)} == readings.keys()
    assert readings.keys() == {
        "update_ratio/p50", "update_ratio/max", "gradient_share/*", "gradient_cosine/*", "throughput/step_seconds"
    }  # fmt: skip


def test_they_are_exact_of_a_reduced_record(tmp_path: Path) -> None:
    steps, modules = 3000, 200
    rng = np.random.default_rng(0)
    ratios = {f"updates/m{index}/ratio": rng.lognormal(-7, 1, steps).astype(np.float32) for index in range(modules)}
    infos = [ModuleInfo(f"m{index}", "Linear", index, "m", 1, 1) for index in range(modules)]
    with RunWriter(tmp_path / "run.json", RunHeader("long", modules=infos)) as writer:
        writer.append(np.arange(steps), ratios | {"loss/total": np.ones(steps)})
        writer.flush()
        stored = measures_to_dict(measure_record(RecordReader(writer.folder)))
        writer.finish(
            "completed",
            measures=stored | {"readings": stored["readings"] | {"forgotten/one": {"value": 1, "unit": ""}}},
        )
    run = load_run(tmp_path / "run.json")
    assert not run.all_series["updates/m0/ratio"].exact
    measures = measure(run)
    assert measures.number("update_ratio/p50") == pytest.approx(np.median([np.median(r) for r in ratios.values()]))
    assert measures.number("update_ratio/max") == pytest.approx(max(r.max() for r in ratios.values()))
    assert "forgotten/one" not in measures.readings  # of a program that knew another measure
