"""Spikes against the definition, spelled out step by step."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from bifusion_diag.diagnosis.spikes import MIN_PREVIOUS, WINDOW, SpikeDetector, find_spikes


def brute_force(norms: list[float]) -> list[bool]:
    """The definition of spec.md 8 in plain Python."""
    previous: list[float] = []
    found = []
    for norm in norms:
        usable = math.isfinite(norm) and norm > 0
        spike = False
        window = previous[-50:]
        if usable and len(window) >= 10:
            logs = [math.log(value) for value in window]
            centre = statistics.median(logs)
            deviation = 1.4826 * statistics.median(abs(value - centre) for value in logs)
            spike = norm > 8 * statistics.median(window) and math.log(norm) - centre > 6 * deviation
        if usable:
            previous.append(norm)
        found.append(spike)
    return found


def noisy(steps: int, seed: int) -> list[float]:
    rng = np.random.default_rng(seed)
    norms = rng.lognormal(0, 0.3, steps)
    norms[rng.integers(0, steps, steps // 40)] *= rng.uniform(2, 60, steps // 40)
    norms[rng.integers(0, steps, steps // 30)] = rng.choice([np.nan, np.inf, 0.0], steps // 30)
    return norms.tolist()


@pytest.mark.parametrize("steps", [1, 9, 11, 49, 50, 51, 400])
def test_whole_series_and_stream_give_what_the_definition_says(steps: int) -> None:
    norms = noisy(max(steps, 40), seed=steps)[:steps]
    detector = SpikeDetector()
    expected = brute_force(norms)
    assert find_spikes(norms).is_spike.tolist() == expected
    assert [detector.update(norm) for norm in norms] == expected
    assert steps < 400 or any(expected)


def test_the_documents_jump_from_5_to_45_is_a_spike() -> None:
    norms = [5 * factor for factor in (0.9, 1.0, 1.1, 1.05, 0.95)] * 10 + [45.0]
    assert find_spikes(norms).is_spike.tolist() == [False] * 50 + [True]


def test_natural_swings_of_six_times_raise_no_alarm() -> None:
    norms = np.random.default_rng(3).lognormal(5, 0.3, 1000)  # early training from scratch: norms of 100 ... 700
    norms[500:1000:50] = 6 * np.median(norms)
    assert not find_spikes(norms).is_spike.any()


def test_eight_times_the_median_is_no_spike_where_the_norm_always_swings_so_far() -> None:
    norms = [1.0, 30.0] * 25 + [200.0]  # 200 > 8 × 15.5, but 6 robust deviations of log g reach far beyond
    assert not find_spikes(norms).is_spike[-1]


def test_a_jump_from_a_constant_norm_is_a_spike() -> None:
    assert find_spikes([2.0] * MIN_PREVIOUS + [17.0]).is_spike[-1]
    assert not find_spikes([2.0] * MIN_PREVIOUS + [15.9]).is_spike[-1]


def test_too_few_earlier_norms_are_not_judged() -> None:
    found = find_spikes([1.0] * (MIN_PREVIOUS - 1) + [np.nan, 100.0])
    assert not found.judged.any()
    assert not found.is_spike.any()
    assert np.isnan(found.median).all()


def test_the_median_is_that_of_the_previous_fifty() -> None:
    norms = np.random.default_rng(1).lognormal(0, 1, 130)
    assert find_spikes(norms).median[120] == pytest.approx(np.median(norms[120 - WINDOW : 120]))
