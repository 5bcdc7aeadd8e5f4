"""Reading a run back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bifusion_diag.record import codec
from bifusion_diag.record.document import check_version, from_document
from bifusion_diag.record.importers import ImportedRecord, kind_of, read_source
from bifusion_diag.record.incidents import read_incident_files
from bifusion_diag.record.reader import HEADER_FILE, RecordReader
from bifusion_diag.record.reduce import reduce_record
from bifusion_diag.record.schema import RecordError, Run

OF_HOOKS = "bifusion-diag"  # the folder that our hooks and callbacks make in a framework's own


def resolve_run(path: Path | str) -> Path:
    """What is to be read of a run: its run.json or, where there is none, its .record folder.

    Args:
        path: a run.json, a .record folder, or a folder that holds a run.json or a run.record, or that of a framework
            with ours in it.

    Returns:
        The path itself where it is none of these: reading it says what is wrong.
    """
    path = Path(path)
    if not (path / HEADER_FILE).exists():
        if (path / "run.json").is_file():
            return path / "run.json"
        if (path / "run.record").is_dir():
            return path / "run.record"
        if (path / OF_HOOKS).is_dir():  # a framework's folder, whose run was recorded by our hook
            return resolve_run(path / OF_HOOKS)
    return path


def load_run(path: Path | str) -> Run:
    """Read a run.

    Args:
        path: a run.json, or the .record folder of a run that was killed before it could write one, or the folder that
            holds a run.json or a run.record. Else a log of another program (docs/import.md).

    Raises:
        RecordError: the file is missing, corrupt, not a run, or of a newer schema version.
    """
    return load_with_record(path)[0]


def load_with_record(path: Path | str) -> tuple[Run, RecordReader | None]:
    """As :func:`load_run`, with the whole series; None of a run.json, which has none."""
    path = resolve_run(path)
    record = open_record(path)
    run = reduce_record(record)[0] if record is not None else _read(path)
    files = {} if isinstance(record, ImportedRecord) else read_incident_files(path)
    return replace(run, incident_files=files), record


def open_record(path: Path) -> RecordReader | None:
    """Whole series of a .record folder, or of another program's log; None of a run.json, which has none.

    Args:
        path: as :func:`resolve_run` gives it.

    Raises:
        RecordError: there is nothing to read.
    """
    if (path / HEADER_FILE).exists() or (path.is_dir() and path.suffix == ".record"):
        return RecordReader(path)
    foreign = path.is_dir() or (path.is_file() and kind_of(path) is not None)
    if foreign or (path.exists() and not path.is_file()):  # a pipe would be waited for: that is refused, too
        return read_source(path)
    return None


def _read(path: Path) -> Run:
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
