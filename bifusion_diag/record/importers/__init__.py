"""Logs that other programs wrote, read as records: MMEngine, MMCV, TensorBoard, CSV, Transformers.

One file a format; `names.py` knows what their columns are, `record.py` makes a record of them. Nothing in a log is
ever run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bifusion_diag.errors import UserError, near_matches
from bifusion_diag.record.importers.find import FORMATS, Found, find_format, kind_of, name_of, read_found
from bifusion_diag.record.importers.record import ImportedRecord, build

__all__ = ["FORMATS", "Found", "ImportedRecord", "find_format", "kind_of", "read_source"]


def read_source(
    path: Path | str,
    *,
    name: str | None = None,
    columns: Mapping[str, str] | None = None,
    smoothing: int | None = None,
    format: str | None = None,
) -> ImportedRecord:
    """Read a foreign log at full resolution.

    Args:
        path: a file, or the folder of one run.
        name: of the run. None: that of its folder or file.
        columns: our names → its names, where these say too little; see docs/import.md.
        smoothing: how many steps a value is the mean of, where the log does not tell.
        format: one of FORMATS. None: the first of them that is there.

    Raises:
        RecordError: there is nothing to read, or there are several runs.
        UserError: an argument is wrong.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise UserError(f"--format {format}: no format is named so." + near_matches(format, FORMATS))
    if smoothing is not None and smoothing < 1:
        raise UserError(f"--smoothing {smoothing}: expected the number of steps of a mean, 1 for single steps.")
    found = find_format(path, format)
    given = dict(columns or {})
    raw = read_found(found, path, name or name_of(found, path), given)
    return build(raw, given, smoothing)
