"""Writing a report: the page and, beside it, the data of everything it shows."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bifusion_diag.diagnosis.compare import RunAssessment, RunComparison
from bifusion_diag.diagnosis.plain import to_plain
from bifusion_diag.errors import UserError


def report_data(result: RunComparison | RunAssessment) -> dict[str, Any]:
    """What a report shows, as strict JSON."""
    kind = "comparison" if isinstance(result, RunComparison) else "assessment"
    return {"kind": f"bifusion-diag {kind}", "version": "1.0", **to_plain(result)}


def write_report(path: Path | str, html: str, data: Mapping[str, Any]) -> Path:
    """Write the page, and its data as JSON beside it under the same name.

    Returns:
        The JSON file.

    Raises:
        UserError: one of them cannot be written. No file is left half-written.
    """
    page = Path(path)
    beside = page.with_suffix(".json")
    if beside == page:
        raise UserError(f"{page}: the page needs a name that does not end in .json; its data go there.")
    write_json(beside, data)
    write_text(page, html)
    return beside


def write_json(path: Path | str, data: Mapping[str, Any]) -> None:
    """Write strict JSON, whole or not at all."""
    write_text(path, json.dumps(data, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def write_text(path: Path | str, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    target = Path(path)
    temporary = ""
    try:
        if target.is_dir():
            raise IsADirectoryError(None, "it is a folder; a file name was expected")
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's own mode keeps others from reading
        os.replace(temporary, target)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise UserError(
            f"{target}: cannot be written ({error.strerror or error}). Choose another output path."
        ) from error
