"""The cases of `benchmarks.bisect` are what they are said to be; whether they are found is for the benchmark."""

from __future__ import annotations

import pytest

from benchmarks.bisect import CASES, HARMLESS, Case
from bifusion_diag.config import load_settings
from bifusion_diag.experiments.bisect.differences import flat, space_of


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_what_is_planted_differs_and_is_hidden_among_harmless_differences(case: Case) -> None:
    baseline, candidate = (load_settings("bifusion", values=values) for values in case.ends.values())
    differ = {change.key for one in space_of(baseline, candidate).differences for change in one.changes}
    planted = frozenset[str]().union(*case.expected)
    assert differ == planted | set(HARMLESS)
    assert len(HARMLESS) >= 8
    values = flat(candidate.model_dump(mode="json"))
    for cause in case.causes:
        assert {key: values[key] for key in cause} == cause


def test_single_settings_and_some_that_fail_only_together() -> None:
    sizes = [len(cause) for case in CASES for cause in case.causes]
    assert len(CASES) >= 10
    assert sizes.count(1) >= 4
    assert sizes.count(2) >= 4
