"""The record against the numbers that were written into it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest

import bifusion_diag.record
from benchmarks.process import peak_growth
from bifusion_diag.errors import UserError
from bifusion_diag.record import ModuleInfo, RecordError, RecordReader, RunHeader, RunWriter, load_run, resolve_run
from bifusion_diag.record.codec import loads, pack_steps, unpack_steps
from bifusion_diag.record.document import to_document
from bifusion_diag.record.reduce import reduce_record

SCHEMA = json.loads((Path(bifusion_diag.record.__file__).parent / "run.schema.json").read_text(encoding="utf-8"))


def header() -> RunHeader:
    return RunHeader(
        run_id="id-1",
        name="run",
        created="2024-05-01T12:00:00+00:00",
        settings={"optim": {"lr": 2e-4, "clip_grad": float("inf")}, "none": None},
        provenance={"clip_weights": "random"},
        parameters={"encoder": {"total": 10, "trainable": 4}},
        modules=[ModuleInfo("encoder", "Linear", 0, "encoder", 10, 4)],
        units={"train/step_seconds": "s"},
    )


def write(path: Path, steps: int, columns: dict[str, np.ndarray], block: int = 32, **options: object) -> None:
    with RunWriter(path, header()) as writer:
        for begin in range(0, steps, block):
            rows = np.arange(begin, min(begin + block, steps))
            writer.append(rows, {name: values[rows] for name, values in columns.items()})
        writer.finish("completed", **options)  # type: ignore[arg-type]


def valid(path: Path) -> dict:
    """The document, strictly parsed and checked against the published schema."""

    def refuse(text: str) -> None:
        raise AssertionError(f"bare {text}")

    document = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    return document


def test_short_run_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    rng = np.random.default_rng(0)
    values = rng.normal(size=100).astype(np.float32) * np.float32(10.0) ** rng.integers(-30, 30, 100).astype(np.float32)
    values[[3, 50, 51]] = np.nan, np.inf, -np.inf
    gone = np.zeros(100, bool)
    gone[[7, 50 + 20]] = True
    with RunWriter(path, header()) as writer:
        writer.append(np.arange(100), {"train/x": values, "train/step_seconds": np.ones(100)}, {"train/x": gone})
        writer.event(5, "stage", "S1", share=float("nan"))
        writer.finish("completed", measures={"worst": float("inf"), "n": np.int64(3)})
    valid(path)
    run = load_run(path)
    series = run.series("train/x")
    assert series is not None
    assert series.exact
    np.testing.assert_array_equal(series.steps, np.arange(100))
    np.testing.assert_array_equal(series.value.astype(np.float32), np.where(gone, np.nan, values))
    np.testing.assert_array_equal(series.missing.astype(bool), gone)
    np.testing.assert_array_equal(np.flatnonzero(series.nonfinite), [3, 50, 51])
    finite = values[np.isfinite(values) & ~gone].astype(np.float64)
    stats = series.stats
    assert (stats.count, stats.missing, stats.nonfinite, stats.nan, stats.first_nonfinite_step) == (98, 2, 3, 1, 3)
    assert stats.min == finite.min()
    assert stats.max == finite.max()
    assert stats.p95 == pytest.approx(np.quantile(finite, 0.95))
    assert run.status == "completed"
    assert run.header == header()
    assert run.measures == {"worst": float("inf"), "n": 3}
    assert run.events[0].step == 5
    assert np.isnan(run.events[0].data["share"])
    seconds = run.series("train/step_seconds")
    assert seconds is not None
    assert seconds.unit == "s"
    assert run.series("train/none") is None
    assert run.names("train/") == ["train/x", "train/step_seconds"]


def test_long_run_is_reduced_and_loses_no_extreme(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    steps = 500_000  # more than run.json has room for
    rng = np.random.default_rng(1)
    values = rng.lognormal(size=steps).astype(np.float32)
    values[12_345] = 1e30
    values[777] = np.nan
    values[5000:5500] = np.inf
    write(path, steps, {"train/grad_norm": values}, block=5000)
    valid(path)
    series = load_run(path).series("train/grad_norm")
    assert series is not None
    assert not series.exact
    assert series.rows.sum() == steps
    for k in range(len(series.steps)):
        bucket = values[series.steps[k] : series.last[k] + 1].astype(np.float64)
        finite = bucket[np.isfinite(bucket)]
        assert series.nonfinite[k] == len(bucket) - len(finite)
        if len(finite):
            assert series.min[k] == finite.min()
            assert series.max[k] == finite.max()
            assert series.value[k] == pytest.approx(finite.mean(), rel=1e-6)
        else:
            assert np.isnan([series.value[k], series.min[k], series.max[k]]).all()
    assert series.max[np.nanargmax(series.max)] == np.float32(1e30)
    everything = values[np.isfinite(values)].astype(np.float64)
    assert series.stats.nonfinite == 501
    assert series.stats.first_nonfinite_step == 777
    for name, percent in {"p1": 1, "p5": 5, "p50": 50, "p95": 95, "p99": 99}.items():
        assert getattr(series.stats, name) == pytest.approx(np.percentile(everything, percent))


@pytest.mark.parametrize("steps", [200, 3000])
def test_reloads_to_the_same_record(tmp_path: Path, steps: int) -> None:
    rng = np.random.default_rng(2)
    columns = {f"grads/{i}/param_norm": rng.lognormal(size=steps).astype(np.float32) for i in range(300)}
    columns["loss/total"] = rng.normal(size=steps).astype(np.float32)
    path = tmp_path / "run.json"
    write(path, steps, columns)
    run = load_run(path)
    again = to_document(run)
    assert again == json.loads(path.read_text(encoding="utf-8"))
    assert to_document(load_run(tmp_path / "run.record")) == again  # the full record reduces to the same document
    other = tmp_path / "other.json"
    write(other, steps, columns | {"loss/total": columns["loss/total"] + 1})
    assert to_document(load_run(other)) != again


def test_a_thousand_series_stay_within_five_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    rng = np.random.default_rng(3)
    names = [f"train/s{i}" for i in range(40)] + [f"grads/encoder.block{i}.conv/param_norm" for i in range(1000)]
    with RunWriter(path, header()) as writer:
        for begin in range(0, 4096, 256):
            writer.append_block(np.arange(begin, begin + 256), names, rng.lognormal(size=(256, 1040)).astype("f4"))
        for step in range(3000):
            writer.event(step, "incident", "x" * 200)
    assert path.stat().st_size <= 5_000_000
    run = load_run(path)
    assert len(run.names()) == 1040
    assert len(run.events) == 1000
    assert run.events_dropped == 2000
    assert [run.events[0].step, run.events[-1].step] == [0, 2999]
    main, detail = run.series("train/s0"), run.series("grads/encoder.block0.conv/param_norm")
    assert main is not None
    assert detail is not None
    assert len(main.steps) > 500 > len(detail.steps) > 30


@pytest.mark.parametrize("steps", [80, 400])
def test_of_many_series_by_module_those_that_are_charted_keep_more(tmp_path: Path, steps: int) -> None:
    path = tmp_path / "run.json"
    modules = [f"encoder.block{i}.conv" for i in range(300)]
    keys = ("grads/{}/param_norm", "updates/{}/ratio", *(f"activations/{{}}/{key}" for key in "abcdefgh"))
    names = [key.format(module) for key in keys for module in modules]
    names += ["loss/total", "gate/mean", "loss_gradients/cosine/a/b"]
    values = np.random.default_rng(0).lognormal(size=(steps, len(names))).astype("f4")
    infos = [ModuleInfo(module, "Conv", i, "encoder", 1, 1) for i, module in enumerate(modules)]
    with RunWriter(path, RunHeader("run", modules=infos)) as writer:
        writer.append_block(np.arange(steps), names, values, np.zeros(values.shape, bool))
    assert path.stat().st_size <= 5_000_000
    run = load_run(path)
    for name in ("loss/total", "gate/mean", "loss_gradients/cosine/a/b"):
        assert run.all_series[name].exact, name
    charted, other = run.all_series[names[0]], run.all_series[f"activations/{modules[0]}/a"]
    if steps == 80:  # all of it fits
        assert charted.exact
        assert other.exact
        return
    assert len(charted.steps) > 40 > len(other.steps)
    spike = values[:, 0].max()
    assert np.nanmax(charted.max) == spike


@pytest.mark.parametrize(("count", "steps", "kept"), [(20_000, 200, 20_000), (30_000, 3, 20_000)])
def test_any_number_of_series_fits(tmp_path: Path, count: int, steps: int, kept: int) -> None:
    """First the buckets go, then, of twice as many as fit, the last series; what is kept is true."""
    path = tmp_path / "run.json"
    names = [*(f"grads/encoder.layers.{i}.self_attn.qkv/param_norm" for i in range(count - 1)), "loss/total"]
    rng = np.random.default_rng(0)
    values = (10.0 ** rng.uniform(-6, 2, count) * rng.lognormal(0, 0.3, (steps, count))).astype("f4")
    missing = np.zeros(values.shape, bool)
    values[1, 5], values[2, 5], missing[1, 7] = np.nan, np.inf, True
    with RunWriter(path, header()) as writer:
        for begin in range(0, steps, 32):
            rows = np.arange(begin, min(begin + 32, steps))
            writer.append_block(rows, names, values[rows], missing[rows])
        writer.flush()
        began = time.process_time()
        writer.finish("completed")
        assert time.process_time() - began < 10
    assert path.stat().st_size <= 5_000_000
    assert peak_growth(lambda: reduce_record(RecordReader(writer.folder))) < 250e6  # the numbers alone are 16 MB
    document = json.loads(path.read_text(encoding="utf-8"))
    document["series"] = {name: document["series"][name] for name in (*names[:20], names[-1])}
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    run = load_run(path)
    assert kept <= len(run.names()) <= count
    assert "loss/total" in run.names()
    for place in (0, 5, 7, 11_111, count - 1):
        series = run.series(names[place])
        assert series is not None
        column = values[:, place][~missing[:, place]].astype("f8")
        good = column[np.isfinite(column)]
        stats = series.stats
        bad = len(column) - len(good)
        assert (stats.count, stats.missing, stats.nonfinite) == (len(column), missing[:, place].sum(), bad)
        expected = [good.min(), good.max(), good.mean(), *np.percentile(good, [1, 5, 50, 95, 99])]
        found = [stats.min, stats.max, stats.mean, stats.p1, stats.p5, stats.p50, stats.p95, stats.p99]
        np.testing.assert_allclose(found, expected, rtol=1e-6)  # float32
        assert (series.rows.sum(), series.min.min(), series.max.max()) == (steps, good.min(), good.max())
    told = [event.message for event in run.events]
    lost = count - len(run.names())
    assert told == ([f"{lost} of {count} series are only in the .record folder"] if lost else [])


def test_huge_events_also_fit(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with RunWriter(path, header()) as writer:
        writer.append([0, 1], {"train/x": np.ones(2)})
        for step in range(1000):
            writer.event(step, "incident", "x" * 9000)
    assert path.stat().st_size <= 5_000_000
    assert load_run(path).events_dropped > 0


def test_histograms_are_summed_by_bucket(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    counts = np.random.default_rng(4).integers(0, 100, (1000, 4))
    edges = np.linspace(0, 1, 5)
    with RunWriter(path, header()) as writer:
        writer.append_histogram("gate/alpha", 0, counts[0], edges)
        writer.append_histogram("gate/alpha", np.arange(1, 1000), counts[1:], edges)
    valid(path)
    histogram = load_run(path).histogram("gate/alpha")
    assert histogram is not None
    np.testing.assert_array_equal(histogram.edges, edges)
    assert len(histogram.steps) < 1000
    for first, last, row in zip(histogram.steps, histogram.last, histogram.counts, strict=True):
        np.testing.assert_array_equal(row, counts[first : last + 1].sum(axis=0))


def test_new_columns_start_a_new_stream_and_absent_ones_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with RunWriter(path, header()) as writer:
        writer.append([0, 1], {"a": [1, 2]})
        writer.append([2], {"b": [5], "a": [3]})
        writer.append([3], {"b": [6]})
    assert len(list((tmp_path / "run.record").glob("*.arrow"))) == 2
    run = load_run(path)
    a, b = run.series("a"), run.series("b")
    assert a is not None
    assert b is not None
    np.testing.assert_array_equal(a.value, [1, 2, 3, np.nan])
    np.testing.assert_array_equal(a.missing, [0, 0, 0, 1])
    np.testing.assert_array_equal(b.value, [np.nan, np.nan, 5, 6])


def test_resume_replaces_repeated_steps(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    writer = RunWriter(path, header())
    writer.append([0, 1, 2, 3], {"a": [0, 1, 2, 3], "b": [9, 9, 9, 9]})
    writer.append_histogram("h", [0, 1, 2, 3], np.ones((4, 1)), [0, 1])
    writer.event(2, "stage", "S1")
    writer.finish("interrupted")
    later = RunHeader("run", "id-2", "2025-01-01T00:00:00+00:00", steps_planned=6)
    with RunWriter(path, later, resume_at=2) as writer:
        writer.append([2, 3, 4], {"a": [20, 30, 40]})
        writer.append_histogram("h", [2, 3, 4], np.full((3, 1), 7), [0, 1])
        writer.event(2, "stage", "S1")
    run = load_run(path)
    a, b, h = run.series("a"), run.series("b"), run.histogram("h")
    assert a is not None
    assert b is not None
    assert h is not None
    np.testing.assert_array_equal(run.steps, [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(a.value, [0, 1, 20, 30, 40])
    np.testing.assert_array_equal(b.missing, [0, 0, 1, 1, 1])  # a row is replaced whole
    np.testing.assert_array_equal(h.counts[:, 0], [1, 1, 7, 7, 7])
    assert [event.message for event in run.events] == ["resumed at step 2", "S1"]
    assert (run.header.run_id, run.header.steps_planned, run.status) == ("id-1", 6, "completed")
    assert [module.name for module in run.modules] == ["encoder"]


def test_resume_voids_what_was_recorded_after_its_step_even_if_it_is_never_done_again(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with RunWriter(path, header()) as writer:  # killed after step 9, its last checkpoint was at step 5
        writer.append(range(10), {"a": np.arange(10.0)})
        writer.append_histogram("h", range(10), np.ones((10, 1)), [0, 1])
        writer.event(4, "spike", "kept")
        writer.event(8, "spike", "never happened")
    with RunWriter(path, header(), resume_at=5) as writer:
        writer.append([5, 6], {"a": [50.0, 60.0]})
    run = load_run(path)
    a, h = run.series("a"), run.histogram("h")
    assert a is not None
    assert h is not None
    np.testing.assert_array_equal(run.steps, [0, 1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(a.value, [0, 1, 2, 3, 4, 50, 60])
    np.testing.assert_array_equal(h.steps, [0, 1, 2, 3, 4])
    assert [event.message for event in run.events] == ["kept", "resumed at step 5"]
    with RunWriter(path, header(), resume_at=3):
        pass  # interrupted before its first row
    np.testing.assert_array_equal(load_run(path).steps, [0, 1, 2])


def test_starting_anew_forgets_the_old_run(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write(path, 10, {"old": np.ones(10)})
    with RunWriter(path, header()) as writer:
        assert not path.exists()
        writer.append([0], {"new": [1]})
    assert load_run(path).names() == ["new"]


def test_a_truncated_last_block_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    values = np.random.default_rng(0).normal(size=128).astype("f4")
    write(path, 128, {"a": values, "b": values}, block=32)
    file = next((tmp_path / "run.record").glob("*.arrow"))
    whole = file.read_bytes()
    (tmp_path / "run.record" / "events.jsonl").write_text('{"step": 1, "ki')
    for size in range(0, len(whole), 61):
        file.write_bytes(whole[:size])
        run = load_run(tmp_path / "run.record")
        kept = len(run.steps)
        assert kept % 32 == 0
        if kept:
            series = run.series("b")
            assert series is not None
            np.testing.assert_array_equal(series.value.astype("f4"), values[:kept])
    assert kept == 96  # the last size cut the last block or its end mark
    assert any("cut off" in event.message for event in run.events)


def test_a_killed_process_leaves_a_readable_record(tmp_path: Path) -> None:
    script = """
import os, sys, signal, numpy as np
from bifusion_diag.record import RunWriter, RunHeader
w = RunWriter(sys.argv[1], RunHeader("killed"))
for s in range(0, 96, 32):
    w.append(np.arange(s, s + 32), {"train/x": np.arange(s, s + 32)})
w.event(95, "note", "here")
w.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "run.json")], check=False, timeout=60)
    with pytest.raises(RecordError, match=r"run\.record can be read instead"):
        load_run(tmp_path / "run.json")
    run = load_run(tmp_path / "run.record")
    assert run.status == "running"
    np.testing.assert_array_equal(run.steps, np.arange(96))
    assert run.events[0].message == "here"


def test_status_follows_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with pytest.raises(ZeroDivisionError), RunWriter(path, header()):
        raise ZeroDivisionError("by zero")
    assert (load_run(path).status, load_run(path).error) == ("failed", "ZeroDivisionError: by zero")
    with pytest.raises(KeyboardInterrupt), RunWriter(path, header()):
        raise KeyboardInterrupt
    assert (load_run(path).status, load_run(path).error) == ("interrupted", None)
    with RunWriter(path, header()) as writer:
        writer.finish("interrupted")
        writer.finish("completed")
    assert load_run(path).status == "interrupted"
    assert not list(tmp_path.glob("*.tmp"))


def test_no_step_at_all(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with RunWriter(path, header()) as writer:
        writer.append([], {"a": []})
    valid(path)
    assert load_run(path).names() == []


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be recorded there.*Choose another"):
        RunWriter(tmp_path / "file" / "run.json", header())
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="it is a folder"):
        RunWriter(tmp_path / "folder", header())
    with pytest.raises(UserError, match="no record to resume"):
        RunWriter(tmp_path / "run.json", header(), resume_at=1)


def damage(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["run.record", "run.tensorboard", "run.checkpoints"])
def test_a_run_is_not_named_like_a_folder_of_its_own(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"keeps a folder of that name. Give a file name such as .*run\.json"):
        RunWriter(tmp_path / name, header())
    assert list(tmp_path.iterdir()) == []


def test_a_record_with_a_damaged_head_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "run.json", 4, {"loss/total": np.ones(4)})
    path = tmp_path / "run.record" / "000000-series.arrow"
    path.write_bytes(path.read_bytes().replace(b'["loss/total"]', b'["loss/total",'))
    with pytest.raises(RecordError, match=r"000000-series.arrow: damaged at its head"):
        load_run(tmp_path / "run.record")


def test_bad_files_say_what_is_wrong(tmp_path: Path) -> None:
    good = tmp_path / "run.json"
    write(good, 5, {"a": np.ones(5)})
    text = good.read_text(encoding="utf-8")
    bad = tmp_path / "bad.json"
    with pytest.raises(RecordError, match=r"not valid JSON.*truncated or damaged"):
        load_run(damage(bad, text[: len(text) // 2]))
    with pytest.raises(RecordError, match="not valid JSON"):
        load_run(damage(bad, text.replace("null,1.0", "null,NaN")))
    with pytest.raises(RecordError, match="not a run record"):
        load_run(damage(bad, "[1, 2]"))
    with pytest.raises(RecordError, match=r"schema version 3\.0.*reads 2\.x.*Update"):
        load_run(damage(bad, text.replace('"schema_version":"2.1"', '"schema_version":"3.0"')))
    assert load_run(damage(bad, text.replace('"schema_version":"2.1"', '"schema_version":"2.7"'))).names() == ["a"]
    document = json.loads(text)
    for key in document.keys() - {"kind", "schema_version"}:
        with pytest.raises(RecordError, match="damaged"):
            load_run(damage(bad, json.dumps({k: v for k, v in document.items() if k != key})))
    document["series"]["a"]["value"] = [1, 2]
    with pytest.raises(RecordError, match="2 values where 5 were expected"):
        load_run(damage(bad, json.dumps(document)))
    bad.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match="not valid JSON"):
        load_run(bad)
    with pytest.raises(RecordError, match="cannot be read"):
        load_run(tmp_path / "absent.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match="not a run record"):
        load_run(tmp_path / "empty")


def test_a_signalling_nan_is_a_nan(tmp_path: Path) -> None:
    write(tmp_path / "run.json", 3, {"x": np.array([0x3F800000, 0x7FA00000, 0xFFA00001], np.uint32).view("f4")})
    series = load_run(tmp_path / "run.json").series("x")
    assert series is not None
    np.testing.assert_array_equal(series.value, [1, np.nan, np.nan])


def test_steps_pack_as_ranges() -> None:
    steps = np.array([0, 1, 2, 10, 20, 30, 31, 99])
    assert pack_steps(steps) == [[0, 2, 1], [10, 30, 10], [31, 99, 68]]
    np.testing.assert_array_equal(unpack_steps(pack_steps(steps)), steps)
    assert pack_steps(np.array([4])) == [[4, 4, 1]]
    assert unpack_steps([]).size == 0


def test_full_resolution_is_at_hand(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=9000).astype("f4")
    write(tmp_path / "run.json", 9000, {"train/x": values, "y": -values}, block=100)
    steps, column, missing = RecordReader(tmp_path / "run.record").column("y")
    np.testing.assert_array_equal(steps, np.arange(9000))
    np.testing.assert_array_equal(column, -values)
    assert not missing.any()


def test_the_room_does_not_import_torch() -> None:
    code = "import sys, bifusion_diag.record; sys.exit('torch' in sys.modules or 'tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_a_record_that_cannot_be_finished_does_not_hide_the_error(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run.json", header())
    (tmp_path / "run.json").mkdir()  # in the way of the document
    expected = pytest.warns(RuntimeWarning, match=r"run.json: cannot be written.*can be read from .*run\.record")
    with expected, pytest.raises(ZeroDivisionError), writer:
        raise ZeroDivisionError
    assert load_run(tmp_path / "run.record").status == "failed"


def test_a_file_that_is_no_record_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "thesis.json"
    path.write_text('{"chapter": 1}')
    with pytest.raises(UserError, match="no run record"):
        RunWriter(path, header())
    assert path.read_text() == '{"chapter": 1}'


def test_resuming_takes_the_old_document_away_until_there_is_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with RunWriter(path, header()) as writer:
        writer.append([0], {"x": [1.0]})
        writer.finish("interrupted")
    again = RunWriter(path, header(), resume_at=1)
    assert not path.exists()
    again.append([1], {"x": [2.0]})
    again.finish("completed")
    assert load_run(path).steps.tolist() == [0, 1]


def test_a_run_is_found_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    with RunWriter(folder / "run.json", header()) as writer:
        writer.append([0, 1], {"x": [1.0, 2.0]})
        writer.flush()
        assert load_run(folder).status == "running"
    assert [resolve_run(folder / name) for name in (".", "run.json")] == [folder / "run.json"] * 2
    assert resolve_run(folder / "run.record") == folder / "run.record"
    assert load_run(folder).status == "completed"
    (folder / "run.json").unlink()
    assert load_run(str(folder)).steps.tolist() == [0, 1]
    assert resolve_run(tmp_path / "absent") == tmp_path / "absent"


def test_half_a_character_is_read_as_one_that_files_can_hold() -> None:
    assert loads('{"a\\ud800": ["\\udfff!", "\\ud83d\\ude00"]}') == {"a?": ["?!", "😀"]}
