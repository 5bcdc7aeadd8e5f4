"""The flight recorder: a bad step is caught before its update, run again exactly, explained, and kept as a capsule."""

from bifusion_diag.replay.incident import Cause, Incident, Reproduction, SampleShare, Trigger
from bifusion_diag.replay.recorder import POLICIES, BadStepError, FlightRecorder
from bifusion_diag.replay.step import Training
from bifusion_diag.replay.watch.vitals import Vitals

__all__ = [
    "POLICIES",
    "BadStepError",
    "Cause",
    "FlightRecorder",
    "Incident",
    "Reproduction",
    "SampleShare",
    "Training",
    "Trigger",
    "Vitals",
]
