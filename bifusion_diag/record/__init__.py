"""The run record: append-only while a run lasts, one bounded run.json at its end. Knows no torch."""

from bifusion_diag.record.load import load_run
from bifusion_diag.record.schema import (
    SCHEMA_VERSION,
    Event,
    Histogram,
    ModuleInfo,
    RecordError,
    Run,
    RunHeader,
    Series,
    SeriesStats,
)

__all__ = [
    "SCHEMA_VERSION",
    "Event",
    "Histogram",
    "ModuleInfo",
    "RecordError",
    "Run",
    "RunHeader",
    "Series",
    "SeriesStats",
    "load_run",
]
