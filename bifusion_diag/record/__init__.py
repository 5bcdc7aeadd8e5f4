"""The run record: append-only while a run lasts, one bounded run.json at its end. Knows no torch."""

from bifusion_diag.record.environment import collect_environment
from bifusion_diag.record.files import HistogramRows, Rows
from bifusion_diag.record.follow import RecordFollower
from bifusion_diag.record.incidents import incident_folder
from bifusion_diag.record.load import load_run, resolve_run
from bifusion_diag.record.reader import RecordReader
from bifusion_diag.record.scenes import AlphaNumbers, SceneCapture, SceneView, Snapshot, alpha_numbers, capture
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
from bifusion_diag.record.tensorboard import TensorBoardSink
from bifusion_diag.record.writer import RunWriter, check_output, rank_folders, record_folder

__all__ = [
    "SCHEMA_VERSION",
    "AlphaNumbers",
    "Event",
    "Histogram",
    "HistogramRows",
    "ModuleInfo",
    "RecordError",
    "RecordFollower",
    "RecordReader",
    "Rows",
    "Run",
    "RunHeader",
    "RunWriter",
    "SceneCapture",
    "SceneView",
    "Series",
    "SeriesStats",
    "Snapshot",
    "TensorBoardSink",
    "alpha_numbers",
    "capture",
    "check_output",
    "collect_environment",
    "incident_folder",
    "load_run",
    "rank_folders",
    "record_folder",
    "resolve_run",
]
