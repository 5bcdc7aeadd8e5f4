"""Numbers as text: the same number of significant digits in a column."""

from __future__ import annotations

import math

from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity, Reading
from bifusion_diag.reports.language import tr

DIGITS = 3
_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def text(value: float | None, *, whole: bool = False) -> str:
    """A number with three significant digits; a count (`whole`) in full, up to a billion."""
    if value is None:
        return tr("none")
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    if whole and float(value).is_integer() and abs(value) < 1e9:
        return f"{value:,.0f}".replace(",", "\u202f").replace("-", "−")
    value = float(f"{value:.{DIGITS}g}")
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 5:
        shown = f"{value:.{max(0, DIGITS - 1 - exponent)}f}"
        return shown.replace("-", "−")
    return f"{value / 10.0**exponent:.{DIGITS - 1}f}·10".replace("-", "−") + str(exponent).translate(_SUPERSCRIPT)


def reading_text(reading: Reading) -> str:
    """A reading as a table shows it, without its unit."""
    if isinstance(reading, NotMeasured):
        return tr("not measured")
    return text(reading.value, whole=is_whole(reading))


def is_whole(reading: Quantity) -> bool:
    """Whether the number counts something."""
    return reading.unit in ("step", "steps", "points") or (reading.value or 0.5) % 1 == 0


def ratio_text(ratio: float | None) -> str:
    """A ratio as "×1.40"; "" where there is none."""
    return "" if ratio is None else f"{text(ratio)} ×"
