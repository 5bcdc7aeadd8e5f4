"""Any result of diagnosis as strict JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from bifusion_diag.diagnosis.measures import Measures, measures_to_dict
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity, encode_number, reading_to_dict


def to_plain(value: Any) -> Any:
    """Dataclasses as objects, readings and non-finite numbers as they are stored in records.

    Raises:
        TypeError: a type that has no form in JSON.
    """
    if isinstance(value, Measures):
        return measures_to_dict(value)
    if isinstance(value, Quantity | NotMeasured):
        return reading_to_dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int | float | np.integer | np.floating):
        return encode_number(value.item() if isinstance(value, np.generic) else value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")
