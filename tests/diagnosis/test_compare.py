"""Comparison of runs: verdict, parting, common steps, settings, findings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import hypergeom

from bifusion_diag.diagnosis import NotMeasured, assess_run, compare_runs, measure, measure_record, to_plain
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
    ],
)  # fmt: skip
def test_rules_fire(make_run: RunMaker, series: dict[str, list[float]], rule: str) -> None:
    assert [finding.rule for finding in assess_run(make_run(series)).findings] == [rule]


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
        full = measure_record(RecordReader(writer.folder))
        writer.finish("completed", measures=to_plain(full))
    run = load_run(tmp_path / "run.json")
    assert not run.all_series["train/grad_norm"].exact
    assert measure(run) == full
    assert full.nonfinite == (12_345,)
    assert full.spikes == (777,)
    assert full.origins[0].module == "m3"
    assert assess_run(run).verdict.state == "unstable"


def test_more_spikes_than_a_clean_baseline_are_less_stable_though_it_may_be_chance(make_run: RunMaker) -> None:
    series = healthy(120)
    norms = series["train/grad_norm"].copy()
    norms[[40, 80]] = 100.0
    series["train/grad_norm"] = norms
    comparison = compare_runs(make_run(healthy(120)), make_run(series))
    assert comparison.verdict.state == "less stable"
    assert "p = 0.25" in comparison.verdict.detail
    assert compare_runs(make_run(series), make_run(series)).verdict.state == "unstable"
