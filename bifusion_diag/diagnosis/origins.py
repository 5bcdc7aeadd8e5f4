"""Where a bad step starts, as far as the record shows it.

The gradient travels from the loss back through the modules. So, of a non-finite step: if a loss term is non-finite,
it starts in that term; else in the module that the backward pass reached first among those whose gradient is
non-finite, which is the last one in execution order. Of a spike: in the module that the backward pass reached first
among those whose parameter gradient exceeds 8 × its own median of the previous 50 steps, else in the one that grew
most. That is a place, not a cause: replaying the step shows more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.diagnosis.names import is_exact, loss_terms, table
from bifusion_diag.diagnosis.phrase import Name, say
from bifusion_diag.diagnosis.spikes import FACTOR, MIN_PREVIOUS, WINDOW
from bifusion_diag.record.schema import Run

NON_FINITE = 4  # code in grads/<module>/state


@dataclass(frozen=True)
class Origin:
    """One bad step.

    Attributes:
        step: the step.
        kind: how it is bad.
        terms: the loss terms that are non-finite.
        module: where it starts, None where the record doesn't tell or a loss term comes first.
        growth: of a spike, the module's gradient norm ÷ its own median of the steps before.
        scenes: the scenes of the batch, where the record names them.
    """

    step: int
    kind: Literal["non-finite", "spike"]
    terms: tuple[str, ...] = ()
    module: str | None = None
    growth: float | None = None
    scenes: tuple[str, ...] = ()

    @property
    def place(self) -> str | None:
        """The loss term or module that it starts in, in words; None where unknown."""
        if self.terms:
            *first, last = self.terms
            if not first:
                return say("loss term {term}", term=last)
            return say("loss terms {first} and {last}", first=Name(", ".join(first)), last=Name(last))
        return None if self.module is None else Name(self.module)


def trace_origins(run: Run, nonfinite: Sequence[int], spikes: Sequence[int]) -> tuple[Origin, ...]:
    """Where each bad step starts, in order of steps.

    Args:
        run: a record whose gradient series are exact at least around these steps; else the result is empty.
        nonfinite: the non-finite steps.
        spikes: the spikes; a step that is both counts as non-finite.
    """
    if not is_exact(run, "grads/") or not is_exact(run, "loss/"):
        return ()
    scenes = _scenes_by_step(run)
    order = gradient_modules(run)
    found = _trace_nonfinite(run, order, nonfinite, scenes) + _trace_spikes(
        run, order, [step for step in spikes if step not in set(nonfinite)], scenes
    )
    return tuple(sorted(found, key=lambda origin: origin.step))


def most_common_place(origins: Sequence[Origin]) -> tuple[str, int] | None:
    """The place where most bad steps start and how many; None where no origin is known. Ties: the earliest."""
    counts = Counter(origin.place for origin in origins if origin.place is not None)
    return counts.most_common(1)[0] if counts else None


def origin_to_dict(origin: Origin) -> dict[str, Any]:
    """An origin as JSON."""
    return {**origin.__dict__, "terms": list(origin.terms), "scenes": list(origin.scenes)}


def origin_from_dict(stored: Mapping[str, Any]) -> Origin:
    """The inverse of :func:`origin_to_dict`."""
    return Origin(**{**stored, "terms": tuple(stored["terms"]), "scenes": tuple(stored["scenes"])})


def rows_needed(recorded: NDArray[np.int64], steps: Sequence[int]) -> NDArray[np.int64]:
    """Rows, ascending, of given steps and of the `WINDOW` recorded steps before each: what tracing them reads."""
    at = np.searchsorted(recorded, np.asarray(steps, dtype=np.int64))
    rows = (at[:, None] - np.arange(WINDOW + 1)).ravel()
    return np.unique(rows[(rows >= 0) & (rows < recorded.size)])


def gradient_modules(run: Run) -> list[str]:
    """Modules with recorded parameter gradients, in execution order."""
    recorded = [name[len("grads/") : -len("/state")] for name in run.names("grads/") if name.endswith("/state")]
    order = {module.name: module.order for module in run.modules}
    return sorted(recorded, key=lambda name: order.get(name, len(order)))


def _trace_nonfinite(
    run: Run, order: Sequence[str], steps: Sequence[int], scenes: Mapping[int, tuple[str, ...]]
) -> list[Origin]:
    at = np.asarray(steps, dtype=np.int64)
    terms = loss_terms(run)
    bad_terms = np.stack([np.isin(at, _nonfinite_at(run, name)) for name in terms.values()]) if terms else None
    states = table(run, [f"grads/{module}/state" for module in order], at)
    origins = []
    for column, step in enumerate(steps):
        named = (
            () if bad_terms is None else tuple(term for term, row in zip(terms, bad_terms, strict=True) if row[column])
        )
        bad_modules = np.flatnonzero(states[:, column] == NON_FINITE)
        module = order[bad_modules[-1]] if bad_modules.size and not named else None
        origins.append(Origin(step, "non-finite", named, module, None, scenes.get(step, ())))
    return origins


def _nonfinite_at(run: Run, name: str) -> NDArray[np.int64]:
    series = run.all_series[name]
    return series.steps[series.nonfinite > 0]


def _trace_spikes(
    run: Run, order: Sequence[str], steps: Sequence[int], scenes: Mapping[int, tuple[str, ...]]
) -> list[Origin]:
    if not steps:
        return []
    modules = [module for module in order if run.series(f"grads/{module}/param_norm") is not None]
    needed = rows_needed(run.steps, steps)
    norms = table(run, [f"grads/{module}/param_norm" for module in modules], run.steps[needed])
    norms[~np.isfinite(norms) | (norms <= 0)] = np.nan
    origins = []
    for step in steps:
        column = int(np.searchsorted(needed, np.searchsorted(run.steps, step)))
        before = norms[:, max(0, column - WINDOW) : column]  # at least these many rows are needed ones, without a gap
        usable = np.flatnonzero((np.isfinite(before).sum(axis=1) >= MIN_PREVIOUS) & np.isfinite(norms[:, column]))
        module, growth = None, None
        if usable.size:
            factors = norms[usable, column] / np.nanmedian(before[usable], axis=1)
            jumped = np.flatnonzero(factors > FACTOR)
            chosen = int(jumped[-1] if jumped.size else factors.argmax())
            module, growth = modules[usable[chosen]], float(factors[chosen])
        origins.append(Origin(step, "spike", (), module, growth, scenes.get(step, ())))
    return origins


def _scenes_by_step(run: Run) -> dict[int, tuple[str, ...]]:
    """Scenes that events name for their step under `scenes`, each with its `scene_notes` in brackets."""
    found: dict[int, tuple[str, ...]] = {}
    for event in run.events:
        names = event.data.get("scenes")
        if event.step is None or not isinstance(names, list | tuple):
            continue
        notes = event.data.get("scene_notes") or [()] * len(names)
        found[event.step] = tuple(
            f"{name} [{'; '.join(map(str, told))}]" if told else str(name)
            for name, told in zip(names, notes, strict=False)
        )
    return found
