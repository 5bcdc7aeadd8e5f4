"""Runs made up in memory, with numbers that a test can state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike

from bifusion_diag.record.schema import Event, Histogram, ModuleInfo, Run, RunHeader, Series


def _make_run(
    series: Mapping[str, ArrayLike],
    *,
    name: str = "run",
    steps: ArrayLike | None = None,
    missing: Mapping[str, ArrayLike] | None = None,
    modules: Sequence[str] = (),
    events: Sequence[Event] = (),
    histograms: Sequence[Histogram] = (),
    status: str = "completed",
    error: str | None = None,
    **header: Any,
) -> Run:
    """A run with exact series, all on the same steps (0, 1, ... where none are given)."""
    length = max((len(np.atleast_1d(values)) for values in series.values()), default=0)
    at = np.arange(length) if steps is None else np.asarray(steps)
    made = {
        key: Series.from_values(key, at, np.broadcast_to(values, at.shape), (missing or {}).get(key))
        for key, values in series.items()
    }
    listed = [ModuleInfo(module, "Linear", order, module.split(".")[0], 10, 10) for order, module in enumerate(modules)]
    head = RunHeader(name, modules=listed, **header)
    return Run(head, status, error, at, made, {one.name: one for one in histograms}, list(events), {})


@pytest.fixture
def make_run() -> Callable[..., Run]:
    """The maker of runs."""
    return _make_run
