"""Names of runs and of the recorded series that diagnosis reads, and how to read these step by step."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.record.schema import Run, RunHeader

TOTAL = "loss/total"
NORM = "train/grad_norm"
COEFFICIENT = "train/clip_coefficient"
MIOU = "eval/miou"
AP50 = "eval/ap50"
CLIP_PLACES = ("tokens", "head", "points")
NAME_LENGTH = 64  # characters of a run's name in sentences and tables


def display_name(run: Run) -> str:
    """The run's name on one line, without control characters (they could reorder the text around it), cut if long."""
    name = "".join(
        " " if letter.isspace() else letter
        for letter in run.header.name
        if letter.isspace() or unicodedata.category(letter) not in ("Cc", "Cf", "Cs")
    )
    name = " ".join(name.split())
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH // 2]}…{name[-NAME_LENGTH // 2 + 1 :]}"


def loss_terms(run: Run, suffix: str = "raw") -> dict[str, str]:
    """Series names of the loss terms by term; `suffix` is "raw" or "weighted"."""
    names = [name for name in run.names("loss/") if name.endswith(f"/{suffix}")]
    return {name[len("loss/") : -len(suffix) - 1]: name for name in names}


def names_by_module(header: RunHeader, names: Iterable[str]) -> set[str]:
    """Which of these series are of a module, ``<probe>/<module>/<key>``: there are many of them."""
    modules = {module.name for module in header.modules}
    return {name for name in names if name.startswith("grads/") or name.partition("/")[2].rpartition("/")[0] in modules}


def is_exact(run: Run, prefix: str = "") -> bool:
    """Whether the record still holds every step of every series whose name begins with `prefix`."""
    return all(run.all_series[name].exact for name in run.names(prefix))


def table(run: Run, names: Sequence[str], steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """Values of exact series on given steps (names, K); NaN where there is none."""
    rows = np.full((len(names), steps.size), np.nan)
    for row, name in zip(rows, names, strict=True):
        series = run.all_series[name]
        if len(series.steps) and steps.size:
            place = np.searchsorted(series.steps, steps).clip(max=len(series.steps) - 1)
            row[:] = np.where(series.steps[place] == steps, series.value[place], np.nan)
    return rows
