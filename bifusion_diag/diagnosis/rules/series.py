"""What several rules ask of a record: series from a step on, numbers by module, windows that values are means of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.diagnosis.criteria import warm_up_steps
from bifusion_diag.diagnosis.findings import Context
from bifusion_diag.diagnosis.instruments import matching
from bifusion_diag.diagnosis.phrase import Phrase, say
from bifusion_diag.record.schema import Ints, Run, Series

EARLY = 0.1  # share of a run that is not judged where a trend is asked for: its norms fall steeply
LISTED = 5  # modules that one finding names


def smoothing_of(run: Run) -> int:
    """How many steps a value is the mean of, in a record that was imported from a log that smooths; else 1."""
    imported = run.provenance.get("imported")
    window = imported.get("smoothing", 0) if isinstance(imported, Mapping) else 0
    return int(window) if isinstance(window, int | float) and window > 1 else 1


def smoothed_note(run: Run) -> Phrase | None:
    """What to say of steps in such a record; None in any other."""
    if (window := smoothing_of(run)) == 1:
        return None
    return say("Its values are means over {window} steps: a step named here ends such a window.", window=window)


def is_whole(run: Run) -> bool:
    """Whether a record begins with the run's first step: one that goes on, or a window, does not show what was
    before."""
    return bool(len(run.steps)) and int(run.steps[0]) <= smoothing_of(run)


def settled_step(run: Run) -> int:
    """The step from which on a trend is judged: after the warm-up and the steep beginning."""
    if not is_whole(run):
        return max(warm_up_steps(run), int(run.steps[0]) if len(run.steps) else 0)
    first, last = int(run.steps[0]), int(run.steps[-1])
    return max(warm_up_steps(run), first + int(EARLY * (last - first)))


def middle_step(run: Run) -> int:
    """The first step of the second half of a record."""
    return int(run.steps[len(run.steps) // 2]) if len(run.steps) else 0


def finite_from(series: Series, begin: int) -> tuple[Ints, NDArray[np.float64]]:
    """Steps (K,) and values (K,) where a series is finite, from a step on; of a reduced one means of buckets."""
    here = (series.steps >= begin) & np.isfinite(series.value)
    return series.steps[here], series.value[here]


def by_module(context: Context, probe: str, key: str) -> dict[str, Series]:
    """A number of a probe by module, in execution order."""
    found = dict(matching(context.run, rf"{probe}/(.+)/{key}"))
    order = {info.name: info.order for info in context.run.modules}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def usual(series: Series | None, begin: int, least: int = 1) -> float | None:
    """The median of the finite values from a step on; None where there are fewer than `least`."""
    if series is None:
        return None
    values = finite_from(series, begin)[1]
    return float(np.median(values)) if values.size >= max(least, 1) else None


def innermost(modules: Sequence[str]) -> list[str]:
    """Modules without those that contain another one of them."""
    return [name for name in modules if not any(_inside(other, name) for other in modules)]


def _inside(module: str, container: str) -> bool:
    return module != container and (container == "(root)" or module.startswith(f"{container}."))


def listed(names: Sequence[str]) -> Phrase | str:
    """Some names, and how many more there are."""
    shown = ", ".join(names[:LISTED])
    return say("{names} and {n} more", names=shown, n=len(names) - LISTED) if len(names) > LISTED else shown
