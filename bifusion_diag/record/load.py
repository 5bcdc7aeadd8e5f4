"""Reading a run back."""

from __future__ import annotations

from pathlib import Path

from bifusion_diag.record import codec
from bifusion_diag.record.document import check_version, from_document
from bifusion_diag.record.reader import RecordReader
from bifusion_diag.record.reduce import reduce_record
from bifusion_diag.record.schema import RecordError, Run


def load_run(path: Path | str) -> Run:
    """Read a run.

    Args:
        path: a run.json, or the .record folder of a run that was killed before it could write one.

    Raises:
        RecordError: the file is missing, corrupt, not a run, or of a newer schema version.
    """
    path = Path(path)
    if path.is_dir():
        run, _ = reduce_record(RecordReader(path))
        return run
    try:
        document = codec.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        folder = path.with_name(path.stem + ".record")
        hint = f" The run was cut short? Its record {folder} can be read instead." if folder.is_dir() else ""
        raise RecordError(f"{path}: cannot be read ({error.strerror}).{hint}") from error
    except ValueError as error:  # also undecodable text
        raise RecordError(
            f"{path}: not valid JSON ({error}); the file is truncated or damaged. Copy it again, or read the "
            f"{path.stem}.record folder that lay beside it."
        ) from error
    check_version(document, path)
    try:
        return from_document(document)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RecordError(
            f"{path}: damaged: it does not follow the run schema ({type(error).__name__}: {error})"
        ) from error
