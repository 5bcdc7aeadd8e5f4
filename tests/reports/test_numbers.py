"""Numbers as text."""

from __future__ import annotations

import pytest

from bifusion_diag.reports.numbers import text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "none"),
        (0.0, "0"),
        (2.3, "2.30"),
        (0.009999999, "0.0100"),
        (999.96, "1000"),
        (-7.391, "−7.39"),
        (1.2345e6, "1.23·10⁶"),
        (4.2e-7, "4.20·10⁻⁷"),
        (float("nan"), "NaN"),
        (float("-inf"), "−∞"),
    ],
)
def test_three_significant_digits(value: float | None, expected: str) -> None:
    assert text(value) == expected


def test_counts_are_whole() -> None:
    assert text(24_000_000, whole=True) == "24\u202f000\u202f000"
    assert text(3, whole=True) == "3"
