"""Takes a bad step apart: runs it again, compares, traces, and says where it began, why, and what may help."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from torch import nn

from bifusion_diag.probes.ranks import world_size
from bifusion_diag.replay.incident import Incident, Reproduction
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Fingerprint, Training, fingerprint
from bifusion_diag.replay.vitals import Vitals


def diagnose(
    plain: Incident,
    training: Training,
    notes: StepNotes,
    vitals: Vitals,
    first: Fingerprint | None,
    *,
    contrast: StepNotes | None,
    history: Mapping[str, Any],
    split: Any = None,
    names: Any = None,
    error: BaseException | None = None,
) -> Incident:
    """The incident with all that re-executing the step can tell. Weights, gradients, buffers and random numbers of the
    run are afterwards as they were.

    Args:
        plain: the incident as the alarm knows it.
        training: what runs.
        notes: of the bad step.
        vitals: of the bad step.
        first: its losses and gradients as they were the first time, to the bit.
        contrast: notes of the last healthy step.
        history: what was usual, see :meth:`~bifusion_diag.replay.detect.Detector.typical`.
        split: batch → one batch a sample.
        names: batch → a name a sample.
        error: that the step has raised.
    """
    began = time.perf_counter()
    reproduction = compared(training, notes, first, updated=vitals.moved is not None, error=error)
    return dataclasses.replace(plain, reproduction=reproduction, seconds=time.perf_counter() - began)


def compared(
    training: Training, notes: StepNotes, first: Fingerprint | None, *, updated: bool, error: BaseException | None
) -> Reproduction:
    """Run the step again, plainly, and compare it with the first time, bit for bit."""
    if updated:
        return Reproduction(None, difference="the weights were updated before the alarm, and are others now")
    if world_size() > 1 and any(isinstance(m, nn.SyncBatchNorm) for m in training.model.modules()):
        return Reproduction(None, difference="SyncBatchNorm waits for processes whose step was good")
    try:
        with notes.again() as batch:
            loss = training.loss(batch)
            training.backward(loss)
            second = fingerprint(loss, {} if world_size() > 1 else training.gradients())
    except Exception as raised:
        said = f"{type(raised).__name__}: {raised}"
        if error is not None:
            same = said == f"{type(error).__name__}: {error}"
            return Reproduction(same, "the error that was raised", "" if same else f"it raised {said}")
        return Reproduction(False, "whether it runs", f"it raised {said}, which it did not the first time")
    if error is not None:
        return Reproduction(False, "the error that was raised", "it ran to its end this time")
    if first is None or not (first.losses or first.gradients):
        return Reproduction(None, difference="nothing of the first time was kept to compare with")
    what = [f"{len(first.losses)} losses"] if first.losses else []
    if first.gradients and second.gradients:
        what.append(f"{len(first.gradients)} gradients")
    difference = first.difference(second)
    return Reproduction(not difference, " and ".join(what) + ", bit for bit", difference)
