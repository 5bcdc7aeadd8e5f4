"""A planted module, term or setting is ranked first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bifusion_diag.diagnosis import Quantity, compare_runs
from bifusion_diag.diagnosis.comparing.attribution import ATTRIBUTED, Attribution
from bifusion_diag.record.schema import Run

RunMaker = Callable[..., Run]
STEPS = 200
MODULES = ("backbone.conv0", "backbone.conv1", "gate.alpha", "decoder.head")
CALM = {"backbone.conv0": 1.0, "backbone.conv1": 2.0, "gate.alpha": 0.5, "decoder.head": 1.5}


def run_of(
    make_run: RunMaker,
    norms: dict[str, float],
    *,
    terms: dict[str, float] | None = None,
    spike: tuple[int, str] | None = None,
    settings: dict[str, Any] | None = None,
) -> Run:
    """Constant gradient norms by module and weighted losses by term; at one step a module's norm jumps 100-fold."""
    series: dict[str, np.ndarray] = {"loss/total": np.ones(STEPS)}
    total = np.zeros(STEPS)
    for module, norm in norms.items():
        values = np.full(STEPS, norm)
        if spike is not None and spike[1] == module:
            values[spike[0]] *= 100
        series |= {f"grads/{module}/param_norm": values, f"grads/{module}/state": np.full(STEPS, 3)}
        total += values**2
    for term, value in (terms or {}).items():
        series |= {f"loss/{term}/weighted": np.full(STEPS, value), f"loss/{term}/raw": np.full(STEPS, value)}
    series["train/grad_norm"] = np.sqrt(total) * np.random.default_rng(0).lognormal(0, 0.05, STEPS)
    return make_run(series, modules=tuple(norms), settings=settings or {}, name="run")


def of(found: tuple[Attribution, ...], measure: str) -> list[Attribution]:
    return [one for one in found if one.measure == measure]


def test_shares_of_squared_norms_by_hand(make_run: RunMaker) -> None:
    """conv1 goes from 2 to 3 (+5), gate from 0.5 to 1 (+0.75), head from 1.5 to 1 (−1.25): 7 in all."""
    after = CALM | {"backbone.conv1": 3.0, "gate.alpha": 1.0, "decoder.head": 1.0}
    found = of(compare_runs(run_of(make_run, CALM), run_of(make_run, after)).attribution, "squared_norm")
    shares = {one.name: one.share for one in found}
    assert shares == pytest.approx({"backbone.conv1": 5 / 7, "decoder.head": -1.25 / 7, "gate.alpha": 0.75 / 7})
    assert [one.name for one in found] == ["backbone.conv1", "decoder.head", "gate.alpha"]


def test_the_module_that_spikes_is_first_at_the_bad_steps(make_run: RunMaker) -> None:
    comparison = compare_runs(run_of(make_run, CALM), run_of(make_run, CALM, spike=(120, "gate.alpha")))
    assert comparison.candidate.measures.spikes == (120,)
    starts, at_bad = (of(comparison.attribution, name)[0] for name in ("module_bad_steps", "squared_norm_bad"))
    assert (starts.name, starts.share) == ("gate.alpha", 1.0)
    assert (at_bad.name, at_bad.share) == ("gate.alpha", pytest.approx(1.0, abs=1e-3))
    assert comparison.attribution[0] == starts


def test_a_module_that_only_the_candidate_has_counts_in_full(make_run: RunMaker) -> None:
    found = compare_runs(run_of(make_run, CALM), run_of(make_run, CALM | {"fusion": 4.0})).attribution
    first = of(found, "squared_norm")[0]
    assert (first.name, first.share) == ("fusion", 1.0)
    assert "fusion" not in {one.name for one in of(found, "log_norm")}


def test_the_term_that_makes_the_loss_differ_is_first(make_run: RunMaker) -> None:
    left = run_of(make_run, CALM, terms={"semantic": 1.0, "clip_align": 0.1})
    right = run_of(make_run, CALM, terms={"semantic": 1.1, "clip_align": 0.5})
    found = of(compare_runs(left, right).attribution, "loss")
    assert [(one.name, one.kind) for one in found] == [("clip_align", "term"), ("semantic", "term")]
    assert found[0].share == pytest.approx(0.8)
    assert found[0].title == ATTRIBUTED["loss"][1]


BASE: dict[str, Any] = {
    "name": "a", "model": {"projection": {"sanitize": "strict"}, "gate": {"hidden": 64}, "backbone": {"bn": 0.02}},
    "losses": {"instance": {"empty_match": "zero"}}, "optim": {"lr": 1e-4}, "training": {"seed": 0, "threads": 1},
}  # fmt: skip
OTHER: dict[str, Any] = {
    "name": "b", "model": {"projection": {"sanitize": "replace"}, "gate": {"hidden": 32}, "backbone": {"bn": 0.1}},
    "losses": {"instance": {"empty_match": "nan"}}, "optim": {"lr": 9e-5}, "training": {"seed": 1, "threads": 2},
}  # fmt: skip


def test_settings_are_ranked_remedy_risk_place_optimiser_model_seed_harmless(make_run: RunMaker) -> None:
    left = run_of(make_run, CALM, settings=BASE)
    right = run_of(make_run, CALM, settings=OTHER, spike=(120, "gate.alpha"), terms={"instance": 1.0})
    right.all_series["loss/instance/raw"].value[[50, 60]] = np.nan
    right = make_run(
        {name: series.value for name, series in right.all_series.items()}, modules=MODULES, settings=OTHER, name="run"
    )
    suspects = compare_runs(left, right).suspects
    keys = [one.key for one in suspects]
    assert keys[0] == "losses.instance.empty_match"
    assert "It is the remedy of a finding (error): Loss term instance is non-finite" in suspects[0].reason
    assert keys[1] == "model.projection.sanitize"
    assert "spec 6" in suspects[1].reason
    assert keys.index("optim.lr") < keys.index("model.backbone.bn") < keys.index("training.seed")
    assert set(keys[-2:]) == {"training.threads", "name"}
    assert [one.score for one in suspects] == sorted((one.score for one in suspects), reverse=True)


def test_the_settings_of_the_part_where_bad_steps_start_come_before_the_optimisers(make_run: RunMaker) -> None:
    right = run_of(make_run, CALM, settings=OTHER, spike=(120, "gate.alpha"))
    suspects = {one.key: one for one in compare_runs(run_of(make_run, CALM, settings=BASE), right).suspects}
    assert "start there: gate.alpha" in suspects["model.gate.hidden"].reason
    assert suspects["model.gate.hidden"].score > suspects["optim.lr"].score
    inject = {**OTHER, "training": {"seed": 0, "inject": ["nan-loss@3"]}}
    planted = compare_runs(run_of(make_run, CALM, settings=BASE), run_of(make_run, CALM, settings=inject)).suspects[0]
    assert planted.key == "training.inject"


def test_a_baseline_without_bad_steps_has_none_and_a_smoothed_run_is_not_counted(make_run: RunMaker) -> None:
    bad = run_of(make_run, CALM, spike=(120, "gate.alpha"))
    start = of(compare_runs(run_of(make_run, CALM), bad).attribution, "module_bad_steps")[0]
    assert (start.baseline, start.candidate) == (Quantity(0.0), Quantity(1.0))
    series = {name: one.value for name, one in bad.all_series.items()}
    smoothed = make_run(series, modules=MODULES, provenance={"imported": {"smoothing": 10}})
    for pair in ((smoothed, bad), (bad, smoothed)):
        assert not of(compare_runs(*pair).attribution, "module_bad_steps")


def test_a_setting_that_an_older_record_does_not_know_is_no_suspect(make_run: RunMaker) -> None:
    older = {"preset": "bifusion", "losses": {"clip_align": None}, "optim": {"lr": 1e-4}}
    newer = {
        "preset": "bifusion",
        "losses": {"clip_align": {"weight": 0.1}, "instance": {"empty_match": "nan", "matcher": "sparse"}},
        "optim": {"lr": 2e-4},
    }
    found = compare_runs(run_of(make_run, CALM, settings=older), run_of(make_run, CALM, settings=newer)).suspects
    scores = {one.key: one.score for one in found}
    assert scores["losses.instance.empty_match"] == scores["losses.instance.matcher"] == 0.0
    assert scores["optim.lr"] > 0.5
    assert scores["losses.clip_align.weight"] >= 0.3  # switched off there: that is a difference
    others = [{key: value for key, value in one.items() if key != "preset"} for one in (older, newer)]
    found = compare_runs(*(run_of(make_run, CALM, settings=one) for one in others)).suspects
    assert next(one for one in found if one.key == "losses.instance.matcher").score > 0
