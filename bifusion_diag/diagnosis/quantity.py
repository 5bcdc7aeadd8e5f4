"""A measured number with its unit, or the reason why there is none: "not measured" must never read as "fine"."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Quantity:
    """A measured number.

    Attributes:
        value: the number; None is the measured fact that there is none (for example no first bad step).
        unit: "" for a pure number.
    """

    value: float | None
    unit: str = ""


@dataclass(frozen=True)
class NotMeasured:
    """No number, and why."""

    reason: str


Reading = Quantity | NotMeasured


def number(reading: Reading | None) -> float | None:
    """The number of a reading, None where there is none."""
    return reading.value if isinstance(reading, Quantity) else None


def reading_to_dict(reading: Reading) -> dict[str, Any]:
    """A reading as strict JSON (no bare NaN or Infinity)."""
    if isinstance(reading, NotMeasured):
        return {"not_measured": reading.reason}
    return {"value": encode_number(reading.value), "unit": reading.unit}


def reading_from_dict(stored: dict[str, Any]) -> Reading:
    """The inverse of :func:`reading_to_dict`."""
    if "not_measured" in stored:
        return NotMeasured(str(stored["not_measured"]))
    value = stored["value"]
    return Quantity(None if value is None else float(value), str(stored["unit"]))


def encode_number(value: float | None) -> float | int | str | None:
    """A number as strict JSON: non-finite values are the strings "NaN", "Infinity" and "-Infinity"."""
    if value is None or isinstance(value, int):
        return value
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return int(value) if value.is_integer() and abs(value) < 2**53 else value
