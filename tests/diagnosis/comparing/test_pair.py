"""Comparison of runs: verdict, parting, common steps, settings, findings."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import hypergeom

from bifusion_diag.diagnosis import (
    Finding,
    NotMeasured,
    Quantity,
    RunAssessment,
    assess_run,
    compare_runs,
    load_measured,
    measure,
    measure_record,
    to_plain,
)
from bifusion_diag.diagnosis.instruments import instrument_measures
from bifusion_diag.diagnosis.verdict import fisher_more
from bifusion_diag.errors import UserError
from bifusion_diag.record import RecordReader, RunHeader, RunWriter, load_run
from bifusion_diag.record.schema import Run

RunMaker = Callable[..., Run]


def healthy(steps: int = 100, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"loss/total": rng.lognormal(0, 0.1, steps), "train/grad_norm": rng.lognormal(0, 0.3, steps)}


def with_bad(series: dict[str, np.ndarray], *steps: int) -> dict[str, np.ndarray]:
    norm = series["train/grad_norm"].copy()
    norm[list(steps)] = np.nan
    return {**series, "train/grad_norm": norm}


def test_less_stable_names_its_three_numbers(make_run: RunMaker) -> None:
    baseline = make_run(healthy(), name="baseline-5cm")
    candidate = make_run(with_bad(healthy(seed=1), 41, 60), name="bifusion")
    comparison = compare_runs(baseline, candidate)
    assert comparison.verdict.state == "less stable"
    assert comparison.verdict.sentence == (
        "bifusion is less stable than baseline-5cm: 2 bad steps in 100 (baseline 0), first at step 41."
    )
    assert comparison.partings[0].step == 41
    assert (comparison.partings[0].kind, comparison.partings[0].run) == ("non-finite", "candidate")


def test_validation_metrics_are_set_against_each_other_at_one_step_and_of_the_same_scenes_only(
    make_run: RunMaker,
) -> None:
    short = {"loss/total": np.ones(3), "eval/miou": [0.25, math.nan, 0.5]}  # the last of both is after the last step
    long = {"loss/total": np.ones(5), "eval/miou": [0.5, 0.75, math.nan, math.nan, 1.0]}
    missing = [{"eval/miou": [bool(np.isnan(x)) for x in each["eval/miou"]]} for each in (short, long)]

    def pair(validation: dict[str, object], other: dict[str, object]) -> tuple[float | None, ...]:
        baseline = make_run(short, missing=missing[0], provenance={"validation": validation})
        candidate = make_run(long, missing=missing[1], provenance={"validation": other})
        comparison = compare_runs(baseline, candidate)
        found = next(pair for pair in comparison.measures if pair.key == "eval/miou")
        assert isinstance(found.baseline, Quantity)
        assert isinstance(found.candidate, Quantity)
        told = any("different scenes" in limit for limit in comparison.limits)
        assert told == (found.ratio is None)
        return found.baseline.value, found.candidate.value, found.ratio

    rooms = {"kind": "synthetic rooms", "chosen": "8-9", "superpoints": "VCCS"}
    assert pair(rooms, rooms) == (0.25, 0.5, 2.0)  # both at step 0
    assert pair(rooms, rooms | {"superpoints": "VCCS relabelled by masks"}) == (0.25, 0.5, 2.0)
    assert pair(rooms, rooms | {"chosen": "7, 9"}) == (0.5, 0.75, None)  # each at its own last


def test_two_healthy_runs_are_stable_and_do_not_part(make_run: RunMaker) -> None:
    comparison = compare_runs(make_run(healthy()), make_run(healthy(seed=1)))
    assert comparison.verdict.state == "stable"
    assert comparison.partings == ()
    assert comparison.first_loss_difference == 0


def test_the_same_run_twice_differs_nowhere(make_run: RunMaker) -> None:
    comparison = compare_runs(make_run(healthy()), make_run(healthy()))
    assert comparison.first_loss_difference is None
    assert comparison.baseline.name != comparison.candidate.name
    assert {pair.ratio for pair in comparison.measures} <= {None, 1.0}


def test_a_run_that_never_recovers_is_unstable(make_run: RunMaker) -> None:
    candidate = make_run(with_bad(healthy(), *range(30, 100)))
    assert compare_runs(make_run(healthy()), candidate).verdict.state == "unstable"


def test_a_short_healthy_run_is_not_called_stable(make_run: RunMaker) -> None:
    comparison = compare_runs(make_run(healthy(20)), make_run(healthy(20, seed=1)))
    assert comparison.verdict.state == "not enough data"
    assert "takes 50 steps" in comparison.verdict.sentence
    assert assess_run(make_run(healthy(20))).verdict.state == "not enough data"


def test_one_spike_more_may_be_chance(make_run: RunMaker) -> None:
    series = healthy(200)
    series["train/grad_norm"] = np.append(series["train/grad_norm"][:-1], 100.0)
    comparison = compare_runs(make_run(healthy(200)), make_run(series))
    assert comparison.verdict.state == "stable"
    assert "p = 0.5" in comparison.verdict.detail
    assert comparison.candidate.criteria[2].result == "fail"


@pytest.mark.parametrize(("candidate", "baseline", "steps"), [(1, 0, 600), (5, 0, 600), (14, 3, 600), (600, 0, 600)])
def test_fisher_against_scipy(candidate: int, baseline: int, steps: int) -> None:
    expected = hypergeom(2 * steps, steps, candidate + baseline).sf(candidate - 1)
    assert fisher_more(candidate, baseline, steps) == pytest.approx(expected, rel=1e-6)


def test_drift_is_found_where_it_begins(make_run: RunMaker) -> None:
    growing = healthy(200, seed=1)
    calm = growing["train/grad_norm"] ** 0.3  # no sixfold swing of it is a spike
    growing["train/grad_norm"] = calm * np.where(np.arange(200) < 100, 1, 6)
    (parting,) = compare_runs(make_run(healthy(200)), make_run(growing)).partings
    assert (parting.kind, parting.run) == ("drift", "candidate")
    assert 100 < parting.step <= 120  # the running median over 20 steps needs about half of them


def test_runs_of_different_length_are_compared_over_common_steps(make_run: RunMaker) -> None:
    baseline = make_run(healthy(200))
    candidate = make_run(with_bad(healthy(400, seed=1), 50, 300), probes=["gate"])
    comparison = compare_runs(baseline, candidate)
    assert comparison.candidate.steps == 200
    assert comparison.candidate.measures.nonfinite == (50,)
    assert comparison.candidate.measures.number("grad_norm/max") == pytest.approx(
        np.nanmax(np.float32(candidate.all_series["train/grad_norm"].value[:200]))
    )
    assert "the 200 steps that both runs have" in comparison.limits[0]
    assert comparison.limits[-1] == "Only the candidate was probed with gate: these measures stand alone."


def test_measures_of_one_run_alone_stand_beside_not_measured(make_run: RunMaker) -> None:
    comparison = compare_runs(make_run(healthy()), make_run({**healthy(), "gate/mean": np.full(100, 0.5)}))
    pair = next(pair for pair in comparison.measures if pair.key == "gate/mean")
    assert isinstance(pair.baseline, NotMeasured)
    assert pair.candidate.value == 0.5
    assert pair.ratio is None


def test_runs_without_a_common_step_cannot_be_compared(make_run: RunMaker) -> None:
    with pytest.raises(UserError, match=r"no step in common: 'a' recorded steps 0–1, 'b' steps 5–6"):
        compare_runs(
            make_run({"loss/total": [1, 1]}, name="a"), make_run({"loss/total": [1, 1]}, name="b", steps=[5, 6])
        )


def test_an_empty_run_cannot_be_assessed(make_run: RunMaker) -> None:
    with pytest.raises(UserError, match="recorded no step"):
        assess_run(make_run({}))


def test_settings_that_differ_come_first(make_run: RunMaker) -> None:
    left = make_run(healthy(), settings={"a": 1, "optim": {"lr": 1e-4, "clip": None}})
    right = make_run(healthy(), settings={"a": 1, "optim": {"lr": 2e-4, "clip": None}, "new": True})
    (group,) = compare_runs(left, right).settings
    assert [(row.key, row.baseline, row.candidate, row.differs) for row in group.rows] == [
        ("optim.lr", "0.0001", "0.0002", True),
        ("new", "—", "yes", True),
        ("a", "1", "1", False),
        ("optim.clip", "none", "none", False),
    ]


def test_modules_of_both_runs_worst_first(make_run: RunMaker) -> None:
    def gradients(**norms: float) -> dict[str, np.ndarray]:
        series = healthy()
        for module, norm in norms.items():
            series |= {f"grads/{module}/state": np.full(100, 3), f"grads/{module}/param_norm": np.full(100, norm)}
        return series

    comparison = compare_runs(
        make_run(gradients(a=1, b=2, c=1)), make_run(gradients(a=1, b=0.25, c=3, own=9), modules=("a", "b", "c", "own"))
    )
    assert [(pair.module, pair.ratio) for pair in comparison.modules] == [("b", 0.125), ("c", 3.0), ("a", 1.0)]


def test_findings_name_term_steps_and_remedy(make_run: RunMaker) -> None:
    broken = {**healthy(), "loss/instance/raw": np.where(np.isin(np.arange(100), [7, 9]), np.nan, 1.0)}
    settings = {"losses": {"instance": {"empty_match": "nan"}}}
    (finding,) = assess_run(make_run(broken, settings=settings)).findings
    assert (finding.rule, finding.severity, finding.term) == ("nonfinite-loss", "error", "instance")
    assert (finding.steps, finding.count) == ((7, 9), 2)
    assert finding.remedy == {"losses.instance.empty_match": "zero"}
    assert "At 2 of 2 steps every gradient is finite" in finding.mechanism


def test_a_healthy_run_has_no_finding_and_says_what_it_could_not_measure(make_run: RunMaker) -> None:
    assessment = assess_run(make_run(healthy()))
    assert assessment.findings == ()
    assert {"projection-nonfinite", "alpha-stuck"} <= {rule.rule for rule in assessment.unmeasured}


@pytest.mark.parametrize(
    ("series", "rule"),
    [
        ({"projection/nan": [0, 0], "projection/inf": [0, 5]}, "projection-nonfinite"),
        ({"train/clip_coefficient": [0.5, 0.1]}, "clipping-always-on"),
        ({"gate/mean": [0.1, 0.2]}, "alpha-out-of-band"),
        ({"gate/mean": np.full(100, 0.5)}, "alpha-stuck"),
        ({"gate/mean": [0.5], "gate/share_lt_0.05": [0.5], "gate/share_gt_0.95": [0.2]}, "gate-saturated"),
        ({"projection/valid_share": [0.1, 0.1]}, "low-valid-share"),
        ({"clip/head/absmax": [3, 11]}, "clip-out-of-range"),
        ({"clip/ratio_2d_3d": [20, 20], "clip/head/max": [1, 1]}, "scale-mismatch"),
        ({"loss/a/weighted": [99, 99], "loss/b/weighted": [1, 1]}, "dominant-term"),
        ({"data/semantic/out_of_range": [0, 3]}, "labels-out-of-range"),
        ({"data/pose/nonfinite": [0, 12], "data/xyz/nonfinite": [0, 0]}, "data-nonfinite"),
        ({"attention/decoder.0/masked_rows": [0, 3]}, "attention-masked-rows"),
        ({"activations/head/nonfinite": [0, 3]}, "nonfinite-output"),
        ({"matching/empty": [0, 1]}, "empty-match"),
    ],
)  # fmt: skip
def test_rules_fire(make_run: RunMaker, series: dict[str, list[float]], rule: str) -> None:
    assert [finding.rule for finding in assess_run(make_run(series)).findings] == [rule]


def test_findings_of_data_name_fields_and_steps(make_run: RunMaker) -> None:
    columns = {"data/pose/nonfinite": [0, 12, 0, 4], "data/xyz/nonfinite": [0, 0, 1, 0], "data/rgb/nonfinite": [0] * 4}
    finding = assess_run(make_run(columns, steps=[10, 11, 12, 13])).findings[0]
    assert (finding.steps, finding.count) == ((11, 13), 3)
    stated = {item.series: item.reading for item in finding.evidence}
    assert stated == {
        "data/pose/nonfinite": Quantity(16), "data/xyz/nonfinite": Quantity(1),
    }  # fmt: skip


def test_the_first_non_finite_output_is_that_of_the_innermost_module_that_runs_first(make_run: RunMaker) -> None:
    bad = {"(root)": [0, 1, 1], "net": [0, 1, 1], "net.b": [0, 1, 0], "net.a": [0, 1, 0], "net.c": [0, 0, 1]}
    columns = {f"activations/{name}/nonfinite": values for name, values in bad.items()}
    columns["activations/fine/nonfinite"] = [0, 0, 0]
    run = make_run(columns, steps=[5, 6, 7], modules=["(root)", "net", "net.a", "net.b", "net.c", "fine"])
    finding = assess_run(run).findings[0]
    assert (finding.module, finding.steps) == ("net.a", (6, 6))
    assert [item.reading for item in finding.evidence] == [Quantity(1, "steps"), Quantity(5, "modules")]


def test_of_many_counts_the_largest_are_named(make_run: RunMaker) -> None:
    run = make_run({f"attention/layer{index}/masked_rows": [0, index] for index in range(9)})
    finding = assess_run(run).findings[0]
    assert [item.label.split(",")[0] for item in finding.evidence[:5]] == [f"layer{i}" for i in (8, 7, 6, 5, 4)]
    assert finding.evidence[5].reading == Quantity(3, "others")  # layer0 has none


def test_a_dominant_term_is_set_beside_its_gradient(make_run: RunMaker) -> None:
    columns = {"loss/a/weighted": [99, 99], "loss/b/weighted": [1, 1], "loss_gradients/a/share": [0.5, 0.25]}
    finding = assess_run(make_run(columns)).findings[0]
    assert finding.evidence[1].reading == Quantity(0.375)
    assert "which stands beside it" in finding.mechanism


@pytest.mark.parametrize("way", ["replace", "clamp", "none", "strict"])
def test_bad_coordinates_that_are_let_through_are_traced_to_their_setting(make_run: RunMaker, way: str) -> None:
    at = np.isin(np.arange(100), [7, 9])
    broken = {**healthy(), "projection/nan": np.where(at, 5.0, 0.0), "projection/inf": np.zeros(100)}
    for name in ("loss/instance/raw", "train/grad_norm"):
        broken[name] = np.where(at, np.nan, 1.0)
    settings = {"model": {"projection": {"sanitize": way}}}
    found = {finding.rule: finding for finding in assess_run(make_run(broken, settings=settings)).findings}
    remedy = None if way == "strict" else {"model.projection.sanitize": "strict"}
    assert found["nonfinite-loss"].remedy == found["projection-nonfinite"].remedy == remedy

    elsewhere = {**broken, "projection/nan": np.roll(broken["projection/nan"], 50)}
    found = {finding.rule: finding for finding in assess_run(make_run(elsewhere, settings=settings)).findings}
    assert found["nonfinite-loss"].remedy is None


def test_everything_is_strict_json(make_run: RunMaker) -> None:
    series = healthy()
    series["train/grad_norm"][50:] = np.inf
    text = json.dumps(to_plain(compare_runs(make_run(healthy()), make_run(series))), allow_nan=False)
    assert json.loads(text)["verdict"]["state"] == "unstable"


def test_a_reduced_record_keeps_what_was_measured_at_full_resolution(tmp_path: Path) -> None:
    steps = 20_000
    series = with_bad(healthy(steps), 12_345)
    series["train/grad_norm"][777] = 500
    series |= {f"grads/m{index}/state": np.full(steps, 3) for index in range(4)}
    series |= {f"grads/m{index}/param_norm": series["train/grad_norm"] for index in range(4)}
    series |= {f"loss/t{index}/raw": series["loss/total"] for index in range(20)}
    header = RunHeader("long")
    with RunWriter(tmp_path / "run.json", header) as writer:
        writer.append(np.arange(steps), series)
        writer.flush()
        full = measure_record(RecordReader(writer.folder))
        writer.finish("completed", measures=to_plain(full))
    run = load_run(tmp_path / "run.json")
    assert not run.all_series["train/grad_norm"].exact
    again = measure(run)
    assert again.readings == full.readings | instrument_measures(run)
    assert (again.nonfinite, again.spikes, again.origins) == (full.nonfinite, full.spikes, full.origins)
    assert full.nonfinite == (12_345,)
    assert full.spikes == (777,)
    assert full.origins[0].module == "m3"
    assert assess_run(run).verdict.state == "unstable"


def test_more_spikes_than_a_clean_baseline_may_be_chance_and_are_then_no_verdict(make_run: RunMaker) -> None:
    def with_spikes(*steps: int) -> Run:
        series = healthy(120)
        norms = series["train/grad_norm"].copy()
        norms[list(steps)] = 100.0
        series["train/grad_norm"] = norms
        return make_run(series)

    few = compare_runs(make_run(healthy(120)), with_spikes(40, 80)).verdict
    assert few.state == "not enough data"
    assert "cannot be told from" in few.sentence
    assert "p = 0.25" in few.detail
    assert compare_runs(with_spikes(40, 80), with_spikes(40, 80)).verdict.state == "unstable"
    assert compare_runs(with_spikes(20, 40, 60), with_spikes(40)).verdict.state == "stable"
    assert compare_runs(make_run(healthy(120)), with_spikes(20, 40, 60, 80, 100)).verdict.state == "less stable"


def test_a_killed_long_run_is_measured_at_full_resolution(tmp_path: Path) -> None:
    steps = 20_000
    norm = np.random.default_rng(0).lognormal(0, 0.2, steps)
    norm[[900, 15_000]] *= 60
    norm[18_000:] = np.nan
    loss = np.random.default_rng(1).lognormal(0, 0.2, steps)
    loss[5000:5010] = np.nan
    columns = {"train/grad_norm": norm, "loss/total": loss, "loss/a/raw": loss} | _many(steps)
    with RunWriter(tmp_path / "whole.json", RunHeader("killed")) as writer:
        writer.append(np.arange(steps), columns, {})
        writer.flush()
        killed = tmp_path / "killed.record"
        shutil.copytree(writer.folder, killed)
    assert not load_run(killed).series("train/grad_norm").exact  # type: ignore[union-attr]

    assessment = assess_run(load_measured(killed))
    assert assessment.measures.number("bad_steps") == 2012
    assert "2012 bad steps in 20000, first at step 900" in assessment.verdict.sentence
    assert "was cut short or is still going after step 19999" in assessment.verdict.detail
    whole = load_measured(killed)
    assert compare_runs(whole, whole).verdict.state == "unstable"  # its end is lost, though lists of steps are bounded
    counts = {finding.rule: finding.evidence[2].reading for finding in assessment.findings if finding.term == "a"}
    assert counts["nonfinite-loss"] in (Quantity(10, "steps"), NotMeasured("no gradient norm of these steps"))


def _many(steps: int) -> dict[str, np.ndarray]:
    """So many series that a record of them is reduced."""
    values = np.random.default_rng(2).lognormal(0, 0.2, (20, steps))
    return {f"train/extra_{index}": row for index, row in enumerate(values)}


def test_a_reduced_record_without_measures_states_no_count(make_run: Callable[..., Run], tmp_path: Path) -> None:
    steps = 20_000
    norm = np.random.default_rng(0).lognormal(0, 0.2, steps)
    norm[3000:4000] = np.nan
    path = tmp_path / "bare.json"
    with RunWriter(path, RunHeader("bare")) as writer:
        loss = np.random.default_rng(1).lognormal(0, 0.2, steps)
        writer.append(np.arange(steps), {"train/grad_norm": norm, "loss/total": loss} | _many(steps), {})
        writer.finish("completed", measures={})
    run = load_run(path)
    assert not run.series("train/grad_norm").exact  # type: ignore[union-attr]
    assessment = assess_run(run)
    assert "at least" in assessment.verdict.sentence
    reasons = {gap.rule: gap.reason for gap in assessment.unmeasured}
    assert "holds no origins" in reasons["nonfinite-gradient"]
    short = make_run({"train/grad_norm": np.ones(100), "loss/total": np.ones(100)}, name="short")
    verdict = compare_runs(short, run).verdict
    assert "its bad steps are not measured (the record is reduced" in verdict.sentence
    assert "no bad step" not in verdict.sentence


def test_what_was_not_recorded_is_not_called_clean(make_run: Callable[..., Run]) -> None:
    bare = make_run({"train/lr": np.ones(120)}, name="bare")
    lossy = make_run({"loss/total": np.where(np.arange(120) == 7, np.nan, 1.0)}, name="lossy")
    assert "its bad steps are not measured" in assess_run(bare).verdict.sentence
    verdict = compare_runs(bare, lossy).verdict
    assert (verdict.state, "(baseline not measured)" in verdict.sentence) == ("unstable", True)
    quiet = make_run({"loss/total": np.ones(120)}, name="quiet")
    sentence = assess_run(quiet).verdict.sentence
    assert "spikes are not measured (train/grad_norm was not recorded)" in sentence
    assert "takes 50 steps" not in sentence
    gaps = [finding.evidence[2].reading for finding in assess_run(_with_term(make_run)).findings]
    assert gaps == [NotMeasured("no gradient norm of these steps")]


def _with_term(make_run: Callable[..., Run]) -> Run:
    loss = np.where(np.arange(120) == 7, np.nan, 1.0)
    return make_run({"loss/total": loss, "loss/a/raw": loss})


def test_the_verdict_says_that_a_run_failed_and_with_what_error(make_run: Callable[..., Run]) -> None:
    series = {"train/grad_norm": np.ones(80), "loss/total": np.ones(80)}
    good = make_run(series, name="good")
    dead = make_run(series, name="dead", status="failed", error="OutOfMemoryError: 12 GiB\nTraceback ...")
    ending = "It failed after step 79: OutOfMemoryError: 12 GiB."
    assert compare_runs(good, dead).verdict.detail.startswith(ending)
    assert assess_run(dead).verdict.detail.startswith(ending)
    assert "The baseline failed after step 79: OutOfMemoryError: 12 GiB." in compare_runs(dead, good).limits


def test_the_finding_of_spikes_says_what_the_loss_does(make_run: Callable[..., Run]) -> None:
    norm = np.random.default_rng(0).lognormal(0, 0.1, 120)
    norm[[70, 90]] *= 50
    rises = np.where(np.isin(np.arange(120), [90]), 2.5, 1.0)
    with_loss = assess_run(make_run({"train/grad_norm": norm, "loss/total": rises}))
    alone = assess_run(make_run({"train/grad_norm": norm, "loss/total": np.ones(120)}))
    unknown = assess_run(make_run({"train/grad_norm": norm}))
    told = [_spike_finding(one).mechanism for one in (with_loss, alone, unknown)]
    assert "at 1 of 2 it rises too" in told[0]
    assert "does not rise" in told[1]
    assert told[2] == ""


def test_a_module_that_grew_most_is_not_said_to_have_jumped(make_run: Callable[..., Run]) -> None:
    norm = np.random.default_rng(0).lognormal(0, 0.1, 120)
    norm[70] *= 50
    module = np.ones(120)
    module[70] = 3
    series = {"train/grad_norm": norm, "grads/m/state": np.full(120, 3), "grads/m/param_norm": module}
    mechanism = _spike_finding(assess_run(make_run(series, modules=["m"]))).mechanism
    assert "m is the module whose gradient grew most; no module's grew more than 8 ×" in mechanism


def _spike_finding(assessment: RunAssessment) -> Finding:
    return next(finding for finding in assessment.findings if finding.rule == "gradient-spike")


def test_modules_are_compared_over_the_common_steps(make_run: Callable[..., Run]) -> None:
    def run(name: str, steps: int) -> Run:
        norm = np.where(np.arange(steps) < 60, 1.0, 100.0)
        series = {"train/grad_norm": norm, "grads/m/state": np.full(steps, 3), "grads/m/param_norm": norm}
        return make_run(series, name=name, modules=["m"])

    (pair,) = compare_runs(run("long", 200), run("short", 60)).modules
    assert (pair.baseline.median, pair.candidate.median, pair.ratio) == (1, 1, 1)


def test_names_cannot_reorder_or_flood_the_verdict(make_run: Callable[..., Run]) -> None:
    run = make_run({"train/grad_norm": np.ones(80)}, name="a\u202eb\n\x1b[31m" + "x" * 300)
    sentence = assess_run(run).verdict.sentence
    assert sentence.startswith("ab [31mxxx")
    assert len(sentence) < 200
    assert "\u202e" not in sentence


def test_a_criterion_without_a_finite_norm_shows_no_infinity(make_run: Callable[..., Run]) -> None:
    series = {"train/grad_norm": np.full(80, np.nan), "loss/total": np.ones(80)}
    judged = {criterion.key: criterion for criterion in assess_run(make_run(series)).criteria}
    assert judged["grad_norm"].result == "fail"
    assert math.isnan(judged["grad_norm"].reading.value)  # type: ignore[union-attr, arg-type]
    assert "no norm after the warm-up is finite" in judged["grad_norm"].note
