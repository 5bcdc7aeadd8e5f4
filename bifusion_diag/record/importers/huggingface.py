"""Transformers: ``trainer_state.json``, whose ``log_history`` has a row every `logging_steps` steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bifusion_diag.record.importers.source import Raw, Segment, Smoothing, number, whole
from bifusion_diag.record.schema import RecordError

FORMAT = "Transformers"
NORM = "before clipping, as the Trainer measures it"
FILTERED = (
    "Transformers leaves NaN and infinite losses out of the mean that it logs (logging_nan_inf_filter, on by default): "
    "a loss that was not finite need not be in this log."
)
MAX_BYTES = 512 << 20


def read(path: Path, name: str, file: Path) -> Raw:
    """Read the file.

    Raises:
        RecordError: it is damaged.
    """
    try:
        if file.stat().st_size > MAX_BYTES:
            raise RecordError(f"{file}: larger than {MAX_BYTES >> 20} MiB; no trainer_state.json is.")
        state = json.loads(file.read_bytes().decode("utf-8", "replace"))
    except OSError as error:
        raise RecordError(f"{file}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{file}: not valid JSON ({error}); copy it again, or read that of a checkpoint.") from error
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        raise RecordError(f"{file}: it has no log_history. Expected the trainer_state.json of Transformers.")
    raw = Raw(FORMAT, path, name, [], [file], norm=NORM, notes=[FILTERED])
    segment = Segment(file.name)
    steps: list[int] = []
    for row in state["log_history"]:
        step = whole(row.get("step")) if isinstance(row, Mapping) else None
        if step is None:
            raw.skipped += 1
            continue
        values = {str(key): number(value) for key, value in row.items() if key not in ("step", "epoch")}
        if "loss" in values:
            steps.append(step)
            segment.add(step, values)
        else:  # of an evaluation (eval_...), or the summary at the end (train_...)
            values = {key: value for key, value in values.items() if not key.startswith("train_")}
            segment.add(step, values, training=False)
    raw.segments = [segment] if segment.values else []
    raw.planned = whole(state.get("max_steps"))
    raw.settings = {
        key: state[key]
        for key in ("max_steps", "num_train_epochs", "logging_steps", "eval_steps", "train_batch_size")
        if isinstance(state.get(key), int | float)
    }
    stated = whole(state.get("logging_steps"))
    window = stated or (int(np.median(np.diff(steps))) if len(steps) > 1 else 0)
    source = "logging_steps" if stated else "the distance of rows"
    raw.smoothing = Smoothing(window, f"{source}: the mean of the steps since the last row", only=r"(?!eval_).*loss.*")
    return raw
