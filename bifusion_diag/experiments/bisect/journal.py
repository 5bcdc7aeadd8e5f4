"""What a bisection has done so far, a line a run: it is only appended to, so that it survives being killed."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from bifusion_diag.errors import UserError

FILE = "journal.jsonl"
KIND = "bifusion-diag bisect journal"
Entry = dict[str, Any]


class Journal:
    """The journal of a folder. A context manager; while it is open, no other process can have it.

    Args:
        folder: made where there is none.
        head: what the bisection is of; a journal of another one is refused.
        must_exist: there has to be one to go on with.

    Attributes:
        entries: all lines but the first, as they were appended.
        resumed: there was one before.

    Raises:
        UserError: it is of another bisection, damaged, in use, cannot be written, or is not there.
    """

    def __init__(self, folder: Path, head: Mapping[str, Any], *, must_exist: bool = False) -> None:
        self.path = folder / FILE
        head = {"kind": KIND, "version": 1, **json.loads(json.dumps(head))}
        if must_exist and not self.path.is_file():
            raise UserError(f"{folder}: there is no bisection to go on with. Leave --resume out to start one.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror or error}). Give another --out.") from error
        try:
            self._lock()
            lines = self._whole_lines()
            if lines and lines[0] != head:
                raise UserError(_of_another(folder, lines[0], head))
        except BaseException:
            self.close()
            raise
        self.resumed = bool(lines)
        self.entries: list[Entry] = lines[1:]
        if not lines:
            self._write(head)

    def _lock(self) -> None:
        """Keep other processes out, until this one closes the file or ends."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            where = self.path.parent
            raise UserError(f"{where}: another process bisects there. Wait for it, or give another --out.") from error

    def _whole_lines(self) -> list[Entry]:
        """All lines; what a process that was killed left of its last one is cut off."""
        content = self.path.read_bytes()
        whole, _, rest = content.rpartition(b"\n")
        if rest:
            os.truncate(self.path, len(content) - len(rest))
        lines = []
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise UserError(f"{self.path}: line {number} is damaged. Remove the folder to start anew.") from error
            if not isinstance(entry, dict):
                raise UserError(f"{self.path}: line {number} is no entry. Remove the folder to start anew.")
            lines.append(entry)
        return lines

    def append(self, entry: Entry) -> None:
        """Add a line; it is on the disk when this returns."""
        self.entries.append(json.loads(json.dumps(entry)))
        self._write(entry)

    def _write(self, entry: Entry) -> None:
        self._file.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let others have it. Closing twice is fine."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _of_another(folder: Path, found: Entry, head: Mapping[str, Any]) -> str:
    if found.get("kind") != KIND:
        return f"{folder}: {FILE} there is of something else. Give another --out."
    other = [key for key in head if found.get(key) != head[key]]
    return (
        f"{folder}: the bisection there was started with other settings ({', '.join(other)} differ). Give another "
        "--out, or remove the folder."
    )
