"""When a run is bad: what is certain early must be what the whole record says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bifusion_diag.diagnosis import measure
from bifusion_diag.diagnosis.thresholds import DEFAULT_THRESHOLDS
from bifusion_diag.diagnosis.verdict import state_of
from bifusion_diag.errors import UserError
from bifusion_diag.experiments.bisect.oracle import read_oracle
from bifusion_diag.record import Run, RunHeader, Series

STEPS = 80


def random_run(seed: int) -> Run:
    draw = np.random.default_rng(seed)
    norm = np.exp(draw.normal(0, 0.3, STEPS))
    norm[draw.random(STEPS) < draw.choice([0, 0.02, 0.1])] *= 1000
    norm[draw.random(STEPS) < draw.choice([0, 0, 0.03])] = draw.choice([math.nan, math.inf])
    steps = np.arange(STEPS)
    values = {"train/grad_norm": norm, "loss/a/raw": np.ones(STEPS), "loss/total": np.ones(STEPS)}
    series = {name: Series.from_values(name, steps, value) for name, value in values.items()}
    return Run(RunHeader(name="r"), "completed", None, steps, series, {}, [], {})


def rows(run: Run) -> list[dict[str, float | None]]:
    return [{name: float(s.value[step]) for name, s in run.all_series.items()} for step in range(STEPS)]


@pytest.mark.parametrize("text", ["unstable", "nonfinite_steps>0", "spike_rate>0.02", "spikes>=2", "grad_norm/max>500"])
def test_early_and_at_the_end_it_is_the_same(text: str) -> None:
    outcomes = set()
    for seed in range(30):
        run = random_run(seed)
        watch = read_oracle(text, DEFAULT_THRESHOLDS).watch(STEPS)
        early = next((why for step, row in enumerate(rows(run)) if (why := watch.step(step, row))), None)
        outcome = "bad" if early else watch.end(run).outcome
        measures = measure(run)
        if text == "unstable":
            truth = state_of(measures, run.steps, DEFAULT_THRESHOLDS) == "unstable"
        else:
            key, sign, limit = next(text.partition(s) for s in (">=", ">") if s in text)
            value = measures.number(key)
            truth = value is not None and (value >= float(limit) if sign == ">=" else value > float(limit))
        assert outcome == ("bad" if truth else "stable"), (seed, early)
        outcomes.add(outcome)
    assert outcomes == {"bad", "stable"}


def test_what_is_not_measured_is_not_told() -> None:
    run = random_run(0)
    judged = read_oracle("gate/mean<0.3", DEFAULT_THRESHOLDS).watch(STEPS).end(run)
    assert judged.outcome == "unresolved"
    assert "not measured" in judged.why


@pytest.mark.parametrize(
    ("text", "probes"),
    [
        ("unstable", ()),
        ("finding:clip-out-of-range", ("clip",)),
        ("gate/mean<0.3", ("gate",)),
        ("clip/points/absmax > 1e3", ("clip",)),
    ],
)
def test_an_oracle_asks_for_the_probes_it_needs(text: str, probes: tuple[str, ...]) -> None:
    assert read_oracle(text, DEFAULT_THRESHOLDS).probes == probes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("unstabel", "--oracle unstabel: no such gate. Did you mean 'unstable'"),
        ("spike_rat>0.1", r"no measure 'spike_rat'. Did you mean 'spike_rate'"),
        ("spikes>many", "'many' is no number"),
        ("spikes>nan", "'nan' is no number"),
        ("finding:gradient-spik", "no rule or severity 'gradient-spik'"),
        ("finding:gradient-spik", "Did you mean 'gradient-spike'"),
        ("eval/miou<0.1", "not evaluated"),
        ("worse", "judged by itself"),
        ("ratio:grad_norm/p99>2", "judged by itself"),
    ],
)
def test_an_oracle_that_cannot_be_read(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_oracle(text, DEFAULT_THRESHOLDS)
